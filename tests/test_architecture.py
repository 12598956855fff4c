"""The house: a module imports from lower floors only, and a few things are nowhere."""

import ast
import re
import sys
from pathlib import Path

import pytest

import msrl_diffusers


PACKAGE = Path(msrl_diffusers.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
FLOORS = [
    {"errors", "files", "seeding", "arguments", "precision", "processes"},
    {"functional"},
    {"models", "data"},
    {"pipelines", "policies", "rewards"},
    {"rollouts", "trajectories", "evaluation", "hub", "plots", "chains"},
    {"trainers"},
    {"study", "text_to_image", "cli", "app"},
]
SIDEWAYS = {
    ("policies", "pipelines"),
    ("trajectories", "evaluation"),
    ("arguments", "errors"),
    ("processes", "errors"),
    ("cli", "study"),
    ("cli", "app"),
    ("text_to_image", "study"),
}  # on one floor, in this direction only
FORBIDDEN = [r"torch\.load\(", r"\bpickle\b", r"allow_pickle", r"^\s*print\(", r"pyplot"]


def floor_of(unit: str) -> int:
    (floor,) = [number for number, units in enumerate(FLOORS) if unit in units]
    return floor


def imports_of(name: str) -> tuple[set[str], set[str]]:
    """Modules of this package (by their path within it) and modules from elsewhere that a module imports."""
    path = MODULES[name]
    package = list(path.relative_to(PACKAGE).parts[:-1])
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            inside |= {".".join(base)} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module)
    return inside, outside


def test_the_package_was_found():
    assert len(MODULES) > 30
    assert imports_of("policies.volume")[0] == {
        "pipelines.med_volume",
        "pipelines.schedulers",
        "policies.base",
        "policies.unet",
    }


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_imports_from_lower_floors_only(name):
    unit = name.split(".")[0]
    inside, outside = imports_of(name)
    assert not any(module.split(".")[0] == "msrl_diffusers" for module in outside), "use relative imports"
    for module in inside:
        other = module.split(".")[0]
        allowed = other == unit or floor_of(other) < floor_of(unit) or (unit, other) in SIDEWAYS
        assert allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("functional")])
def test_formulas_need_torch_alone(name):
    inside, outside = imports_of(name)
    assert {module.split(".")[0] for module in outside} <= {"torch", *sys.stdlib_module_names}
    assert all(module.split(".")[0] == "functional" for module in inside)


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_are_short_and_without_what_is_forbidden(name):
    text = MODULES[name].read_text()
    assert text.count("\n") <= 450
    assert text.startswith('"""'), "what is this module for?"
    for pattern in FORBIDDEN:
        assert not re.search(pattern, text, re.MULTILINE), pattern


def test_trainers_clip_where_a_gradient_that_is_not_finite_is_seen():
    clips = [name for name, path in MODULES.items() if "clip_grad_norm_(" in path.read_text()]
    assert clips == ["trainers.base", "trainers.tuned_weights"]


def test_the_pipeline_ignores_reinforcement_learning():
    text = MODULES["pipelines.med_volume"].read_text().lower()
    assert not re.search(r"reward|rollout|log_prob|advantage", text)


@pytest.mark.parametrize("name", msrl_diffusers.__all__)
def test_every_public_name_resolves(name):
    assert getattr(msrl_diffusers, name) is not None
    assert name in dir(msrl_diffusers)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Teapot'"):
        _ = msrl_diffusers.Teapot
