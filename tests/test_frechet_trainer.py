"""The Frechet trainer: its gradient, what it learns, when it stops, and that a resume is exact."""

import json
import math
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tiny import copied, differing, tiny_phantoms, tiny_pipeline, tiny_stable_diffusion
from transformers import TrainerCallback

from msrl_diffusers import SliceFeatureExtractor, VolumeFeatureExtractor
from msrl_diffusers.arguments import parse
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.features import extract_features
from msrl_diffusers.evaluation.fidelity import frechet_distance
from msrl_diffusers.functional.frechet import frechet_loss
from msrl_diffusers.seeding import sample_generators
from msrl_diffusers.trainers.base import checkpoints, read_log
from msrl_diffusers.trainers.frechet_config import FrechetConfig
from msrl_diffusers.trainers.frechet_trainer import FrechetTrainer
from msrl_diffusers.trainers.gradient_steps import GradientSteps


REAL = tiny_phantoms(6)


def label_extractor():
    torch.manual_seed(0)
    return SliceFeatureExtractor(block_out_channels=(8, 8), num_features=3, num_slices=3)


def extractors():
    torch.manual_seed(1)
    return {"label": label_extractor(), "whole": VolumeFeatureExtractor(block_out_channels=(8,), num_features=2)}


def config(output_dir, **settings):
    return FrechetConfig(
        **{
            "output_dir": str(output_dir), "report_to": "none", "max_steps": 2, "learning_rate": 1e-3,
            "rollout_batch_size": 4, "train_batch_size": 4, "num_inference_steps": 3, "queue_batches": 2,
            "eval_steps": 0, "eval_batches": 1, **settings,
        }
    )  # fmt: skip


def trained(output_dir, networks=None, arguments=None, trainer_class=FrechetTrainer, **settings):
    """The pipeline, the trainer, what it returned and its log."""
    pipeline = tiny_pipeline()
    networks = networks or {"label": label_extractor()}
    trainer = trainer_class(pipeline, networks, REAL, config(output_dir, **settings), **(arguments or {}))
    result = trainer.train()
    return pipeline, trainer, result, read_log(output_dir)


def timeless(history):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


# ----------------------------------------------------------------------------------------------------------- gradients


class Recording(FrechetTrainer):
    """Keeps the gradient of the first update, and works it out in one graph, without a cache or parts."""

    def _update(self, run, weights, table, rollout, numbers, pulls, step):
        if step == 0:
            parameters = list(weights.trainable.values())
            last = range(len(table) - self.args.gradient_steps, len(table))
            latents, _ = GradientSteps(self.policy, table, self.args.guidance_scale, last).replay(rollout)
            queue = self._queue.population(0)
            found = self.representations.extract(self.policy.decode(latents))
            groups = torch.cat([queue.groups, rollout.conditions])
            loss = 0
            for name, values in found.items():
                targets = self.representations._targets[name]
                distance = frechet_loss(targets, torch.cat([queue.values[name], values]), groups)
                loss = loss + 0.5 * distance / run.state["queue_scales"][0][name]
            self.in_one = torch.autograd.grad(len(groups) / len(rollout) * loss, parameters)
            clip = run.accelerator.clip_grad_norm_

            def record(parameters, max_norm):
                parameters = list(parameters)
                self.in_parts = [parameter.grad.clone() for parameter in parameters]
                return clip(parameters, max_norm)

            with patch.object(run.accelerator, "clip_grad_norm_", record):
                return super()._update(run, weights, table, rollout, numbers, pulls, step)
        return super()._update(run, weights, table, rollout, numbers, pulls, step)


