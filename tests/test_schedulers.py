"""A pipeline with other schedulers of diffusers, and the benchmark of them."""

import json
import runpy
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from generating import DETERMINISTIC, START, STEPS, STOCHASTIC, generate, generator, with_scheduler
from tiny import tiny_pipeline

from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import sample_generators


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def volumes():
    return torch.rand(2, 1, 16, 16, 16, generator=generator()) * 2 - 1


@pytest.mark.parametrize("name", DETERMINISTIC + STOCHASTIC)
def test_schedulers_generate(name):
    pipeline = with_scheduler(name)
    together = generate(pipeline, [0, 1, 0], generator=sample_generators(0, "g", range(3)))
    assert together.isfinite().all()
    assert 0.1 < together.std() < 3
    apart = generate(pipeline, [1], generator=sample_generators(0, "g", [1]))
    torch.testing.assert_close(together[1:2], apart, rtol=1e-4, atol=1e-4)
    one, other = (generate(pipeline, latents=START, generator=generator(seed)) for seed in (0, 1))
    assert torch.allclose(one, other) == (name in DETERMINISTIC)
    assert generate(pipeline, output_type="pt").shape == (2, 1, 16, 16, 16)


SAME_CHAIN = [  # in exact arithmetic these are one and the same sampler, in four parametrizations
    ("EulerDiscreteScheduler", {}, 0.0),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, 0.0),
    ("DDPMScheduler", {}, 1.0),
    ("EulerAncestralDiscreteScheduler", {}, 1.0),
]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(("name", "changes", "eta"), SAME_CHAIN)
def test_schedulers_agree_with_ddim(name, changes, eta, guidance_scale, volumes):
    """Scales of noise and of the denoiser's input, what is predicted and the grid of timesteps are all as they should be."""
    ddim = with_scheduler("DDIMScheduler", set_alpha_to_one=True)  # the others end without noise
    other = with_scheduler(name, **changes)
    arguments = {"guidance_scale": guidance_scale, "eta": eta, "num_inference_steps": 8}
    expected = generate(ddim, **arguments)
    torch.testing.assert_close(generate(other, **arguments), expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(generate(ddim, **{**arguments, "eta": 1 - eta}), expected, rtol=1e-2, atol=1e-2)
    expected, reconstructed = (
        one.reconstruct(volumes, 3, [0, 1], generator=generator(), output_type="latent", **arguments).volumes
        for one in (ddim, other)
    )
    torch.testing.assert_close(reconstructed, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", DETERMINISTIC + STOCHASTIC)
def test_schedulers_reconstruct(name, volumes):
    pipeline = with_scheduler(name)
    latents = pipeline.encode_volumes(volumes)
    distances = []
    for noise_step in (1, 4, 8):
        output = pipeline.reconstruct(
            volumes, noise_step, [0, 1], num_inference_steps=8, generator=generator(), output_type="latent"
        ).volumes
        distances.append((output - latents).square().mean().item())
    assert distances[0] < distances[1] < distances[2]
    generate(pipeline)  # from the first step again


@pytest.mark.parametrize(("name", "evaluations"), [("EulerDiscreteScheduler", 3), ("HeunDiscreteScheduler", 5)])
def test_a_step_of_second_order_evaluates_twice(name, evaluations, volumes):
    pipeline, calls = with_scheduler(name), []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    pipeline.reconstruct(volumes, 3, [0, 1], num_inference_steps=6, generator=generator())
    assert len(calls) == pipeline.num_timesteps == evaluations


def test_schedulers_that_cannot_start_from_a_volume_say_so(volumes):
    pipeline = with_scheduler("PNDMScheduler")
    assert generate(pipeline).isfinite().all()
    with pytest.raises(InputError, match=r"^PNDMScheduler can't start from a noised volume; take .*from_config"):
        pipeline.reconstruct(volumes, 2, [0, 1], num_inference_steps=STEPS)
    assert pipeline.reconstruct(volumes, 0, [0, 1]).volumes.shape == volumes.shape


def test_schedulers_for_other_noise_are_refused(pipeline, volumes):
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        InputError, match=r"^FlowMatchEulerDiscreteScheduler has no init_noise_sigma, so it can't sample here"
    ):
        generate(pipeline)
    with pytest.raises(InputError, match="has no init_noise_sigma"):
        pipeline.reconstruct(volumes, 2, [0, 1], num_inference_steps=STEPS)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_rounding_adds_no_step_below_zero(name, volumes):
    """diffusers' trailing grid of 61 steps has a 62nd timestep, -1: at the noisy end of a table of noise levels."""
    pipeline = with_scheduler(name)
    pipeline.scheduler.set_timesteps(61)
    assert pipeline.scheduler.timesteps[-1] == -1
    generate(pipeline, num_inference_steps=61)
    assert pipeline.num_timesteps == 61
    assert (pipeline.scheduler.timesteps >= 0).all()
    near, far = (
        pipeline.reconstruct(volumes, step, [0, 1], 61, generator=generator(), output_type="latent").volumes
        for step in (1, 61)
    )
    latents = pipeline.encode_volumes(volumes)
    assert (near - latents).square().mean() < 0.1 * (far - latents).square().mean()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_scheduler_whose_grid_cannot_be_mended_refuses_such_a_number(name):
    with pytest.raises(InputError, match=f"of 61 steps of {name} end below zero, .*; take another number"):
        generate(with_scheduler(name), num_inference_steps=61)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_latents_is_refused(option, volumes):
    pipeline = with_scheduler("DDIMScheduler", **{option: True})
    with pytest.raises(InputError, match=rf"has {option}, which clips latents .* set pipe.scheduler = DDIMScheduler"):
        generate(pipeline)
    with pytest.raises(InputError, match=rf"has {option}"):
        pipeline.reconstruct(volumes, 2, [0, 1], num_inference_steps=STEPS)
    # it keeps the value and has no such option
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert generate(pipeline).isfinite().all()


def test_a_swapped_scheduler_is_saved_and_swapped_back(tmp_path):
    pipeline = with_scheduler("UniPCMultistepScheduler")
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__name__ == "UniPCMultistepScheduler"
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), generate(pipeline))
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config)
    for name in ("prediction_type", "timestep_spacing", "clip_sample", "beta_schedule", "set_alpha_to_one"):
        assert loaded.scheduler.config[name] == tiny_pipeline().scheduler.config[name]
    torch.testing.assert_close(generate(loaded), generate(tiny_pipeline()))


