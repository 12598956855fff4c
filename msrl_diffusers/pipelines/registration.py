"""What diffusers must know of this package to load and save its classes, told without importing what that would take.

Diffusers never imports a module that a repository names. It looks for the class of a pipeline in its own namespace, and
for the libraries of components in `LOADABLE_CLASSES` of a module that takes as long to import as torch. So the class is
offered there under its name (PEP 562), and this package is entered when that module is imported, whoever does it.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

import diffusers


PACKAGE = __name__.partition(".")[0]
PIPELINE = "MedVolumePipeline"
LOADING = "diffusers.pipelines.pipeline_loading_utils"
METHODS = ["save_pretrained", "from_pretrained"]
BASE_CLASSES = {"ModelMixin": METHODS, "SchedulerMixin": METHODS}  # diffusers looks for them in this package


def register() -> None:
    """Let `DiffusionPipeline.from_pretrained` load folders whose `model_index.json` names `MedVolumePipeline`, or
    components as `["msrl_diffusers", CLASS]`, and let any pipeline save such. Twice does no harm."""
    _offer_pipeline()
    if LOADING in sys.modules:
        _enter(sys.modules[LOADING])
    else:
        sys.meta_path.insert(0, _EntersWhenLoaded())


def _offer_pipeline() -> None:
    """`diffusers.MedVolumePipeline`, imported at its first use; other names as before."""
    others = vars(diffusers).get("__getattr__")

    def offer(name: str):
        if name == PIPELINE:
            return getattr(import_module(".med_volume", __package__), PIPELINE)
        if others is not None:
            return others(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    diffusers.__getattr__ = offer


def _enter(loading) -> None:
    loading.LOADABLE_CLASSES[PACKAGE] = BASE_CLASSES


class _EntersWhenLoaded(MetaPathFinder):
    """Finds the one module where it lies, and enters this package there as soon as it has run."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != LOADING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_enter(module) -> None:
                run(module)
                _enter(module)

            spec.loader.exec_module = run_and_enter
        return spec
