import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import Brightness, copied, differing, tiny_pipeline

from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer, MedVolumePipeline
from msrl_diffusers.errors import InputError
from msrl_diffusers.rewards import WeightedSum
from msrl_diffusers.rewards.base import Scale
from msrl_diffusers.rollouts import StepTable, sample_rollout
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.base import checkpoints, read_log


class Contrast:
    """The spread of the sample, on another scale."""

    name = "contrast"
    differentiable = True

    def __call__(self, samples, conditions):
        return 100 * samples.flatten(1).std(dim=1)


class OfClass:
    """Higher for one class than for the other, whatever the sample is."""

    name = "of_class"
    differentiable = False

    def __call__(self, samples, conditions):
        return conditions.float()


class Broken:
    name = "broken_reward"
    differentiable = False

    def __call__(self, samples, conditions):
        return torch.full((len(samples),), float("nan"))


def config(output_dir, **settings):
    return DiffusionPPOConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3,
            "lr_scheduler_type": "constant", "rollout_batch_size": 4, "num_rollout_batches": 2, "train_batch_size": 4,
            "num_inference_steps": 4, "kl_coef": 0.0, **settings,
        }
    )  # fmt: skip


def bright_samples(rollout):
    return rollout.samples.mean().item()


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


def test_an_analytic_reward_rises(tmp_path):
    pipeline = tiny_pipeline()
    before, vqvae = copied(pipeline.unet), copied(pipeline.vqvae)
    args = config(tmp_path, max_steps=10, rollout_batch_size=32, train_batch_size=32, learning_rate=5e-3)
    trainer = DiffusionPPOTrainer(pipeline, Brightness(), args)
    figures = trainer.train()
    history = read_log(tmp_path)
    assert [line["step"] for line in history] == list(range(1, 11))
    # rewards are standardised on the first rollout: this is a rise by one standard deviation of the pretrained model
    assert abs(history[0]["reward/mean"]) < 1e-4
    assert history[-1]["reward/mean"] > 1
    assert history[-1]["reward/brightness"] > history[0]["reward/brightness"]
    assert history[0]["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert abs(history[0]["ppo/kl"]) < 1e-6
    assert history[-1]["ppo/kl"] > 100 * abs(history[0]["ppo/kl"])
    assert figures["rollouts"] == 10
    assert figures["stopped"] is None
    assert set(differing(before, copied(pipeline.unet))) == {name for name, _ in pipeline.unet.named_parameters()}
    assert differing(vqvae, copied(pipeline.vqvae)) == []
    generators = sample_generators(9, "test", range(8))
    tuned = pipeline([0, 1] * 4, 4, generator=generators).volumes.mean()
    untuned = tiny_pipeline()([0, 1] * 4, 4, generator=sample_generators(9, "test", range(8))).volumes.mean()
    assert tuned > untuned


def test_the_leash_holds(tmp_path):
    kl = {}
    for name, settings in (("free", {}), ("held", {"kl_coef": 10.0})):
        args = config(
            tmp_path / name, max_steps=6, rollout_batch_size=16, train_batch_size=16, learning_rate=3e-3, **settings
        )
        DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args).train()
        kl[name] = read_log(tmp_path / name)[-1]["ppo/kl"]
    assert 0 < kl["held"] < 0.5 * kl["free"]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_first_ratio_is_one_and_forwards_are_counted(guidance_scale, tmp_path):
    args = config(tmp_path, max_steps=1, guidance_scale=guidance_scale, timestep_fraction=0.5)
    trainer = DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args)
    trainer.train()
    (line,) = read_log(tmp_path)
    assert line["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert line["ppo/ratio_deviation"] < 1e-6
    assert (line["ppo/clip_fraction_high"], line["ppo/clip_fraction_low"]) == (0, 0)
    factor = 1 if guidance_scale == 1.0 else 2
    # sampling; two trained steps of three passes; the reference on one watched sample
    assert trainer.unet_forwards == factor * (8 * 4 + 8 * 2 * 3 + 1 * 2)


def test_two_updates_per_rollout_move_the_ratio(tmp_path):
    args = config(tmp_path, max_steps=1, num_updates=2, learning_rate=1e-2)
    trainer = DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args)
    trainer.train()
    (line,) = read_log(tmp_path)
    assert line["ppo/ratio_deviation"] > 1e-6


def test_what_differs_between_classes_alone_is_not_learned(tmp_path):
    """Advantages are within a class."""
    DiffusionPPOTrainer(tiny_pipeline(), OfClass(), config(tmp_path, max_steps=1, kl_coef=0.0)).train()
    (line,) = read_log(tmp_path)
    assert line["reward/std"] > 0
    assert line["ppo/grad_norm"] == 0


