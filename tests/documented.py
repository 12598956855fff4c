"""What the pages print (commands, Python blocks, expressions), and the folder in which a test carries one of them out."""

import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import yaml
from hub_server import TOKEN, HubServer
from tiny import tiny_pipeline, tiny_study
from tiny_release import write_tiny_release

from msrl_diffusers import SliceRewardModel, VolumeRewardModel
from msrl_diffusers.cli import main


ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "examples/README.md", "examples/results/README.md")
PROGRAMS = ("msrl ", "make ", "accelerate launch ", "python ", "pip install ")
OBJECTS = ("pipe.", "msrl_diffusers.", "MedVolumePipeline.", "DiffusionPipeline.")
# What stands for the reader's own names and numbers. OWNER/NAME and OWNER/ADAPTER are names of repositories as they are.
WORDS = {
    "P": "pipeline",
    "R3": "reward_volume",
    "R2": "reward_slice",
    "OUT": "out",
    "DIR": "data",
    "REAL": "train",
    "TRAIN": "train",
    "GENERATED": "generated",
    "OTHER_REAL": "held_out",
    "CONFIG": "study.yaml",
    "STUDY.yaml": "study.yaml",
    "RANK": "0",
    "ADDRESS": "127.0.0.1",
}
# What `make test` hands on to the make that a test starts.
OF_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV", "SEED", "DEMO_DIR"}
PLACEHOLDER = re.compile(r"(?<!\S)[A-Z][A-Z0-9_]*(\.yaml)?(?!\S)")


# --------------------------------------------------------------------------------------------------- what pages print


def read_pages() -> dict[str, str]:
    return {page: (ROOT / page).read_text() for page in PAGES}


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """The inline code outside of fenced blocks, on one line each."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[str]:
    """Every command: lines of bash blocks (continued ones joined, comments dropped), and inline ones with options or a
    place. An inline script, such as `run_study.py --seeds 0 1`, is one of `examples/`; `ppo|nft` are two commands."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [" ".join(re.sub(r"(^|\s+)#\s.*$", "", line).split()) for line in lines]
    for span in spans(text):
        if span.startswith(PROGRAMS) and not is_mention(span):
            found.append(span)
        elif re.match(r"\w+\.py ", span) and not is_mention(span):
            found.append(f"python examples/{span}")
    return [command for line in found if line for command in alternatives(line)]


def mentions(text: str) -> list[str]:
    """Inline names of verbs, targets and scripts, which say what there is and not what to type."""
    return [span for span in spans(text) if is_mention(span)]


def is_mention(span: str) -> bool:
    """`msrl audit`, `make demo`, `train_ppo.py`, or a script with an option that lacks its value."""
    words = span.split()
    if words[0] in ("msrl", "make"):
        return len(words) == 2
    return re.fullmatch(r"(benchmarks/)?\w+\.py", words[0]) is not None and (
        len(words) == 1 or words[-1].startswith("--")
    )


def alternatives(command: str) -> list[str]:
    """The commands that one with a word such as `ppo|nft` stands for."""
    choice = re.search(r"(?<!\S)\w+(\|\w+)+(?!\S)", command)
    if choice is None:
        return [command]
    return [command[: choice.start()] + word + command[choice.end() :] for word in choice[0].split("|")]


def expressions(text: str) -> list[str]:
    """Inline Python: calls of what the page has introduced."""
    return [span for span in spans(text) if span.startswith(OBJECTS) and span.endswith(")")]


def filled_in(command: str) -> str:
    """The command with the reader's own names in it.

    Raises:
        KeyError: a word in capitals that `WORDS` does not have.
    """
    return PLACEHOLDER.sub(lambda word: WORDS[word[0]], command)


