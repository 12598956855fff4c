"""MedVolumePipeline: saving, loading, generating, reconstructing."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from msrl_diffusers import MedVolumePipeline, UNet3DModel, VQModel3D
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import sample_generators


STEPS = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(pipeline, labels=("HGG", "LGG"), **kwargs):
    """Latents by default: a rounding error may take a value over the edge of a quantization level."""
    defaults = {"num_inference_steps": STEPS, "generator": generator(), "output_type": "latent"}
    return pipeline(list(labels), **{**defaults, **kwargs}).volumes


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_what_is_saved(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "MedVolumePipeline"
    assert index["vqvae"] == ["msrl_diffusers", "VQModel3D"]
    assert index["unet"] == ["msrl_diffusers", "UNet3DModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["id2label"] == {"0": "HGG", "1": "LGG"}
    scheduler = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is False
    assert scheduler["set_alpha_to_one"] is False
    assert scheduler["timestep_spacing"] == "trailing"
    for name in ("vqvae", "unet"):
        assert (saved / name / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("loader", [MedVolumePipeline, DiffusionPipeline])
def test_loaded_pipeline_generates_the_same(pipeline, saved, loader):
    loaded = loader.from_pretrained(saved)
    assert type(loaded) is MedVolumePipeline
    assert loaded.id2label == {0: "HGG", 1: "LGG"}
    assert loaded.spacing == (12.0, 12.0, 12.0)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), generate(pipeline))


@pytest.mark.slow
def test_another_process_loads_it_by_diffusers(saved):
    code = (
        "import sys, msrl_diffusers; from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]); "
        "print(type(pipe).__name__, type(pipe.unet).__name__, type(pipe.vqvae).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MedVolumePipeline", "UNet3DModel", "VQModel3D"]


def test_half_precision_variant(pipeline, tmp_path):
    full = generate(pipeline)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = MedVolumePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == loaded.vqvae.dtype == torch.float16
    loaded.set_progress_bar_config(disable=True)
    latents = generate(loaded)
    assert latents.dtype == torch.float16
    assert latents.isfinite().all()
    volumes = generate(loaded, output_type="pt")
    assert volumes.dtype == torch.float32
    assert volumes.isfinite().all()
    assert full.shape == latents.shape


def test_from_pipe_shares_components(pipeline):
    other = MedVolumePipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    assert other.vqvae is pipeline.vqvae
    assert other.id2label == pipeline.id2label
    assert other.spacing == pipeline.spacing


def test_same_generator_same_volumes(pipeline):
    torch.testing.assert_close(generate(pipeline), generate(pipeline))
    assert not torch.equal(generate(pipeline), generate(pipeline, generator=generator(1)))


def test_a_sample_does_not_depend_on_its_batch(pipeline):
    together = generate(pipeline, ["HGG", "LGG", "HGG"], generator=sample_generators(0, "g", range(3)))
    apart = generate(pipeline, ["LGG"], generator=sample_generators(0, "g", [1]))
    torch.testing.assert_close(together[1:2], apart, rtol=1e-4, atol=1e-4)


def test_output_types(pipeline):
    latents = generate(pipeline)
    assert latents.shape == (2, 4, 8, 8, 8)
    start = {"latents": torch.randn(latents.shape, generator=generator()), "eta": 0.0}
    volumes = generate(pipeline, output_type="pt", **start)
    assert volumes.shape == (2, 1, 16, 16, 16)
    assert volumes.dtype == torch.float32
    assert volumes.abs().max() <= 1
    array = generate(pipeline, output_type="np", **start)
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, volumes.numpy(), atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.decode_latents(generate(pipeline, **start)), volumes, rtol=0, atol=1e-4)
    (first,) = pipeline(["HGG", "LGG"], num_inference_steps=STEPS, return_dict=False, **start)
    torch.testing.assert_close(first, volumes, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="output_type must be 'pt', 'np', 'nifti' or 'latent', got 'pil'"):
        generate(pipeline, output_type="pil")


def test_what_can_t_be_sampled_is_said_at_once(pipeline):
    for missing in ("sample_size", "num_class_embeds"):
        unet = UNet3DModel.from_config(pipeline.unet.config, **{missing: None})
        with pytest.raises(InputError, match=f"needs a denoiser that states its {missing}"):
            MedVolumePipeline(pipeline.vqvae, unet, pipeline.scheduler)
    vqvae = VQModel3D.from_config(pipeline.vqvae.config, in_channels=2, out_channels=2)
    two = MedVolumePipeline(vqvae, pipeline.unet, pipeline.scheduler)
    assert generate(two, [0, 1], output_type="np").shape[1] == 2
    seen = []
    with pytest.raises(InputError, match="A NIfTI image has one channel, and these volumes 2: use output_type='np'"):
        generate(two, [0, 1], output_type="nifti", callback_on_step_end=lambda *step: seen.append(step) or {})
    assert not seen


def test_nifti_output_has_a_right_affine(pipeline):
    image, volume = (generate(pipeline, output_type=kind)[0] for kind in ("nifti", "pt"))
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_allclose(np.diag(image.affine), [12, 12, 12, 1])
    np.testing.assert_allclose(image.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(image.get_fdata(), (volume[0].permute(2, 1, 0) + 1) / 2, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_the_spacing_of_an_image_is_saved(pipeline, tmp_path):
    edges = np.array([1, 2, 3], dtype=np.float32)  # as get_zooms() has them
    for spacing in (edges, tuple(edges)):
        made = MedVolumePipeline(pipeline.vqvae, pipeline.unet, pipeline.scheduler, spacing)
        assert made.spacing == (1.0, 2.0, 3.0)
        made.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["spacing"] == [1.0, 2.0, 3.0]


def test_names_and_labels_are_the_same(pipeline):
    expected = generate(pipeline, ["LGG"])
    for labels in (1, "LGG", [1], torch.tensor([1])):
        latents = pipeline(labels, num_inference_steps=STEPS, generator=generator(), output_type="latent").volumes
        torch.testing.assert_close(latents, expected)
    assert not torch.allclose(generate(pipeline, ["HGG"]), expected, atol=1e-3)


@pytest.mark.parametrize("label", ["glioma", 2, -1])
def test_unknown_class_raises(pipeline, label):
    with pytest.raises(ValueError, match=f"Unknown class {label!r}; this model knows .*HGG"):
        pipeline(label, num_inference_steps=STEPS)


def test_classes_without_names_are_numbers(vqvae, unet):
    pipe = MedVolumePipeline(vqvae, unet, DDIMScheduler())
    assert pipe.id2label == {0: "0", 1: "1"}
    assert pipe.spacing == (1.0, 1.0, 1.0)
    assert pipe.prepare_class_labels(["1", 0]).tolist() == [1, 0]


def test_guidance_changes_the_output(pipeline):
    plain = generate(pipeline)
    assert not torch.allclose(generate(pipeline, guidance_scale=3.0), plain, atol=1e-3)


def test_guidance_is_that_of_the_formula(pipeline):
    latents = torch.randn(1, 4, 8, 8, 8, generator=generator())
    guided = pipeline("HGG", 1, guidance_scale=2.5, eta=0.0, latents=latents, output_type="latent").volumes
    timestep = pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        conditional, null = (pipeline.unet(latents, timestep, torch.tensor([label])).sample for label in (0, 2))
    output = null + 2.5 * (conditional - null)
    torch.testing.assert_close(
        guided, pipeline.scheduler.step(output, timestep, latents).prev_sample, rtol=1e-3, atol=1e-4
    )


def test_eta_zero_is_deterministic(pipeline):
    latents = torch.randn(2, 4, 8, 8, 8, generator=generator())
    one, other = (generate(pipeline, latents=latents, eta=0.0, generator=generator(seed)) for seed in (0, 1))
    torch.testing.assert_close(one, other)
    one, other = (generate(pipeline, latents=latents, eta=1.0, generator=generator(seed)) for seed in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


def test_callback_sees_every_step_and_may_replace_latents(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].clone()))
        return tensors

    latents = generate(pipeline, callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], latents)

    def replace(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not generate(pipeline, callback_on_step_end=replace).any()
    with pytest.raises(ValueError, match="Callbacks can get"):
        generate(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["embeddings"])


def test_reconstruct_without_noise_is_the_autoencoder(pipeline, phantoms):
    volumes = phantoms.batch([0, 1])["pixel_values"]
    output = pipeline.reconstruct(volumes, 0, phantoms.class_labels[:2]).volumes
    with torch.no_grad():
        torch.testing.assert_close(output, pipeline.vqvae(volumes).sample.clamp(-1, 1))


def test_encode_and_decode_use_the_scale(pipeline, phantoms):
    volumes = phantoms.batch([0])["pixel_values"]
    with torch.no_grad():
        expected = pipeline.vqvae(volumes).sample.clamp(-1, 1)
        plain = pipeline.encode_volumes(volumes)
        pipeline.vqvae.register_to_config(scaling_factor=2.5, shift_factor=0.3)
        try:
            latents = pipeline.encode_volumes(volumes)
            torch.testing.assert_close(latents, (plain - 0.3) * 2.5)
            torch.testing.assert_close(pipeline.decode_latents(latents), expected, rtol=1e-4, atol=1e-4)
        finally:
            pipeline.vqvae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def test_more_noise_forgets_more(pipeline, phantoms):
    volumes = phantoms.batch([0, 1])["pixel_values"]
    latents = pipeline.encode_volumes(volumes)
    distances = []
    for noise_step in (1, 5, 10):
        output = pipeline.reconstruct(
            volumes, noise_step, [0, 1], num_inference_steps=10, generator=generator(), output_type="latent"
        ).volumes
        distances.append((output - latents).square().mean().item())
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("noise_step", [-1, 11])
def test_noise_step_out_of_range_raises(pipeline, noise_step):
    with pytest.raises(ValueError, match=f"noise_step must lie in 0 .. 10, got {noise_step}"):
        pipeline.reconstruct(torch.zeros(1, 1, 16, 16, 16), noise_step, 0, num_inference_steps=10)


def test_reconstruct_needs_a_label_per_volume(pipeline):
    with pytest.raises(ValueError, match="label"):
        pipeline.reconstruct(torch.zeros(3, 1, 16, 16, 16), 1, "HGG", num_inference_steps=10)


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_generators_raises(pipeline, count):
    with pytest.raises(ValueError, match="generator"):
        generate(pipeline, ["HGG", "LGG", "HGG"], generator=sample_generators(0, "g", range(count)))


def test_latents_of_the_wrong_shape_raise(pipeline):
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4, 8, 8, 8\) are needed"):
        generate(pipeline, latents=torch.zeros(1, 4, 8, 8, 8))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # np.array(tensor) in diffusers
def test_another_scheduler_may_be_put_in(pipeline, phantoms):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    latents = generate(pipeline, num_inference_steps=5)
    assert latents.shape == (2, 4, 8, 8, 8)
    assert latents.isfinite().all()
    torch.testing.assert_close(generate(pipeline, num_inference_steps=5), latents)
    reconstructed = pipeline.reconstruct(
        phantoms.batch([0])["pixel_values"], 3, 0, num_inference_steps=6, generator=generator()
    ).volumes
    assert reconstructed.isfinite().all()