def test_every_rollout_draws_the_steps_it_trains_anew(tmp_path):
    drawn = []

    class Noting(DiffusionPPOTrainer):
        def _update(self, run, weights, table, rollout, trained):
            drawn.append(tuple(trained))
            super()._update(run, weights, table, rollout, trained)

    Noting(tiny_pipeline(), Brightness(), config(tmp_path, max_steps=6, timestep_fraction=0.5)).train()
    assert len(drawn) == 6
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("kl_coef", [0.0, 3e5])
def test_updates_are_the_same_with_either_reduction(kl_coef, tmp_path):
    """At ratios of (nearly) one the gradients are parallel, and AdamW does not care for their length. The KL term has one from
    the second update on."""

    def trained(reduction, **settings):
        pipeline = tiny_pipeline()
        args = config(
            tmp_path / f"{reduction}-{settings}", max_steps=1, log_prob_reduction=reduction, max_grad_norm=1e-3,
            num_updates=2, learning_rate=1e-6, **settings,
        )  # fmt: skip
        DiffusionPPOTrainer(pipeline, Brightness(), args).train()
        return torch.cat([value.flatten() for value in pipeline.unet.state_dict().values()])

    start = torch.cat([value.flatten() for value in tiny_pipeline().unet.state_dict().values()])
    mean, total, free = (
        trained(reduction, kl_coef=coef) for reduction, coef in (("mean", kl_coef), ("sum", kl_coef), ("mean", 0.0))
    )
    moved, apart = (mean - start).abs().mean(), (mean - total).abs().mean()
    assert apart < 0.02 * moved
    assert kl_coef == 0 or (mean - free).abs().mean() > 0.1 * moved


def run(output_dir, max_steps, **settings):
    pipeline = tiny_pipeline()
    args = config(output_dir, max_steps=max_steps, save_steps=2, reward_weights=[0.7, 0.3], **settings)
    trainer = DiffusionPPOTrainer(
        pipeline, [Brightness(), Contrast()], args, watchdogs={"bright": bright_samples}, select_by="bright"
    )
    figures = trainer.train()
    return trainer, figures, copied(pipeline.unet)


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_rank": 2}, {"num_updates": 2, "kl_coef": 0.1}])
def test_resume_is_exact(settings, tmp_path):
    whole, figures, weights = run(tmp_path / "whole", 4, **settings)
    run(tmp_path / "parts", 2, **settings)
    resumed, resumed_figures, resumed_weights = run(tmp_path / "parts", 4, resume_from_checkpoint="latest", **settings)
    assert differing(weights, resumed_weights) == []
    assert whole.reward.scales == resumed.reward.scales
    assert set(whole.reward.scales) == {"brightness", "contrast"}
    assert whole.unet_forwards == resumed.unet_forwards > 0
    assert timeless([figures]) == timeless([resumed_figures])
    assert timeless(read_log(tmp_path / "whole")) == timeless(read_log(tmp_path / "parts"))
    assert [line["step"] for line in read_log(tmp_path / "parts")] == [1, 2, 3, 4]
    states = [
        json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text()) for name in ("whole", "parts")
    ]
    assert states[0] == states[1]
    assert {"best_figure", "best_step", "scales", "unet_forwards"} <= set(states[0]["state"])
    models = [load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "parts")]
    assert differing(*models) == []


def test_a_run_goes_on_elsewhere_with_the_best_weights_of_its_checkpoint(tmp_path):
    """They lay beside the checkpoint only, and the log did too."""
    _, figures, weights = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    checkpoint = str(tmp_path / "parts/checkpoint-2")
    _, resumed_figures, resumed_weights = run(tmp_path / "elsewhere", 4, resume_from_checkpoint=checkpoint)
    assert differing(weights, resumed_weights) == []
    assert timeless([figures]) == timeless([resumed_figures])
    assert timeless(read_log(tmp_path / "whole")) == timeless(read_log(tmp_path / "elsewhere"))


def test_conditions_that_a_rollout_has_once_are_refused(tmp_path):
    args = config(tmp_path, rollout_batch_size=2, num_rollout_batches=1, train_batch_size=2)
    trainer = DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args)
    with pytest.raises(InputError, match="A rollout of 2 samples has 2 different conditions, each once"):
        trainer.train()


def test_classes_may_be_named(tmp_path):
    trainer = DiffusionPPOTrainer(tiny_pipeline(), Brightness(), config(tmp_path), train_conditions=["LGG", "HGG"])
    assert trainer.conditions.values == [1, 0]


