"""What holds for every trainer: all weights trained, exact resumption, checkpoints, accumulation, precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from launching import interrupted_when_saving
from safetensors.torch import load_file
from tiny import copied, differing
from trainers_scene import build

from msrl_diffusers.errors import InputError
from msrl_diffusers.models.layers import conv
from msrl_diffusers.precision import resolve_precision
from msrl_diffusers.seeding import batch_indices
from msrl_diffusers.trainers.base import TrainingRun, checkpoints, in_fast_memory_format, read_log
from msrl_diffusers.trainers.base_config import TrainingConfig


NAMES = [
    "vqgan",
    "vqgan-fsq",
    "diffusion",
    "features-slice",
    "features-volume",
    "features-patch",
    "reward-volume",
    "reward-slice",
]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_change_every_parameter(name, tmp_path):
    trainer, module = build(name, tmp_path, max_steps=2)
    before = copied(module)
    figures = trainer.train()
    assert figures
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
    unchanged = [key for key, value in module.named_parameters() if torch.equal(value, before[key])]
    assert unchanged == []


@pytest.mark.parametrize("name", ["vqgan", "diffusion", "features-slice", "reward-volume"])
def test_frozen_weights_are_trained_too(name, tmp_path):
    """An adapter that was merged leaves a denoiser so, and who has frozen an extractor for its use may train it again."""
    trainer, module = build(name, tmp_path, max_steps=2)
    getattr(module, "extractor", module).requires_grad_(False)  # the heads of a new training are new
    before = copied(module)
    trainer.train()
    assert [key for key, value in module.named_parameters() if torch.equal(value, before[key])] == []


@pytest.mark.parametrize("name", ["vqgan", "diffusion", "features-slice", "reward-volume"])
def test_of_weights_that_are_partly_frozen_the_others_alone_are_trained(name, tmp_path):
    trainer, module = build(name, tmp_path, max_steps=2)
    network = module["model"] if name == "vqgan" else getattr(module, "extractor", module)
    first = next(network.parameters()).requires_grad_(False)
    before = first.clone()
    others = copied(network)
    trainer.train()
    assert torch.equal(first, before)
    assert differing(others, copied(network))


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name, tmp_path):
    trainer, module = build(name, tmp_path / "whole", max_steps=4, save_steps=2)
    figures = trainer.train()
    first, _ = build(name, tmp_path / "parts", max_steps=2, save_steps=2)
    first.train()
    second, resumed = build(name, tmp_path / "parts", max_steps=4, save_steps=2, resume_from_checkpoint="latest")
    initial = copied(resumed)
    resumed_figures = second.train()
    assert differing(copied(resumed), copied(module)) == []
    assert differing(initial, copied(resumed))
    histories = [read_log(tmp_path / folder) for folder in ("whole", "parts")]
    for history in histories:
        assert [line["step"] for line in history] == [1, 2, 3, 4]
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in h] for h in histories]
    assert without_time[0] == without_time[1]
    timeless = [{k: v for k, v in f.items() if k != "seconds"} for f in (figures, resumed_figures)]
    assert timeless[0] == timeless[1]


def test_a_resumed_run_has_the_learning_rate_of_its_config(tmp_path):
    """Who resumes a run that diverged wants a lower one."""
    settings = {"lr_scheduler_type": "cosine", "max_steps": 4}
    build("reward-volume", tmp_path / "whole", **settings, save_steps=2)[0].train()
    start = load_file(tmp_path / "whole/checkpoint-2/model.safetensors")
    moved = {}
    for rate in (1e-3, 1e-5):
        trainer, module = build(
            "reward-volume", tmp_path / str(rate), **settings, learning_rate=rate, weight_decay=0.0,
            resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"),
        )  # fmt: skip
        trainer.train()
        moved[rate] = sum((value - start[key]).abs().sum().item() for key, value in module.named_parameters())
    assert moved[1e-5] == pytest.approx(0.01 * moved[1e-3], rel=0.2)  # Adam's steps are as long as the rate


def test_a_resumed_average_has_the_decay_of_its_config(tmp_path):
    build("diffusion", tmp_path / "whole", max_steps=4, save_steps=2)[0].train()
    weights = []
    for decay in (0.1, 0.9):
        trainer, module = build(
            "diffusion", tmp_path / str(decay), max_steps=4, ema_decay=decay, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2")
        )  # fmt: skip
        trainer.train()
        weights.append(copied(module))
    assert differing(*weights)


def test_figures_since_the_last_log_line_survive_a_kill(tmp_path):
    build("reward-volume", tmp_path / "whole", max_steps=4, logging_steps=4)[0].train()
    settings = {"max_steps": 4, "logging_steps": 4, "save_steps": 3, "resume_from_checkpoint": "latest"}
    killed, _ = build("reward-volume", tmp_path / "parts", **settings)
    with interrupted_when_saving():
        killed.train()
    assert read_log(tmp_path / "parts") == []
    build("reward-volume", tmp_path / "parts", **settings)[0].train()
    (one,), (other,) = (read_log(tmp_path / folder) for folder in ("whole", "parts"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_memory_format_is_the_fast_one_of_the_precision(spatial_dims):
    """On a CPU: channels-last in float32, contiguous in bfloat16, whatever the module came in."""
    module = torch.nn.Sequential(conv(spatial_dims, 2, 4, 3), torch.nn.Linear(4, 4))
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial_dims]
    for precision, wanted in (("no", last), ("bf16", torch.contiguous_format), ("no", last)):
        before = copied(module)
        assert in_fast_memory_format(module, precision) is module
        assert module[0].weight.is_contiguous(memory_format=wanted)
        assert not differing(before, copied(module))
    native = resolve_precision("auto", "cpu") == "bf16"
    in_fast_memory_format(module, "auto")
    assert module[0].weight.is_contiguous() == native


def test_no_checkpoint_lies_within_an_accumulation(tmp_path):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 3, "save_steps": 2}
    whole, module = build("reward-volume", tmp_path / "whole", **settings)
    whole.train()
    assert [path.name for path in checkpoints(tmp_path / "whole")] == ["checkpoint-3", "checkpoint-6"]
    again, resumed = build(
        "reward-volume", tmp_path / "parts", **settings, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3")
    )
    again.train()
    assert differing(copied(module), copied(resumed)) == []


def test_what_ends_a_step_besides_does_not_undo_a_binding_end(tmp_path):
    run = TrainingRun(TrainingConfig(str(tmp_path), max_steps=4, report_to="none"), "ending")
    for _ in run.steps():
        run.stop("a limit")
        run.stop("the gradient is not finite", binding=False)
        run.save_checkpoint()
    assert run.stopped == "a limit"
    state = json.loads((tmp_path / "checkpoint-0" / "trainer_state.json").read_text())
    assert state["stopped"] == "a limit"


def test_the_optimizer_has_the_settings_of_the_run(tmp_path):
    settings = {"learning_rate": 3e-4, "adam_beta1": 0.7, "adam_beta2": 0.8, "weight_decay": 0.3}
    run = TrainingRun(TrainingConfig(str(tmp_path), report_to="none", **settings), "optimizer")
    (group,) = run.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.7, 0.8), 0.3)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_schedule_warms_up(schedule, tmp_path):
    run = TrainingRun(
        TrainingConfig(str(tmp_path), lr_scheduler_type=schedule, warmup_steps=4, report_to="none"), "warming up"
    )
    optimizer = run.optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler, rates = run.lr_scheduler(optimizer, 100), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.25e-4, 0.5e-4, 0.75e-4, 1e-4])


def test_the_denoiser_learns_the_same_whatever_sampler_its_pipeline_has(tmp_path):
    weights = []
    for scheduler_class in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        trainer, module = build("diffusion", tmp_path / scheduler_class.__name__, max_steps=2)
        trainer.pipeline.scheduler = scheduler_class.from_config(trainer.pipeline.scheduler.config)
        trainer.pipeline.scheduler.set_timesteps(4)
        trainer.train()
        weights.append(copied(module))
    assert differing(weights[0], weights[1]) == differing(weights[0], weights[2]) == []


def test_another_seed_gives_another_training(tmp_path):
    one, other = (build("reward-volume", tmp_path / str(seed), max_steps=2, seed=seed) for seed in (0, 1))
    for trainer, _ in (one, other):
        trainer.train()
    assert differing(copied(one[1]), copied(other[1]))


def test_a_named_checkpoint_is_resumed_and_later_history_dropped(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=4, save_steps=1, save_total_limit=4)
    trainer.train()
    again, resumed = build(
        "reward-volume", tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("earlier", [None, "checkpoint-1"])
def test_a_used_folder_keeps_the_new_run_s_checkpoints(earlier, tmp_path):
    """The old ones past its start would be kept in their place, as the higher numbers, and resumed as the latest."""
    settings = {"save_steps": 1, "save_total_limit": 2}
    build("reward-volume", tmp_path / "old", **{**settings, "max_steps": 4, "save_total_limit": 4})[0].train()
    build("reward-volume", tmp_path / "old", max_steps=1)[0].train()
    assert len(checkpoints(tmp_path / "old")) == 4  # a run that writes none takes none away
    shutil.copytree(tmp_path / "old/checkpoint-3", tmp_path / "old/checkpoint-3-kept")
    path = earlier and str(tmp_path / "old" / earlier)
    again, module = build(
        "reward-volume", tmp_path / "old", **settings, max_steps=2, seed=1, resume_from_checkpoint=path
    )
    again.train()
    assert [path.name for path in checkpoints(tmp_path / "old")] == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "old/checkpoint-3-kept/trainer_state.json").is_file()
    latest, resumed = build(
        "reward-volume", tmp_path / "old", **settings, max_steps=2, seed=1, resume_from_checkpoint="latest"
    )
    latest.train()
    assert differing(copied(module), copied(resumed)) == []


def test_the_latest_checkpoint_of_a_run_that_wrote_none_is_refused(tmp_path):
    """A first start is fine, and so is another where checkpoints will be: only a log that would be lost in vain is not."""
    settings = {"max_steps": 1, "resume_from_checkpoint": "latest"}
    build("reward-volume", tmp_path, **settings)[0].train()
    before = read_log(tmp_path)
    trainer, _ = build("reward-volume", tmp_path, **settings)
    with pytest.raises(InputError, match='resume_from_checkpoint="latest" needs checkpoints, so set save_steps'):
        trainer.train()
    assert read_log(tmp_path) == before != []
    build("reward-volume", tmp_path, **settings, save_steps=1)[0].train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_finished_training_resumes_to_its_result(tmp_path):
    trainer, module = build("reward-volume", tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    again, resumed = build("reward-volume", tmp_path, max_steps=2, save_steps=2, resume_from_checkpoint="latest")
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=12, save_steps=1, save_total_limit=3)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    assert len(list(tmp_path.glob("*checkpoint*"))) == 3


def test_a_limit_of_no_checkpoints_does_not_keep_all(tmp_path):
    try:
        trainer, _ = build("reward-volume", tmp_path, max_steps=3, save_steps=1, save_total_limit=0)
    except InputError:
        return
    trainer.train()
    assert checkpoints(tmp_path) == []


def test_what_a_killed_run_left_is_ignored(tmp_path):
    trainer, module = build("reward-volume", tmp_path / "clean", max_steps=3, save_steps=2)
    trainer.train()
    folder = tmp_path / "killed"
    for name in (".checkpoint-2.tmp", ".checkpoint-3.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "trainer_state.json").write_text(json.dumps({"step": 2, "state": {}}))
    (folder / "checkpoint-7").mkdir()  # no state: not whole
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    again, resumed = build("reward-volume", folder, max_steps=3, save_steps=2, resume_from_checkpoint="latest")
    again.train()
    assert differing(copied(module), copied(resumed)) == []
    assert [line["step"] for line in read_log(folder)] == [1, 2, 3]
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / ".checkpoint-2.tmp").exists()


@pytest.mark.parametrize("wanted", ["checkpoint-9", "."])
def test_a_checkpoint_that_is_not_there_is_refused(wanted, tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, resume_from_checkpoint=str(tmp_path / wanted))
    with pytest.raises(InputError, match="is not a checkpoint of this trainer"):
        trainer.train()


@pytest.mark.parametrize("name", ["vqgan", "diffusion", "features-slice", "reward-volume"])
def test_accumulated_gradients_update_less_often(name, tmp_path):
    """What is left over at the end neither moves the weights, nor waits for the next training of them."""
    weights = []
    for steps in (2, 3):
        trainer, module = build(name, tmp_path / str(steps), max_steps=steps, gradient_accumulation_steps=2)
        before = copied(module)
        trainer.train()
        parameters = dict(module.named_parameters())
        weights.append({key: value.detach() for key, value in parameters.items()})
        assert all(parameter.grad is None for parameter in parameters.values())
    assert not differing(*weights)
    assert set(differing(before, copied(module))) >= set(parameters)


def test_half_the_batch_twice_is_the_whole_batch(tmp_path):
    whole = build("reward-volume", tmp_path / "whole", max_steps=1, train_batch_size=4, max_shift=0)
    halves = build(
        "reward-volume",
        tmp_path / "halves",
        max_steps=2,
        train_batch_size=2,
        max_shift=0,
        gradient_accumulation_steps=2,
    )
    for _, module in (whole, halves):  # batch normalization sees batches, not updates
        module.network.norm_out = torch.nn.Identity()
    before = copied(whole[1])
    for trainer, _ in (whole, halves):  # flips are drawn per step: without left and right there is nothing to flip
        data = trainer.data.pixel_values
        data.copy_((data + data.flip(-1)) / 2)
        trainer.train()
    one, other = copied(whole[1]), copied(halves[1])
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)  # a wrong mean moves Adam by 2e-3
    assert differing(before, one)


def test_discriminators_accumulate_gradients_too(tmp_path):
    weights = []
    for name in ("same", "other"):
        trainer, module = build(
            "vqgan-fsq", tmp_path / name, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-12
        )
        first = batch_indices(len(trainer.train_dataset), 2, 0, 0)
        assert not set(first.tolist()) & set(batch_indices(len(trainer.train_dataset), 2, 0, 1).tolist())
        if name == "other":  # only the first of the two accumulated batches sees a difference
            trainer.train_dataset.pixel_values[first] = -trainer.train_dataset.pixel_values[first]
        trainer.train()
        weights.append(copied(module["discriminators"]))
    assert differing(*weights)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vqgan", "model"),
        ("vqgan", "discriminators"),
        ("diffusion", ""),
        ("features-slice", ""),
        ("reward-volume", ""),
    ],
)
def test_a_gradient_that_is_not_finite_ends_it_with_the_checkpoint_before(name, part, tmp_path):
    """Weights that took it never recover, and would replace the last good ones."""
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    trainer, module = build(name, tmp_path, **settings)
    parameter = next(value for key, value in module.named_parameters() if key.startswith(part))
    before = []

    def broken_in_the_second(gradient):
        before.append(parameter.detach().clone())
        return gradient * torch.inf if len(before) == 2 else gradient

    parameter.register_hook(broken_in_the_second)
    with pytest.raises(InputError, match=r"the gradient of step 2 is not finite, so .* with a lower learning_rate"):
        trainer.train()
    assert torch.equal(parameter, before[1])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    resumed, module = build(name, tmp_path, resume_from_checkpoint="latest", **settings)
    resumed.train()
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("name", ["vqgan", "diffusion", "features-slice", "reward-volume"])
def test_pretraining_is_not_sharded(name, tmp_path, monkeypatch):
    """What it saves at the end would be the shares of the processes."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    trainer, module = build(name, tmp_path, max_steps=1)
    before = copied(module)
    with pytest.raises(InputError, match="FSDP shards the denoiser that is tuned, and can't be used in pretraining"):
        trainer.train()
    assert differing(before, copied(module)) == []


def test_trainings_of_different_precision_in_one_process(tmp_path):
    for precision in ("no", "bf16", "no"):
        trainer, module = build("reward-volume", tmp_path / precision, max_steps=1, mixed_precision=precision)
        trainer.train()
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        output = module(torch.rand(1, 1, 16, 16, 16))  # the wrapper of mixed precision is gone
        assert output.dtype == torch.float32


def test_tensorboard_gets_the_figures(tmp_path):
    trainer, _ = build("reward-volume", tmp_path, max_steps=1, report_to="tensorboard")
    trainer.train()
    assert list(Path(tmp_path).rglob("events.out.tfevents*"))