# --------------------------------------------------------------------------------------------------------- benchmark


def test_table_of_quality_against_steps(tmp_path, monkeypatch, capsys):
    """The benchmark on two volumes a side; a second run takes what is there and adds the rest."""
    output = tmp_path / "schedulers.json"
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "schedulers.py"

    def run(*schedulers):
        arguments = ["--num_volumes", "2", "--num_inference_steps", "1", "2", "--bootstrap_draws", "3"]
        monkeypatch.setattr(
            sys, "argv", [str(script), "--output", str(output), *arguments, "--schedulers", *schedulers]
        )
        runpy.run_path(str(script), run_name="__main__")
        return json.loads(output.read_text())

    first = run("Euler")
    both = run("Euler", "DDIM, eta 1")
    assert both["rows"]["Euler"] == first["rows"]["Euler"]
    assert set(both["rows"]) == {"Euler", "DDIM, eta 1"}
    for row in both["rows"].values():
        assert [cell["evaluations"] for cell in row.values()] == [1, 2]
        assert all(cell["fid"]["low"] <= cell["fid"]["value"] <= cell["fid"]["high"] for cell in row.values())
    assert both["rows"]["Euler"]["2"]["fid"] != both["rows"]["DDIM, eta 1"]["2"]["fid"]
    page = output.with_suffix(".md").read_text()
    assert "| scheduler | 1 steps | 2 steps |" in page
    assert page in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(script), "--num_volumes", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().err == "error: num_volumes must be at least 2 for a distance, got 1.\n"