def test_weights_beside_a_weighted_sum_are_refused(tmp_path):
    total = WeightedSum([Brightness(), Contrast()])
    with pytest.raises(InputError, match="reward_weights are given beside a WeightedSum"):
        DiffusionPPOTrainer(tiny_pipeline(), total, config(tmp_path, reward_weights=[1.0, 2.0]))
    with pytest.raises(InputError, match="2 rewards need as many weights, got 1"):
        DiffusionPPOTrainer(tiny_pipeline(), [Brightness(), Contrast()], config(tmp_path, reward_weights=[1.0]))


def saved_scales(checkpoint):
    scales = json.loads((checkpoint / "trainer_state.json").read_text())["state"]["scales"]
    return {name: Scale(**scale) for name, scale in scales.items()}


def test_a_weighted_sum_is_standardized_by_every_training_of_its_own(tmp_path):
    total, scales = WeightedSum([Brightness(), Contrast()]), []
    for seed in (0, 1):
        trainer = DiffusionPPOTrainer(tiny_pipeline(seed), total, config(tmp_path / str(seed), save_steps=2))
        trainer.train()
        scales.append(trainer.reward.scales)
        assert abs(read_log(tmp_path / str(seed))[0]["reward/mean"]) < 1e-4
        assert saved_scales(tmp_path / str(seed) / "checkpoint-2") == scales[-1]
    assert scales[0] != scales[1]
    assert total.scales == {}


def test_scales_that_were_given_are_kept(tmp_path):
    given = {"brightness": Scale(0.5, 2.0), "contrast": Scale(3.0, 50.0)}
    for max_steps in (1, 2):
        total = WeightedSum([Brightness(), Contrast()], scales=given)
        args = config(tmp_path, max_steps=max_steps, save_steps=1, resume_from_checkpoint="latest")
        trainer = DiffusionPPOTrainer(tiny_pipeline(), total, args)
        trainer.train()
        assert trainer.reward.scales == given == saved_scales(tmp_path / f"checkpoint-{max_steps}")


def test_lora_trains_the_adapter_alone_and_is_fused(tmp_path):
    pipeline = tiny_pipeline()
    before = copied(pipeline.unet)
    args = config(tmp_path / "run", max_steps=3, use_lora=True, lora_rank=1, learning_rate=1e-2, save_steps=3)
    trainer = DiffusionPPOTrainer(pipeline, Brightness(), args)
    trained = [name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    trainer.train()
    history = read_log(tmp_path / "run")
    assert history[0]["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert abs(history[0]["ppo/kl"]) < 1e-9
    assert history[-1]["ppo/kl"] > 1e-8

    after = copied(pipeline.unet)
    changed = differing(before, after)
    assert changed
    assert all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0", "conv1", "conv2") for name in changed)
    assert not any("bias" in name for name in changed)
    (matrix, *_) = [name for name in changed if "to_q" in name]
    assert torch.linalg.matrix_rank(after[matrix] - before[matrix], rtol=1e-3) == 1  # the rank of the adapter
    checkpoint = load_file(tmp_path / "run/checkpoint-3/model.safetensors")
    base = {name.replace(".base_layer", ""): value for name, value in checkpoint.items() if "lora" not in name}
    assert differing(base, before) == []

    pipeline.save_pretrained(tmp_path / "saved")
    loaded = MedVolumePipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert differing(copied(loaded.unet), after) == []
    tuned, again, original = (
        one([0, 1], 3, generator=sample_generators(0, "test", [0, 1]), output_type="latent").volumes
        for one in (pipeline, loaded, tiny_pipeline())
    )
    torch.testing.assert_close(tuned, again)
    assert not torch.allclose(tuned, original, atol=1e-3)


def test_the_kl_budget_stops(tmp_path):
    args = config(tmp_path, max_steps=8, kl_budget=1e-6, learning_rate=3e-3)
    figures = DiffusionPPOTrainer(tiny_pipeline(), Brightness(), args).train()
    history = read_log(tmp_path)
    assert "kl_budget=1e-06" in figures["stopped"]
    assert figures["rollouts"] == len(history) == 2
    assert history[0]["ppo/kl"] < 1e-6 < history[1]["ppo/kl"]


def test_patience_stops_and_the_best_weights_are_kept(tmp_path):
    scripted = iter([1.0, 3.0, 2.0, 1.0, 9.0])
    pipeline = tiny_pipeline()
    args = config(tmp_path, max_steps=8, patience=2, save_steps=1, save_total_limit=9)
    trainer = DiffusionPPOTrainer(
        pipeline, Brightness(), args, watchdogs={"scripted": lambda rollout: next(scripted)}, select_by="scripted"
    )
    figures = trainer.train()
    assert (figures["rollouts"], figures["step"], figures["watch/scripted"]) == (4, 2, 3.0)
    assert "not improved" in figures["stopped"]
    # the second rollout (figure 3.0) was sampled with the weights after one update
    states = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]
    assert len(states) == 4
    assert differing(copied(pipeline.unet), states[0]) == []
    assert differing(copied(pipeline.unet), states[-1])
    assert next(scripted) == 9.0


def test_without_selection_the_last_weights_are_kept(tmp_path):
    pipeline = tiny_pipeline()
    args = config(tmp_path, max_steps=2, save_steps=1)
    DiffusionPPOTrainer(pipeline, Brightness(), args, watchdogs={"bright": bright_samples}).train()
    assert differing(copied(pipeline.unet), load_file(tmp_path / "checkpoint-2/model.safetensors")) == []
    assert all("watch/bright" in line for line in read_log(tmp_path))
    assert not pipeline.unet.training


def test_dropout_is_explained(tmp_path):
    pipeline = tiny_pipeline(dropout=0.5)
    pipeline.unet.train()
    with pytest.raises(RuntimeError, match=r"ratio of new to old policy deviates from 1 .*dropout"):
        DiffusionPPOTrainer(pipeline, Brightness(), config(tmp_path)).train()


def test_an_unknown_selection_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"select_by='dark' is no watchdog; there are \['bright'\]"):
        DiffusionPPOTrainer(
            tiny_pipeline(), Brightness(), config(tmp_path), watchdogs={"bright": bright_samples}, select_by="dark"
        )


