"""What users of diffusers do with any pipeline: offloading, callbacks, precision, components."""

import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from generating import DETERMINISTIC, START, STEPS, STOCHASTIC, generate, generator, with_scheduler
from tiny import tiny_pipeline

from msrl_diffusers import MedVolumePipeline, UNet3DModel, VQModel3D
from msrl_diffusers.errors import InputError
from msrl_diffusers.seeding import sample_generators


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def volumes():
    return torch.rand(2, 1, 16, 16, 16, generator=generator()) * 2 - 1


# -------------------------------------------------------------------------------------------------------- offloading


@pytest.fixture
def moves(monkeypatch):
    """Names of the modules that come to the execution device, in their order."""
    seen = []
    pre_forward = CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        seen.append(type(module).__name__)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record)
    return seen


def test_model_cpu_offload(pipeline, volumes, moves):
    """The CPU stands in for the accelerator: the hooks are those that would move the models."""
    expected = generate(pipeline, output_type="pt")
    pipeline.enable_model_cpu_offload(device="cpu")
    unet_hook, vqvae_hook = pipeline._all_hooks
    assert unet_hook.model is pipeline.unet
    assert vqvae_hook.hook.prev_module_hook is unet_hook  # makes way for the autoencoder
    torch.testing.assert_close(generate(pipeline, output_type="pt"), expected)
    assert moves == ["UNet3DModel"] * STEPS + ["VQModel3D"]
    assert len(pipeline._all_hooks) == 2  # set anew after the call
    moves.clear()
    pipeline.reconstruct(volumes, 1, [0, 1], num_inference_steps=STEPS)
    assert moves == ["VQModel3D", "UNet3DModel", "VQModel3D"]


def test_bare_encode_and_decode_under_offload(pipeline, volumes, moves):
    pipeline.enable_model_cpu_offload(device="cpu")
    with torch.no_grad():
        latents = pipeline.encode_volumes(volumes)
        pipeline.decode_latents(latents)
        pipeline.vqvae.encode(volumes)
        pipeline.vqvae.decode(latents)
    assert moves == ["VQModel3D"] * 4
    pipeline.remove_all_hooks()
    generate(pipeline)
    assert len(moves) == 4


@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offload(pipeline, volumes, monkeypatch, options):
    """Every parameter and buffer comes to the device; here that is the CPU, so those that would be missing are counted."""
    models, there, onload = (pipeline.unet, pipeline.vqvae), set(), ModuleGroup.onload_

    def record(group):
        for module in group.modules:
            there.update(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
        there.update(id(tensor) for tensor in (*group.parameters, *group.buffers))
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", record)
    expected = pipeline.reconstruct(volumes, 1, [0, 1], num_inference_steps=STEPS, generator=generator()).volumes
    pipeline.enable_group_offload("cpu", **options)
    torch.testing.assert_close(
        pipeline.reconstruct(volumes, 1, [0, 1], num_inference_steps=STEPS, generator=generator()).volumes, expected
    )
    missing = [
        name
        for model in models
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in there
    ]
    assert missing == []


@pytest.mark.parametrize(("slice_size", "heads"), [("auto", 2), ("max", 1), (2, 2), (8, 4)])
def test_attention_slicing(pipeline, slice_size, heads):
    pipeline.unet = UNet3DModel.from_config(pipeline.unet.config, attention_head_dim=2)  # 4 heads
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.1)
    pipeline.vqvae = VQModel3D.from_config(pipeline.vqvae.config, mid_block_add_attention=True)  # 1 head
    layers, own = (
        [layer for layer in model.modules() if isinstance(layer, Attention)]
        for model in (pipeline.unet, pipeline.vqvae)
    )
    volume = torch.rand(1, 1, 16, 16, 16)
    expected, latents = generate(pipeline), pipeline.encode_volumes(volume)
    pipeline.enable_attention_slicing(slice_size)
    assert [layer.processor.slice_size for layer in layers] == [heads] * len(layers)
    assert [layer.processor.slice_size for layer in own] == [1, 1]
    torch.testing.assert_close(generate(pipeline), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipeline.encode_volumes(volume), latents, rtol=1e-4, atol=1e-4)
    pipeline.disable_attention_slicing()
    assert not any(isinstance(layer.processor, SlicedAttnProcessor) for layer in layers + own)


# --------------------------------------------------------------------------------------------------------- callbacks


def test_interrupt_ends_with_the_latents_as_they_are(pipeline):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    latents = generate(pipeline, callback_on_step_end=stop)
    assert len(seen) == 2
    assert torch.equal(latents, seen[-1])
    assert pipeline.interrupt
    full = generate(pipeline)
    assert not pipeline.interrupt
    assert not torch.allclose(full, latents, atol=1e-3)