# ------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """How something that is printed is carried out and checked.

    Attributes:
        play: prepares the stage, carries the command out, looks at what it left.
        here: also a fast test, in this process, which spares the seconds that imports take; else by bash alone.
        slow: whether the test by bash is a slow one.
        timeout: seconds for the test by bash.
    """

    play: Callable[["Stage"], None]
    here: bool = False
    slow: bool = True
    timeout: int = 1800


class Stage:
    """A folder that looks like a checkout: its files are links into this one, and what commands write lands in the folder.

    Numbers may be made small in its copies of files, never in the command.

    Attributes:
        folder: where it is, and where the command runs.
        command: what is printed, with names filled in.
        here: whether `carry_out` stays in this process.
        monkeypatch, enter: pytest's fixture, and an exit stack's `enter_context`.
    """

    def __init__(self, folder: Path, command: str, here: bool, monkeypatch, enter: Callable):
        self.folder, self.command, self.here = folder, command, here
        self.monkeypatch, self.enter = monkeypatch, enter
        self.environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        for name in ("examples", "model_cards"):
            self._link(name)
        for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", "README.md"):
            os.symlink(ROOT / name, folder / name)
        monkeypatch.chdir(folder)

    def _link(self, name: str) -> None:
        shutil.copytree(
            ROOT / name, self.folder / name, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
        )

    # ---- preparing

    def write(self, name: str, text: str) -> None:
        """A file of the stage, in the place of a link that may be there."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)

    def replace(self, name: str, changes: Mapping[str, str]) -> None:
        """Texts of a file, each of which must be there once, by others."""
        text = (self.folder / name).read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        self.write(name, text)

    def make_study_small(self, name: str, **changes) -> dict:
        """Tiny networks, few volumes and two steps in a study's YAML file; its data set, stages, method, choices and places
        stay. Returns its fields."""
        study = yaml.safe_load((self.folder / name).read_text())
        small = {**_small(study), **changes}
        self.write(name, yaml.safe_dump(small))
        return small

    def make_release_small(self) -> None:
        """A release of tiny networks with random weights in the place of the embedded one."""
        shutil.rmtree(self.folder / "model_cards" / "phantoms-32")
        write_tiny_release(self.folder / "model_cards" / "phantoms-32")

    def make_defaults_small(self) -> None:
        """Two rollouts of four samples as the default of all trainers that make rollouts, in a copy of the package."""
        self._link("msrl_diffusers")
        self.replace(
            "msrl_diffusers/trainers/online_config.py",
            {
                "max_steps: int = field(default=100,": "max_steps: int = field(default=2,",
                "rollout_batch_size: int = field(default=32,": "rollout_batch_size: int = field(default=4,",
                "num_rollout_batches: int = field(default=4,": "num_rollout_batches: int = field(default=1,",
                "num_inference_steps: int = field(default=25,": "num_inference_steps: int = field(default=4,",
                "train_batch_size: int = field(default=32,": "train_batch_size: int = field(default=4,",
            },
        )
        self.environment["PYTHONPATH"] = str(self.folder)

    def write_checkpoints(self) -> None:
        """P, R3 and R2: a pipeline and two reward models."""
        tiny_pipeline().save_pretrained(self.folder / WORDS["P"])
        VolumeRewardModel(block_out_channels=(8, 8)).save_pretrained(self.folder / WORDS["R3"])
        SliceRewardModel(block_out_channels=(8, 8)).save_pretrained(self.folder / WORDS["R2"])

    def open_hub(self) -> HubServer:
        """A Hub on this machine, which the command will take for the real one."""
        hub = self.enter(HubServer())
        cache = self.folder / "cache"
        self.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        if self.here:
            hub.connect(self.monkeypatch, cache)
        return hub

    def link_environment(self) -> None:
        """`.venv`: the environment of the tests, newer than what the Makefile would build it from."""
        (self.folder / ".venv").mkdir()
        os.symlink(Path(sys.executable).parent, self.folder / ".venv" / "bin")
        (self.folder / ".venv" / ".ready").touch()

    # ---- carrying out

    def carry_out(self) -> str:
        """The command, as it is printed; it must succeed. Its standard output."""
        return self._carry_out_here() if self.here else self.bash(self.command).stdout

    def _carry_out_here(self) -> str:
        """What bash would start, in this process: words are split as bash splits them."""
        words = shlex.split(self.command)
        assert words[0] in ("msrl", "python"), words[0]
        self.monkeypatch.setattr(sys, "argv", words if words[0] == "msrl" else words[1:])
        with redirect_stdout(io.StringIO()) as output:
            if words[0] == "msrl":
                main()
            else:
                runpy.run_path(words[1], run_name="__main__")
        return output.getvalue()

    def bash(self, command: str) -> subprocess.CompletedProcess:
        """A command that must succeed."""
        done = self.try_bash(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def try_bash(self, command: str) -> subprocess.CompletedProcess:
        """A command, whatever comes of it."""
        with self.started(command) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @contextmanager
    def started(self, command: str) -> Iterator[subprocess.Popen]:
        """A command that bash has started in a session of its own; all of it is gone at the end."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        handler = signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # tests in the background ignore it, as would the command
        inherited = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder, env={**inherited, **self.environment, "PATH": programs}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        signal.signal(signal.SIGINT, handler)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def execute(self, **names) -> dict:
        """The Python block, as it is printed, with these names; all names after it."""
        names = {"__name__": "__main__", **names}
        exec(compile(self.command, "<printed>", "exec"), names)
        return names

    def evaluate(self, **names):
        """The value of the expression, with these names."""
        return eval(self.command, names)

    def files(self, name: str) -> set[str]:
        """Names in a folder of the stage."""
        return {path.name for path in (self.folder / name).iterdir()}


ROLLOUT = {
    "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4, "num_inference_steps": 4,
    "report_to": "none",
}  # fmt: skip
DDO = {"num_updates": 1}
FRECHET = {
    "gradient_steps": 2,
    "queue_batches": 2,
    "num_rollout_batches": 1,
    "eval_steps": 1,
    "eval_batches": 1,
    "samplers": [1.0],
}


def _small(study: Mapping) -> dict:
    """The fields of a study, small: networks are replaced but for the heads of reward models, of trainers only sizes are."""
    tiny = {name: value for name, value in tiny_study().items() if name != "mixed_precision"}
    small = dict(study)
    for name, value in tiny.items():
        own = study.get(name)
        if not isinstance(value, dict):
            small[name] = value
        elif "report_to" not in value:  # a network
            small[name] = value | {key: own[key] for key in ("num_heads", "spread_penalty") if key in (own or {})}
        elif name != "downstream" or own:  # a study without it has no such stage
            small[name] = {**(own or {}), **value}
    for method in ("nft", "draft", "frechet", "ddo"):
        if method in study:
            small[method] = {**study[method], **ROLLOUT, **{"frechet": FRECHET, "ddo": DDO}.get(method, {})}
    if "evaluation_per_class" in study:
        small["evaluation_per_class"] = tiny["num_per_class"]
    if "refresh" in study:
        small["refresh"] = {**study["refresh"], "every": 1, "train_batch_size": 4, "report_to": "none"}
    if "validity_floors" in study:  # which networks that learned nothing would not reach
        small["validity_floors"] = {"auc": 0.0, "spearman": -1.0}
    if "num_curve_points" in study:
        small |= {"num_curve_points": 2, "curve_per_class": 3}
    return small
