"""Which weights along a run are kept for the over-optimization curve."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_ppo_trainer import config
from tiny import Brightness, copied, differing, tiny_pipeline

from msrl_diffusers import DiffusionPPOTrainer
from msrl_diffusers.trainers.base import checkpoints
from msrl_diffusers.trainers.snapshots import SnapshotCallback, choose_snapshots, read_snapshots


def run(folder, roots, num_points=3, start=0, max_steps=10_000):
    """The callback's events of a run whose divergences have these square roots, from rollout `start` on. It was to go on for
    much longer, so that no weights are due by their rollouts."""
    callback = SnapshotCallback(folder, num_points)
    model = torch.nn.Linear(1, 1)
    state = SimpleNamespace(global_step=start, is_world_process_zero=True, max_steps=max_steps)
    callback.on_train_begin(None, state, None, model=model)
    for step in range(start, len(roots)):
        state.global_step = step + 1
        with torch.no_grad():
            model.weight.fill_(step + 1)
        callback.on_log(None, state, None, model=model, logs={"step": step + 1, "ppo/kl": roots[step] ** 2})
    callback.on_train_end(None, state, None, model=model)
    return read_snapshots(folder)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_snapshots_stand_at_about_equal_steps(scale, tmp_path):
    found = run(tmp_path, [scale * (step / 100) ** 2 for step in range(101)], num_points=4)
    roots = [snapshot.sqrt_kl for snapshot in found]
    assert 4 <= len(found) <= 9
    assert roots == sorted(roots)
    gaps = [after - before for before, after in pairwise(roots[:-1])]  # the last one stands anywhere
    assert max(gaps) < 3 * min(gaps)
    assert found[-1].rollout == 101
    for snapshot in found:
        weights = load_file(tmp_path / "snapshots" / snapshot.name)
        assert weights["weight"].item() == snapshot.rollout
    assert len(list((tmp_path / "snapshots").glob("*.safetensors"))) == len(found)


def test_a_run_that_goes_on_in_another_folder_takes_its_snapshots_along(tmp_path):
    roots = [0.01 * step for step in range(1, 9)]
    run(tmp_path / "first", roots[:5])
    run(tmp_path / "second", roots[:7])  # of another run, which left them there
    callback, model = SnapshotCallback(tmp_path / "second", 3), torch.nn.Linear(1, 1)
    state = SimpleNamespace(global_step=4, is_world_process_zero=True, max_steps=10_000)
    callback.on_train_begin(None, state, None, model=model, resumed_from=tmp_path / "first")
    found = read_snapshots(tmp_path / "second")
    assert found == [snapshot for snapshot in read_snapshots(tmp_path / "first") if snapshot.rollout <= 4] != []
    for snapshot in found:
        assert load_file(tmp_path / "second" / "snapshots" / snapshot.name)["weight"].item() == snapshot.rollout


def test_a_divergence_that_is_no_number_keeps_nothing_from_its_end(tmp_path):
    assert [snapshot.rollout for snapshot in run(tmp_path, [0.1, float("nan"), float("inf")])] == [1, 3]


def test_a_run_that_stands_still_leaves_its_end(tmp_path):
    assert [snapshot.rollout for snapshot in run(tmp_path, [0.0, 0.0, 0.0])] == [3]


def test_a_divergence_that_falls_back_is_not_taken_twice(tmp_path):
    found = run(tmp_path, [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.3])
    assert [snapshot.rollout for snapshot in found] == [1, 2, 3, 7]


def test_weights_are_due_after_equal_numbers_of_rollouts(tmp_path):
    """Whatever the divergence is said to be: here it is large by chance, once."""
    found = run(tmp_path, [9.0, *[0.01 * step for step in range(1, 20)]], num_points=4, max_steps=20)
    assert [snapshot.rollout for snapshot in found] == [1, 5, 10, 15, 20]


def test_a_new_run_in_a_used_folder_spaces_its_own(tmp_path):
    near = [0.001 * step for step in range(1, 21)]
    run(tmp_path / "used", [10.0 * step for step in range(1, 21)])
    assert run(tmp_path / "used", near) == run(tmp_path / "fresh", near)


@pytest.mark.parametrize("max_steps", [10_000, 80])
@pytest.mark.parametrize("killed_after", [1, 7, 30, 64])
def test_a_resumed_run_keeps_what_an_unbroken_one_does(killed_after, max_steps, tmp_path):
    roots = [0.03 * step**0.7 for step in range(1, 81)]
    whole = run(tmp_path / "whole", roots, max_steps=max_steps)
    killed = SnapshotCallback(tmp_path / "parts", 3)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, max_steps=max_steps)
    killed.on_train_begin(None, state, None)
    for step in range(min(killed_after + 5, 80)):  # it had gone on for a while since its checkpoint
        state.global_step = step + 1
        killed.on_log(None, state, None, model=torch.nn.Linear(1, 1), logs={"ppo/kl": roots[step] ** 2})
    assert run(tmp_path / "parts", roots, start=killed_after, max_steps=max_steps) == whole


def test_points_of_a_curve(tmp_path):
    found = run(tmp_path, [step / 100 for step in range(1, 101)], num_points=5)
    chosen = choose_snapshots(found, 5)
    assert 4 <= len(chosen) <= 6
    assert chosen[-1] == found[-1]
    assert choose_snapshots([], 5) == []


def test_snapshots_of_a_training_are_its_weights(tmp_path):
    pipeline = tiny_pipeline()
    args = config(tmp_path, max_steps=3, save_steps=1, save_total_limit=9)
    DiffusionPPOTrainer(pipeline, Brightness(), args, callbacks=[SnapshotCallback(tmp_path, 2)]).train()
    found = read_snapshots(tmp_path)
    assert found[-1].rollout == 3
    for snapshot in found:
        (path,) = [each for each in checkpoints(tmp_path) if each.name == f"checkpoint-{snapshot.rollout}"]
        assert (
            differing(load_file(tmp_path / "snapshots" / snapshot.name), load_file(path / "model.safetensors")) == []
        )
    assert differing(copied(pipeline.unet), load_file(tmp_path / "snapshots" / found[-1].name)) == []