@pytest.mark.parametrize("gradient_steps", [1, 2])
def test_micro_batches_have_the_gradient_of_the_whole_population(gradient_steps, tmp_path):
    _, trainer, _, log = trained(
        tmp_path, extractors(), trainer_class=Recording, max_steps=1, gradient_steps=gradient_steps,
        train_batch_size=2, num_rollout_batches=2, decoder_checkpointing=True, gradient_checkpointing=True,
    )  # fmt: skip
    assert len(trainer.in_parts) == len(trainer.in_one) > 10
    for part, whole in zip(trainer.in_parts, trainer.in_one, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-6 + 1e-4 * whole.abs().max().item())
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in trainer.in_one))
    assert log[0]["frechet/grad_norm"] == pytest.approx(norm, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("samplers", [[1.0], [0.0]])
def test_the_distance_falls(samplers, tmp_path):
    vqvae, network = copied(tiny_pipeline().vqvae), label_extractor()
    before = copied(network)
    pipeline, _, result, log = trained(
        tmp_path, {"label": network}, max_steps=8, rollout_batch_size=8, train_batch_size=8, learning_rate=3e-3,
        samplers=samplers, ema_decay=0.5, eval_steps=4, eval_batches=2, patience=None,
    )  # fmt: skip
    assert log[-1]["frechet/loss"] < 0.95 * log[0]["frechet/loss"]
    assert log[-1]["watch/fresh_frechet"] < log[3]["watch/fresh_frechet"] < 0.98
    assert result["kept_after"] == 8
    assert result["fresh_frechet_kept"] == log[-1]["watch/fresh_frechet"]
    assert result["stopped"] is None
    assert log[0]["frechet/kl"] < 1e-9  # only the memory format of the reference differs
    assert log[-1]["frechet/kl"] > 1e-6
    # what was not to be trained was not, and is as trainable as before
    assert differing(vqvae, copied(pipeline.vqvae)) == differing(before, copied(network)) == []
    assert all(parameter.requires_grad for parameter in (*pipeline.vqvae.parameters(), *network.parameters()))
    # the pipeline holds the weights that were judged: its samples have the logged distance
    generators = [sample_generators(0, f"fresh {number}", list(range(8))) for number in range(2)]
    tuned = torch.cat([pipeline([0, 1] * 4, 3, eta=samplers[0], generator=part).volumes for part in generators])
    labels, real = torch.tensor([0, 1] * 8), extract_features(network, REAL.pixel_values)
    distances = []
    for label in (0, 1):
        fake = extract_features(network, tuned[labels == label])[:6]  # the report compares equal numbers
        distances.append(frechet_distance(real[REAL.class_labels == label], fake))
    logged = log[-1][f"watch/fresh_frechet_label_eta{samplers[0]:g}"]
    assert sum(distances) / 2 == pytest.approx(logged, rel=0.2)


def test_a_line_of_the_log_and_the_forwards_it_took(tmp_path):
    settings = {"eval_steps": 2, "prior_weight": 1.0, "gradient_steps": 2, "gradient_checkpointing": True}
    _, trainer, _, log = trained(tmp_path, extractors(), **settings)
    assert [line["epoch"] for line in log] == [1, 2]
    expected = {
        "frechet/loss", "frechet/label", "frechet/whole", "frechet/kl", "frechet/prior", "frechet/grad_norm",
        "watch/prediction_norm", "watch/diversity", "watch/high_frequency",
    }  # fmt: skip
    assert expected <= set(log[0])
    judged = {f"watch/fresh_frechet_{name}_eta{eta}" for name in ("label", "whole") for eta in (0, 1)}
    assert judged | {"watch/fresh_frechet"} <= set(log[1])
    assert not any("fresh" in name for name in log[0])
    assert log[0]["watch/prediction_norm"] == pytest.approx(1, abs=1e-6)
    assert log[0]["frechet/prior"] < 1e-9
    assert log[1]["frechet/prior"] > 1e-6
    # two samplers: two batches in each queue, one judged before and one after; then two steps of a rollout, two replayed
    # steps of four passes each, the prior with as many and a reference, and the divergence of one sample at 3 steps
    queue_and_judged, per_step = 2 * (2 + 2) * 4 * 3, 4 * 3 + 4 * 2 * 4 + 4 * 5 + 2 * 3
    assert trainer.unet_forwards == queue_and_judged + 2 * per_step
    assert json.loads(json.dumps(log)) == log


def test_samplers_take_turns_and_have_a_queue_each(tmp_path):
    noisy = []

    def steps_with_noise(rollout):
        noisy.append(int((rollout.log_probs != 0).any(dim=0).sum()))
        return 0.0

    arguments = {"watchdogs": {"noise": steps_with_noise}}
    _, trainer, _, _ = trained(tmp_path, arguments=arguments, max_steps=3, samplers=[1, 0, 0])
    assert noisy == [3, 0, 0]
    queues = [trainer._queue.population(number) for number in (0, 1)]
    assert [len(queue.groups) for queue in queues] == [8, 8]
    assert queues[0].values["label"].shape == (8, 3, 3, 3)
    assert not torch.equal(queues[0].values["label"], queues[1].values["label"])


# ------------------------------------------------------------------------------------------------------ when to stop


def scripted(trainer_values):
    """A trainer whose fresh samples have these distances, from the pretrained model on."""

    class Scripted(FrechetTrainer):
        def _fresh_distances(self, run):
            return [{"label": trainer_values.pop(0)} for _ in self._etas]

    return Scripted


def test_the_best_weights_are_kept_and_patience_ends_it(tmp_path):
    values = [2.0, 2.2, 1.8, 1.9, 1.85, 9.9]
    pipeline, _, result, log = trained(
        tmp_path, trainer_class=scripted(values), max_steps=8, samplers=[1.0], eval_steps=1, patience=2, ema_decay=None,
        save_steps=1, save_total_limit=9,
    )  # fmt: skip
    assert [line["watch/fresh_frechet"] for line in log] == pytest.approx([1.1, 0.9, 0.95, 0.925])
    assert (result["kept_after"], result["rollouts"], result["step"]) == (2, 4, 3)
    assert result["fresh_frechet_kept"] == pytest.approx(0.9)
    assert "not improved" in result["stopped"]
    states = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]
    assert differing(copied(pipeline.unet), states[1]) == []
    assert differing(copied(pipeline.unet), states[3])
    assert values == [9.9]