def test_an_indivisible_batch_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"12 samples .*rollout_batch_size=4 x num_rollout_batches=3.*train_batch_size=5"
    ):
        config(tmp_path, num_rollout_batches=3, train_batch_size=5)
    with pytest.raises(InputError, match=r"8 samples .* into 3 updates"):
        config(tmp_path, num_updates=3, train_batch_size=4)


def test_a_reward_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="'broken_reward' gave 4 values that are not finite"):
        DiffusionPPOTrainer(tiny_pipeline(), Broken(), config(tmp_path, num_rollout_batches=1)).train()


def test_as_many_weights_as_rewards(tmp_path):
    with pytest.raises(ValueError, match="1 rewards need as many weights, got 2"):
        DiffusionPPOTrainer(tiny_pipeline(), Brightness(), config(tmp_path, reward_weights=[0.5, 0.5]))


def test_a_sampler_without_noise_is_explained(tmp_path):
    with pytest.raises(ValueError, match="min_std"):
        DiffusionPPOTrainer(tiny_pipeline(), Brightness(), config(tmp_path, min_std=100.0)).train()


def test_samples_do_not_depend_on_the_size_of_rollout_batches(tmp_path):
    pipelines = tiny_pipeline(), tiny_pipeline()
    for pipeline, size in zip(pipelines, (4, 8), strict=True):
        args = config(tmp_path / str(size), max_steps=1, rollout_batch_size=size, num_rollout_batches=8 // size)
        DiffusionPPOTrainer(pipeline, Brightness(), args).train()
    histories = [read_log(tmp_path / str(size)) for size in (4, 8)]
    assert histories[0][0]["reward/brightness"] == pytest.approx(histories[1][0]["reward/brightness"], abs=1e-6)
    assert histories[0][0]["reward/std"] == pytest.approx(histories[1][0]["reward/std"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_conditions_by_name_train_as_those_by_number(batch_size, tmp_path):
    weights = []
    for conditions in ([0, 1], ["HGG", "LGG"]):
        pipeline = tiny_pipeline()
        args = config(
            tmp_path / str(conditions[0]),
            max_steps=1,
            rollout_batch_size=batch_size,
            num_rollout_batches=8 // batch_size,
        )
        DiffusionPPOTrainer(pipeline, Brightness(), args, train_conditions=conditions).train()
        weights.append(copied(pipeline.unet))
    assert differing(*weights) == []


def test_the_policy_trained_is_the_pipeline_s(tmp_path):
    """What the trainer rolls out afterwards is what the pipeline samples."""
    pipeline = tiny_pipeline()
    trainer = DiffusionPPOTrainer(pipeline, Brightness(), config(tmp_path))
    trainer.train()
    table = StepTable.of(pipeline.scheduler, 4, 1.0, 1e-6)
    rollout = sample_rollout(trainer.policy, [0, 1], table, sample_generators(0, "test", [0, 1]))
    expected = pipeline([0, 1], 4, generator=sample_generators(0, "test", [0, 1])).volumes
    torch.testing.assert_close(rollout.samples, expected, atol=1e-4, rtol=1e-3)
