"""One update of DiffusionPPOTrainer beside the same update of TRL's DDPOTrainer (0.23.1), on one recorded rollout.

The fixture was made by TRL itself (`fixtures/make_ddpo_parity.py`): full fine-tuning in float32, one optimizer update
accumulated over all samples and denoising steps, without guidance, with trained guidance, and with a policy that has moved
since the rollout, so that ratios are clipped.

Equal, and asserted: log-probabilities of the rollout and of the update, advantages, the gradient before its norm is clipped,
its norm, and the weights after AdamW's step, weight decay included.

Aligned, since the two differ by design:
- advantages: TRL pools all prompts, ours are centred per condition, so all samples count as one condition here; ours
  standardise rewards on the first rollout before that, which changes advantages by the epsilons of the divisions only;
- the first step of Adam, which hardly depends on a gradient's size: TRL's norm is clipped to 1e-6 here, where epsilon counts, so
  that clipping, scale and epsilon show in the weights; the decay rates of its moments can't show in one step;
- the last step of the grid: TRL clamps its successor to step 0, ours takes the scheduler's final alpha; the schedule of Stable
  Diffusion (`steps_offset=1, set_alpha_to_one=False`) makes them the same, and noisy enough for `min_std`;
- the clip range: ours is given as a shift of the mean, here the one that makes TRL's number;
- order: TRL shuffles samples and steps before it accumulates, ours goes through them as they are, so sums are rounded otherwise;
- no divergence from the reference (TRL knows none); in the case `stale` our check that a rollout is fresh is off.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from ppo_run import Recording
from safetensors.torch import load_file
from tiny import Brightness, tiny_stable_diffusion

from msrl_diffusers import DiffusionPPOConfig
from msrl_diffusers.functional.denoising import gaussian_log_prob
from msrl_diffusers.functional.objectives import scaled_clip_range
from msrl_diffusers.policies import make_policy
from msrl_diffusers.policies.base import Conditioning
from msrl_diffusers.rollouts import Rollout, StepTable, step_moments


FIXTURES = Path(__file__).parent / "fixtures"
MADE_BY = json.loads((FIXTURES / "ddpo_parity.json").read_text())
SETTINGS = MADE_BY["settings"]
CASES = list(MADE_BY["cases"])
NUM_ELEMENTS = 4 * 8 * 8


class Replay(Recording):
    """Our trainer on a rollout and rewards that TRL recorded."""

    def __init__(self, *arguments, recorded, **keywords):
        super().__init__(*arguments, **keywords)
        self.recorded = recorded

    def _sample(self, run, scoring, table, step):
        return rollout_of(self.recorded), {"brightness": self.recorded["rewards"]}

    def _update(self, run, weights, table, rollout, trained):
        self.advantages = rollout.advantages
        super()._update(run, weights, table, rollout, trained)


class StaleReplay(Replay):
    """The recorded rollout is of an older policy, which the trainer would refuse."""

    def _check_ratio(self, stats):
        pass


def recorded_case(name):
    tensors = load_file(FIXTURES / "ddpo_parity.safetensors")
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def rollout_of(recorded):
    size = len(recorded["latents"])
    return Rollout(
        latents=recorded["latents"],
        log_probs=recorded["old_log_probs"],
        conditioning=Conditioning(
            {"encoder_hidden_states": recorded["prompt_embeds"]},
            {"encoder_hidden_states": recorded["negative_prompt_embeds"]},
        ),
        conditions=torch.zeros(size, dtype=torch.long),
        samples=torch.zeros(size, 3, 16, 16),
    )


def flat(tensors):
    """All values in alphabetical order of the tensors' names, as the fixture has them."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def pipeline_of(recorded):
    pipeline = tiny_stable_diffusion()
    pipeline.unet = UNet2DConditionModel.from_config(MADE_BY["unet"])
    parameters = [parameter for _, parameter in sorted(pipeline.unet.named_parameters())]
    values = recorded["weights"].split([parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value.view(parameter.shape))
    pipeline.scheduler = DDIMScheduler.from_config(MADE_BY["scheduler"])
    return pipeline


def guidance_of(case):
    return MADE_BY["cases"][case]["sample_guidance_scale"] if MADE_BY["cases"][case]["train_cfg"] else 1.0


def config(output_dir, case):
    return DiffusionPPOConfig(
        output_dir=str(output_dir), report_to="none", max_steps=1, kl_coef=0.0, mixed_precision="no",
        num_inference_steps=SETTINGS["sample_num_steps"], eta=SETTINGS["sample_eta"], guidance_scale=guidance_of(case),
        rollout_batch_size=SETTINGS["sample_batch_size"], num_rollout_batches=SETTINGS["sample_num_batches_per_epoch"],
        train_batch_size=SETTINGS["train_batch_size"], learning_rate=SETTINGS["train_learning_rate"],
        adam_beta1=SETTINGS["train_adam_beta1"], adam_beta2=SETTINGS["train_adam_beta2"],
        weight_decay=SETTINGS["train_adam_weight_decay"], max_grad_norm=SETTINGS["train_max_grad_norm"],
        clip_shift=SETTINGS["train_clip_range"] * NUM_ELEMENTS**0.5, adv_clip_max=SETTINGS["train_adv_clip_max"],
        log_prob_reduction="mean",
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_trl(case):
    recorded = recorded_case(case)
    policy, rollout = make_policy(pipeline_of(recorded)), rollout_of(recorded)
    table = StepTable.of(policy.scheduler, SETTINGS["sample_num_steps"], SETTINGS["sample_eta"], min_std=0.01)
    assert table.stochastic == (0, 1, 2, 3)
    assert torch.equal(table.timesteps, recorded["timesteps"])
    for step in table.stochastic:
        with torch.no_grad():
            moments = step_moments(
                policy, table, step, rollout.latents[:, step], rollout.conditioning, guidance_of(case)
            )
        log_prob = gaussian_log_prob(rollout.latents[:, step + 1], *moments, "mean")
        torch.testing.assert_close(log_prob, recorded["log_probs"][:, step], atol=3e-6, rtol=0)
        if case != "stale":
            torch.testing.assert_close(log_prob, recorded["old_log_probs"][:, step], atol=3e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_trl(case, tmp_path):
    recorded = recorded_case(case)
    pipeline, args = pipeline_of(recorded), config(tmp_path, case)
    assert scaled_clip_range(args.clip_shift, NUM_ELEMENTS, "mean") == pytest.approx(SETTINGS["train_clip_range"])
    trainer = (StaleReplay if case == "stale" else Replay)(
        pipeline, Brightness(), args, recorded=recorded, train_conditions=["any"]
    )
    figures = trainer.train()
    # the fixture's `stale` has ratios beyond the range on both sides; elsewhere all ratios are one
    for side in ("high", "low"):
        assert (figures[f"ppo/clip_fraction_{side}"] > 0.05) == (case == "stale")

    clip = SETTINGS["train_adv_clip_max"]
    assert (recorded["advantages"].abs() > clip).any()
    torch.testing.assert_close(trainer.advantages, recorded["advantages"].clamp(-clip, clip), atol=2e-5, rtol=0)

    # tolerances are ten times what was measured; a sum of another order or another processor rounds otherwise
    gradient = flat({name.removeprefix("0."): value for name, value in trainer.gradients.items()})
    assert (gradient - recorded["gradient"]).norm() < 1e-4 * recorded["gradient"].norm()
    assert figures["ppo/grad_norm"] == pytest.approx(recorded["gradient_norm"].item(), rel=1e-4)
    step = flat(dict(pipeline.unet.named_parameters())) - recorded["weights"]
    expected = recorded["weights_after"] - recorded["weights"]
    assert (step - expected).norm() < 2e-4 * expected.norm()
    torch.testing.assert_close(step, expected, atol=1e-3 * args.learning_rate, rtol=0)
