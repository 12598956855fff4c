"""A PPO run that is killed, and one that is split over processes, end where an undisturbed one does.

Killed: bit for bit. Split: gradients to 1e-3 of their largest element, for sums over samples come in another order.
"""

import random
from pathlib import Path

import pytest
from launching import assert_ended_alike, assert_same_figures, assert_same_gradients, die, finish
from safetensors.torch import load_file
from tiny import differing

from msrl_diffusers.trainers.base import checkpoints, read_log


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "ppo_run.py"
KILLS = 10
FORWARDS_PER_STEP = (
    3 * 2 + 2 * 2 * 2 + 2
)  # sampling; two steps trained in two batches with the reference; the watchdog


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_a_run_killed_ten_times_ends_with_the_same_weights(lora, tmp_path):
    finish(SCRIPT, tmp_path / "whole", *lora)
    moments, draw = set(), random.Random(0)
    for number in range(KILLS):
        moment = ("forward", "forward", "saving", "saved")[number % 4]
        count = draw.randint(1, 2 * FORWARDS_PER_STEP) if moment == "forward" else 1
        die(SCRIPT, tmp_path / "killed", *lora, "--kill_at", moment, count)
        moments.add(moment)
    assert moments == {"forward", "saving", "saved"}
    assert checkpoints(tmp_path / "killed")
    finish(SCRIPT, tmp_path / "killed", *lora)
    assert_ended_alike(tmp_path / "whole", tmp_path / "killed")
    assert [line["epoch"] for line in read_log(tmp_path / "killed")] == list(range(1, 13))


@pytest.fixture(scope="module", params=[[], ["--lora"]], ids=["full", "lora"])
def runs(request, tmp_path_factory):
    """Folders of the same run by one process, by two, by two whose gradients are not reduced, and by two that share the
    weights (FSDP)."""
    folder = tmp_path_factory.mktemp("runs")
    variants = {"one": (1, []), "two": (2, []), "unreduced": (2, ["--without_reduction"])}
    if not request.param:  # LoRA is not sharded
        variants["sharded"] = (2, ["--fsdp"])
    for name, (processes, extra) in variants.items():
        finish(SCRIPT, folder / name, "--steps", 3, *request.param, *extra, processes=processes)
    return folder


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_give_the_rewards_and_gradients_of_one(runs, name):
    if not (runs / name).exists():
        pytest.skip("LoRA is not sharded")
    figures = ("reward/mean", "reward/std", "reward/brightness", "ppo/kl", "ppo/kl_coef", "watch/bright",
               "watch/frechet")  # fmt: skip
    assert_same_figures(runs / "one", runs / name, figures)
    assert_same_gradients(runs / "one", runs / name)


def test_without_reduction_the_processes_part(runs):
    """What this guards against: a trainer that calls the denoiser itself, not the module accelerate prepared."""
    ranks = [load_file(runs / f"unreduced/gradients-{rank}.safetensors") for rank in (0, 1)]
    assert differing(*ranks)
    single, half = load_file(runs / "one/gradients-0.safetensors"), ranks[0]
    apart = sum((half[name] - value).abs().sum().item() for name, value in single.items())
    assert apart > 0.1 * sum(value.abs().sum().item() for value in single.values())