def test_the_weights_after_the_last_update_have_drawn_no_rollout(tmp_path):
    _, _, result, _ = trained(tmp_path, trainer_class=scripted([2.0, 1.8, 1.6]), samplers=[1.0], eval_steps=1)
    assert (result["kept_after"], result["rollouts"], result["step"]) == (2, 2, 2)


def test_a_run_that_only_harms_keeps_the_pretrained_weights(tmp_path):
    pipeline, _, result, log = trained(
        tmp_path, trainer_class=scripted([2.0, 2.1, 5.0, 9.9]), max_steps=8, samplers=[1.0], eval_steps=1,
        watch_limits={"fresh_frechet": [0, 2]}, patience=None,
    )  # fmt: skip
    assert "fresh_frechet left its limits 0 to 2" in result["stopped"]
    assert (result["kept_after"], result["fresh_frechet_kept"], len(log)) == (0, 1.0, 2)
    assert differing(copied(pipeline.unet), copied(tiny_pipeline().unet)) == []


@pytest.mark.parametrize(("broken_after", "reason"), [("step_end", "distance"), ("sampling", "gradient")])
def test_what_is_not_finite_ends_it_without_harm(broken_after, reason, tmp_path):
    class Extractor(SliceFeatureExtractor):
        broken = False

        def forward(self, volumes):
            return super().forward(volumes) * (math.nan if self.broken else 1)

    class Breaker(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            network.broken = broken_after == "step_end"

    def breaking(rollout):
        network.broken = broken_after == "sampling"
        return 0.0

    network = Extractor(block_out_channels=(8,), num_features=2, num_slices=3)
    arguments = {"callbacks": [Breaker], "watchdogs": {"breaking": breaking}}
    pipeline, _, result, log = trained(tmp_path, {"label": network}, arguments, max_steps=6, eval_steps=6)
    assert result["stopped"] == f"the {'Frechet ' * (reason == 'distance')}{reason} is not finite"
    assert result["kept_after"] == 0
    assert len(log) == (2 if reason == "distance" else 1)
    assert differing(copied(pipeline.unet), copied(tiny_pipeline().unet)) == []


def test_other_ends(tmp_path):
    _, _, result, log = trained(tmp_path / "budget", max_steps=6, kl_budget=1e-6, learning_rate=3e-3)
    assert "kl_budget=1e-06" in result["stopped"]
    assert log[-2]["frechet/kl"] <= 1e-6 < log[-1]["frechet/kl"]

    arguments = {"watchdogs": {"bright": lambda rollout: rollout.samples.mean().item()}, "select_by": "-bright"}
    _, _, result, log = trained(tmp_path / "own", arguments=arguments, max_steps=3, eval_steps=1)
    darkest = min(range(3), key=lambda step: log[step]["watch/bright"])
    assert result["watch/bright"] == log[darkest]["watch/bright"]
    assert "fresh_frechet_kept" not in result
    assert "watch/fresh_frechet" in result


def test_the_prior_holds(tmp_path):
    moved = {}
    for weight in (0.0, 1e4):
        _, _, _, log = trained(tmp_path / str(weight), max_steps=4, prior_weight=weight, ema_decay=None)
        moved[weight] = log[-1]["frechet/kl"]
    assert 0 < moved[1e4] < 0.5 * moved[0.0]
    _, _, _, log = trained(tmp_path / "data", max_steps=1, prior="data", prior_weight=1.0)
    assert 0.1 < log[0]["frechet/prior"] < 10  # of a denoiser nobody trained, on latents of unit variance


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("settings", [{"prior_weight": 1.0}, {"use_lora": True, "lora_rank": 2, "prior": "data"}])
def test_resume_is_exact(settings, tmp_path):
    def run(name, max_steps, **more):
        return trained(
            tmp_path / name, extractors(), max_steps=max_steps, save_steps=2, eval_steps=2, ema_decay=0.9, **settings, **more
        )  # fmt: skip

    whole, trainer, result, log = run("whole", 4)
    run("parts", 2)
    resumed, second, second_result, second_log = run("parts", 4, resume_from_checkpoint="latest")
    assert differing(copied(whole.unet), copied(resumed.unet)) == []
    assert trainer.unet_forwards == second.unet_forwards > 0
    assert timeless([result]) == timeless([second_result])
    assert timeless(log) == timeless(second_log)
    folders = [tmp_path / name / "checkpoint-4" for name in ("whole", "parts")]
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    assert states[0] == states[1]
    assert {"queue_scales", "fresh_scales", "best_figure", "best_step", "unet_forwards"} <= set(states[0]["state"])
    for name in ("model.safetensors", "feature_queue.safetensors"):
        earlier = load_file(tmp_path / "whole/checkpoint-2" / name)
        assert differing(*[load_file(folder / name) for folder in folders]) == []
        assert differing(earlier, load_file(folders[0] / name))
    with pytest.raises(InputError, match="other extractors, samplers, queue_batches or eval_batches"):
        trained(
            tmp_path / "parts", max_steps=5, eval_steps=2, resume_from_checkpoint="latest", ema_decay=0.9, **settings
        )
    (folders[1] / "feature_queue.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no feature_queue.safetensors: it is no checkpoint of a FrechetTrainer"):
        run("parts", 5, resume_from_checkpoint="latest")


# -------------------------------------------------------------------------------------------------- what it is given


def test_images_from_prompts(tmp_path):
    class ImageFeatures(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Conv2d(3, 2, 3)

        def forward(self, images):
            return self.layers(images).mean(dim=(2, 3))[:, None, None]

    pipeline = tiny_stable_diffusion()
    real = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(8)
    args = config(tmp_path, class_wise=False, guidance_scale=2.0, log_samples_steps=1)
    trainer = FrechetTrainer(pipeline, {"colors": ImageFeatures()}, real, args, train_conditions=["a b", "c"])
    before = copied(pipeline.unet)
    trainer.train()
    assert differing(before, copied(pipeline.unet))
    assert all(math.isfinite(line["frechet/colors"]) for line in read_log(tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 2
    # two queues of two batches; two steps of rollout, replay, and divergence of one sample in the two steps with enough
    # noise; twice for guidance
    assert trainer.unet_forwards == 2 * (2 * 2 * 4 * 3 + 2 * (4 * 3 + 4 * 3 + 2 * 2))


def test_names_of_classes_train_as_their_numbers(tmp_path):
    weights = []
    for conditions in ([0, 1], ["HGG", "LGG"]):
        arguments = {"train_conditions": conditions}
        pipeline, *_ = trained(tmp_path / str(conditions[0]), arguments=arguments, max_steps=1)
        weights.append(copied(pipeline.unet))
    assert differing(*weights) == []


def test_what_is_refused(tmp_path):
    def made(networks=None, real=REAL, pipeline=None, settings=None, **arguments):
        args = config(tmp_path, **(settings or {}))
        networks = {"label": label_extractor()} if networks is None else networks
        return FrechetTrainer(pipeline or tiny_pipeline(), networks, real, args, **arguments)

    cases = [
        ({"networks": {}}, "needs one extractor or more"),
        ({"settings": {"extractor_weights": [1, 2]}}, "1 extractors need as many extractor_weights, got 2"),
        ({"real": REAL.take_per_class({0: 3, 1: 1})}, "Class 1 has 1 real volumes and needs 2"),
        ({"real": 3}, "real_volumes must be a VolumeDataset or .* got int"),
        ({"real": (REAL.pixel_values, REAL.class_labels[:3])}, "got 12 and 3"),
        ({"select_by": "dark"}, "select_by='dark' is no watchdog"),
        (
            {"pipeline": tiny_stable_diffusion(), "train_conditions": ["a"]},
            "condition 'a' is no class; set class_wise",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            made(**arguments)
    settings = {"class_wise": False, "prior": "data", "prior_weight": 1.0}
    with pytest.raises(InputError, match="StableDiffusionPipeline encodes no volumes"):
        made(pipeline=tiny_stable_diffusion(), train_conditions=["a"], settings=settings)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16**3, 2))
    with pytest.raises(InputError, match=r"'flat' must give \[B, P, S, F\].*got \[12, 2\]"):
        made({"flat": flat}).train()
    whole = {"whole": VolumeFeatureExtractor(block_out_channels=(8,), num_features=2)}
    few = {"rollout_batch_size": 2, "train_batch_size": 2, "queue_batches": 1}
    with pytest.raises(InputError, match="too few samples for a covariance; raise queue_batches"):
        made(whole, settings=few).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_steps": 4}, "gradient_steps=4 exceeds num_inference_steps=3"),
        ({"eta": 0.0}, r"set samplers: \[0.0\] and leave eta at 1"),
        ({"samplers": []}, r"samplers must hold values of eta from 0 to 1, got \[\]"),
        ({"samplers": [1.0, 2.0]}, "samplers must hold values of eta from 0 to 1"),
        ({"prior": "none"}, "prior must be one of"),
        ({"prior_weight": -1.0}, "prior_weight must be 0 or more, got -1.0"),
        ({"queue_batches": 0}, "queue_batches must be positive"),
        ({"kl_budget": 0.0}, "kl_budget must be positive"),
        ({"extractor_weights": [0.0]}, "extractor_weights must be 0 or more, not all 0"),
        ({"async_rewards": True}, "there are no rewards"),
        ({"train_batch_size": 3}, "can't be divided into 1 updates"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **settings)


def test_settings_from_a_file_and_the_command_line(tmp_path):
    defaults = {"output_dir": str(tmp_path), "learning_rate": "1e-5", "samplers": [1, 0], "extractor_weights": [1, 2]}
    (args,) = parse([FrechetConfig], defaults, ["--queue_batches", "3", "--ema_decay", "0.9"])
    assert (args.learning_rate, args.samplers, args.queue_batches, args.ema_decay) == (1e-5, [1, 0], 3, 0.9)
    (args,) = parse([FrechetConfig], defaults, ["--samplers", "0.5", "0"])
    assert args.samplers == [0.5, 0.0]