def test_a_callback_may_change_classes(pipeline):
    def all_second(pipe, step, timestep, tensors):
        assert set(tensors) == {"class_labels"}
        return {"class_labels": torch.ones_like(tensors["class_labels"])}

    changed = generate(
        pipeline, [0, 1], callback_on_step_end=all_second, callback_on_step_end_tensor_inputs=["class_labels"]
    )
    plain, second = generate(pipeline, [0, 1]), generate(pipeline, [1, 1])
    torch.testing.assert_close(changed[1], plain[1])
    assert not torch.allclose(changed[0], plain[0], atol=1e-4)
    assert not torch.allclose(changed[0], second[0], atol=1e-4)  # the first step was of the other class


class Cutoff(PipelineCallback):
    """Guidance for the first half of the steps."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index + 1 == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 1.0
        return callback_kwargs


def test_guidance_may_be_cut_off_by_a_callback_of_diffusers(pipeline):
    batches = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    cut = generate(pipeline, guidance_scale=3.0, callback_on_step_end=Cutoff(cutoff_step_ratio=0.5))
    assert batches == [4, 4, 2, 2]
    assert not torch.allclose(cut, generate(pipeline, guidance_scale=3.0), atol=1e-4)
    assert pipeline.guidance_scale == 3.0
    several = MultiPipelineCallbacks([Cutoff(cutoff_step_ratio=0.5)])
    torch.testing.assert_close(generate(pipeline, guidance_scale=3.0, callback_on_step_end=several), cut)


def test_callbacks_of_a_reconstruction(pipeline, volumes):
    steps = []

    def keep(pipe, step, timestep, tensors):
        steps.append((step, pipe.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = pipeline.reconstruct(
        volumes, 2, [0, 1], num_inference_steps=STEPS, output_type="latent", callback_on_step_end=keep
    ).volumes
    assert steps == [(0, 2), (1, 2)]
    assert not output.any()
    with pytest.raises(ValueError, match="Callbacks can get"):
        pipeline.reconstruct(volumes, 2, [0, 1], callback_on_step_end_tensor_inputs=["prompt_embeds"])


# ------------------------------------------------------------------------------------------- several volumes, precision


def test_several_volumes_per_label(pipeline):
    several = generate(pipeline, [0, 1], num_volumes_per_label=2)
    torch.testing.assert_close(several, generate(pipeline, [0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"one per volume \(4\), got 2"):
        generate(pipeline, [0, 1], num_volumes_per_label=2, generator=[generator(), generator()])
    with pytest.raises(InputError, match="num_volumes_per_label must be at least 1, got 0"):
        generate(pipeline, num_volumes_per_label=0)


@pytest.mark.parametrize("name", DETERMINISTIC + STOCHASTIC)
def test_bfloat16(name, volumes):
    pipeline = with_scheduler(name).to(torch.bfloat16)
    assert pipeline.dtype == pipeline.unet.dtype == pipeline.vqvae.dtype == torch.bfloat16
    latents = generate(pipeline)
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()
    decoded = pipeline.reconstruct(volumes, 2, [0, 1], num_inference_steps=STEPS, generator=generator()).volumes
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert generate(pipeline.to(torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("name", [*DETERMINISTIC, "DDIMScheduler"])
def test_bfloat16_is_close_to_float32(name):
    pipelines = with_scheduler(name).to(torch.bfloat16), with_scheduler(name)
    half, full = (generate(pipeline, latents=START, eta=0.0).float() for pipeline in pipelines)
    assert (half - full).abs().mean() < 0.05 * full.std()


def test_variants_lie_beside_each_other(pipeline, tmp_path):
    expected = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    pipeline.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    whole, half = (tmp_path / "unet" / f"diffusion_pytorch_model{infix}.safetensors" for infix in ("", ".bf16"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    loaded = MedVolumePipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    plain = MedVolumePipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(plain), expected)
    with pytest.warns(FutureWarning, match="torch_dtype"):
        older = MedVolumePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert older.unet.dtype == older.vqvae.dtype == torch.float16


# -------------------------------------------------------------------------------------------------------- components


def test_from_pipe_with_another_scheduler(pipeline):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    other = MedVolumePipeline.from_pipe(pipeline, scheduler=scheduler)
    assert other.unet is pipeline.unet
    assert other.scheduler is scheduler
    assert other.id2label == pipeline.id2label
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(other), generate(with_scheduler("EulerDiscreteScheduler")))
    half = MedVolumePipeline.from_pipe(pipeline, dtype=torch.bfloat16, spacing=(1.0, 2.0, 3.0))
    assert half.unet.dtype == torch.bfloat16
    assert half.spacing == (1.0, 2.0, 3.0)


def test_components_make_another_pipeline(pipeline):
    assert set(pipeline.components) == {"vqvae", "unet", "scheduler"}
    other = MedVolumePipeline(**pipeline.components, id2label=pipeline.id2label)
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(other), generate(pipeline))


def test_generators_and_latents(pipeline):
    generators = sample_generators(0, "g", range(2))
    start = torch.cat([torch.randn(1, 2, 8, 8, 8, generator=one) for one in generators])
    torch.testing.assert_close(
        generate(pipeline, latents=start, eta=0.0),
        generate(pipeline, generator=sample_generators(0, "g", range(2)), eta=0.0),
    )
