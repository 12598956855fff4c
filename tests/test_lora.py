"""LoRA adapters of a pipeline: saved, loaded, mixed, fused; and what can't be loaded or saved."""

import json
import shutil

import pytest
import torch
from lora_scene import FILE, generate, with_adapter
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Brightness, tiny_pipeline

from msrl_diffusers import (
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionPPOConfig,
    DiffusionPPOTrainer,
    MedVolumePipeline,
    RewardBackpropConfig,
    RewardBackpropTrainer,
    UNet3DModel,
)
from msrl_diffusers.errors import InputError
from msrl_diffusers.trainers.lora import save_lora
from msrl_diffusers.trainers.tuned_weights import LORA_TARGETS


@pytest.fixture
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.unet.eval()
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter, saved."""
    folder = tmp_path_factory.mktemp("adapter")
    with_adapter().save_lora_weights(folder)
    return folder


@pytest.fixture(scope="module")
def plain():
    return generate(tiny_pipeline())


@pytest.fixture(scope="module")
def adapted(plain):
    """What the pipeline with that adapter generates."""
    latents = generate(with_adapter())
    assert not torch.allclose(latents, plain, atol=1e-2)
    return latents


# -------------------------------------------------------------------------------------------------- saved and loaded


def test_a_saved_adapter_loads_again(pipeline, folder, adapted, plain):
    assert [file.name for file in folder.iterdir()] == [FILE]
    pipeline.load_lora_weights(folder, adapter_name="tuned")
    torch.testing.assert_close(generate(pipeline), adapted)
    assert pipeline.get_list_adapters() == {"unet": ["tuned"]}
    assert pipeline.get_active_adapters() == ["tuned"]
    config = pipeline.unet.peft_config["tuned"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 6, set(LORA_TARGETS))
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline), plain)


def test_what_is_in_the_file(folder):
    tensors = load_file(folder / FILE)
    assert all(name.startswith("unet.") and name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)
    assert tensors["unet.mid_block.0.resnet.conv1.lora_A.weight"].shape == (2, 8, 3, 3, 3)
    assert tensors["unet.mid_block.0.resnet.conv1.lora_B.weight"].shape == (8, 2, 1, 1, 1)
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 6
    assert metadata["unet.target_modules"] == sorted(LORA_TARGETS)


def test_places_an_adapter_may_lie_at(folder, adapted, tmp_path):
    (tmp_path / "sub").mkdir()
    shutil.copy(folder / FILE, tmp_path / "sub" / "mine.safetensors")
    tensors, metadata = MedVolumePipeline.lora_state_dict(folder, return_lora_metadata=True)
    assert metadata["unet.r"] == 2
    assert set(tensors) == set(MedVolumePipeline.lora_state_dict(folder))
    sources = [
        (folder / FILE, {}),
        (str(folder), {"weight_name": FILE}),
        (tmp_path, {"subfolder": "sub", "weight_name": "mine.safetensors"}),
    ]
    for source, arguments in sources:
        pipeline = tiny_pipeline()
        pipeline.load_lora_weights(source, **arguments)
        assert pipeline.get_active_adapters() == ["default_0"]
        torch.testing.assert_close(generate(pipeline), adapted)


def test_an_adapter_of_a_repository(pipeline, folder, adapted, tmp_path):
    """From the Hub's cache, by the real client: tests have no network."""
    repository = tmp_path / "models--somebody--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    pipeline.load_lora_weights("somebody/adapter", cache_dir=tmp_path)
    torch.testing.assert_close(generate(pipeline), adapted)
    with pytest.raises(
        InputError, match=r"^There is no folder somebody/nothing, and the Hub is not asked while HF_HUB_OFFLINE"
    ):
        pipeline.load_lora_weights("somebody/nothing", cache_dir=tmp_path)


def test_tensors_of_a_training_script(pipeline, tmp_path):
    """Without configuration the rank is that of the tensors, and alpha equal to it."""
    trained = with_adapter(r=3, lora_alpha=3)
    tensors = get_peft_model_state_dict(trained.unet)
    MedVolumePipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors, safe_serialization=True)
    pipeline.load_lora_weights(tmp_path, low_cpu_mem_usage=True, use_safetensors=True)
    torch.testing.assert_close(generate(pipeline), generate(trained))
    again = tiny_pipeline()
    again.load_lora_weights({f"unet.{name}": value for name, value in tensors.items()})
    torch.testing.assert_close(generate(again), generate(trained))
    MedVolumePipeline.save_lora_weights(tmp_path / "others", tensors, is_main_process=False)
    assert not (tmp_path / "others").exists()


def test_what_the_denoiser_itself_has_saved(pipeline, adapted, tmp_path):
    with_adapter().unet.save_lora_adapter(tmp_path)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(generate(pipeline), adapted)


def test_weights_in_channels_last_are_saved(pipeline, folder, tmp_path):
    trained = with_adapter()
    trained.unet.to(memory_format=torch.channels_last_3d)
    trained.save_lora_weights(tmp_path)
    saved, expected = load_file(tmp_path / FILE), load_file(folder / FILE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_dropout_of_an_adapter_does_not_act_when_generating(pipeline, tmp_path):
    with_adapter(lora_dropout=0.5).save_lora_weights(tmp_path)
    pipeline.load_lora_weights(tmp_path)
    assert not any(module.training for module in pipeline.unet.modules())
    assert torch.equal(generate(pipeline), generate(pipeline))


def test_an_adapter_takes_the_type_of_the_pipeline(pipeline, folder):
    pipeline.to(torch.bfloat16).load_lora_weights(folder)
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
    assert generate(pipeline).isfinite().all()


def test_adapters_of_a_compiled_denoiser(pipeline, folder, adapted, plain, tmp_path):
    def generated():
        with torch.compiler.set_stance("force_eager"):  # compiling takes a minute, and is not what is tested
            return generate(pipeline)

    compiled = pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.load_lora_weights(folder, adapter_name="tuned")
    assert pipeline.get_list_adapters() == {"unet": ["tuned"]}
    assert pipeline.get_active_adapters() == ["tuned"]
    torch.testing.assert_close(generated(), adapted)
    pipeline.save_lora_weights(tmp_path / "adapter")
    trained = with_adapter()
    trained.unet = torch.compile(trained.unet, backend="eager")
    save_lora(trained, tmp_path / "by_a_trainer")
    for name in ("adapter", "by_a_trainer"):
        assert load_file(tmp_path / name / FILE).keys() == load_file(folder / FILE).keys()
    pipeline.disable_lora()
    torch.testing.assert_close(generated(), plain)
    pipeline.enable_lora()
    pipeline.set_adapters("tuned", 0.0)
    torch.testing.assert_close(generated(), plain)
    pipeline.set_adapters("tuned")
    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 1
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.unet is compiled
    torch.testing.assert_close(generated(), adapted, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "pipe")
    loaded = MedVolumePipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), adapted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- mixed and switched


def test_adapters_are_weighted_and_switched(pipeline, folder, adapted, plain, tmp_path):
    pipeline.load_lora_weights(folder, adapter_name="one")
    halved = {name: value / (2 if "lora_B" in name else 1) for name, value in load_file(folder / FILE).items()}
    _, metadata = MedVolumePipeline.lora_state_dict(folder, return_lora_metadata=True)
    MedVolumePipeline.save_lora_weights(
        tmp_path,
        {name.removeprefix("unet."): value for name, value in halved.items()},
        unet_lora_adapter_metadata={name.removeprefix("unet."): value for name, value in metadata.items()},
    )
    pipeline.load_lora_weights(tmp_path, adapter_name="weak")
    assert pipeline.get_list_adapters() == {"unet": ["one", "weak"]}
    pipeline.set_adapters(["one", "weak"], [0.5, 1.0])
    torch.testing.assert_close(generate(pipeline), adapted, rtol=1e-4, atol=1e-4)
    pipeline.set_adapters("weak", 2.0)
    torch.testing.assert_close(generate(pipeline), adapted, rtol=1e-4, atol=1e-4)
    pipeline.set_adapters("one", 0.0)
    torch.testing.assert_close(generate(pipeline), plain)
    pipeline.set_adapters("one")
    torch.testing.assert_close(generate(pipeline), adapted)
    pipeline.disable_lora()
    torch.testing.assert_close(generate(pipeline), plain)
    pipeline.enable_lora()
    torch.testing.assert_close(generate(pipeline), adapted)
    pipeline.save_lora_weights(tmp_path / "again", adapter_name="weak")
    again = load_file(tmp_path / "again" / FILE)
    assert all(torch.equal(again[name], halved[name]) for name in halved)


def test_fused_and_unfused(pipeline, folder, adapted, plain, tmp_path):
    pipeline.load_lora_weights(folder, adapter_name="tuned")
    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 1
    torch.testing.assert_close(generate(pipeline), adapted, rtol=1e-4, atol=1e-4)
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    pipeline.disable_lora()
    torch.testing.assert_close(generate(pipeline), plain, rtol=1e-4, atol=1e-4)
    pipeline.enable_lora()
    pipeline.fuse_lora(adapter_names=["tuned"])
    pipeline.unload_lora_weights()
    torch.testing.assert_close(generate(pipeline), adapted, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    loaded = MedVolumePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), generate(pipeline))


def test_fused_by_half(pipeline, folder):
    pipeline.load_lora_weights(folder, adapter_name="tuned")
    pipeline.set_adapters("tuned", 0.5)
    expected = generate(pipeline)
    pipeline.set_adapters("tuned")
    pipeline.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(generate(pipeline), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_pipeline_with_an_adapter_is_not_saved(pipeline, folder, tmp_path):
    """It would load with newly initialized layers in the adapter's places."""

    def refused(names):
        sentence = rf"^The denoiser carries the LoRA adapter {names} and can't be saved with it: .*save_lora_weights"
        with pytest.raises(InputError, match=sentence):
            pipeline.save_pretrained(tmp_path / "pipe")
        assert not (tmp_path / "pipe").exists()

    pipeline.load_lora_weights(folder, adapter_name="one")
    pipeline.load_lora_weights(folder, adapter_name="two")
    refused("one, two")
    pipeline.fuse_lora()
    refused("one, two")
    pipeline.unfuse_lora()
    pipeline.delete_adapters(["one", "two"])
    refused(r"\(deleted\)")
    with pytest.raises(InputError, match="can't be saved with it"):
        pipeline.push_to_hub("somebody/pipe", token="hf_none")
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "pipe")


def test_only_safetensors_are_read(pipeline, folder, tmp_path):
    torch.save(load_file(folder / FILE), tmp_path / "adapter.bin")
    with pytest.raises(InputError, match=r"adapter\.bin is no safetensors file, and others are not read"):
        pipeline.load_lora_weights(tmp_path, weight_name="adapter.bin")
    with pytest.raises(InputError, match=r"adapter\.bin is no whole safetensors file of an adapter"):
        pipeline.load_lora_weights(tmp_path / "adapter.bin")
    with pytest.raises(InputError, match="Adapters are read from safetensors only: leave use_safetensors out"):
        pipeline.load_lora_weights(folder, use_safetensors=False)
    with pytest.raises(InputError, match="Adapters are written as safetensors only: leave safe_serialization out"):
        with_adapter().save_lora_weights(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match=r"weight_name must end with \.safetensors, got 'adapter\.bin'"):
        with_adapter().save_lora_weights(tmp_path, weight_name="adapter.bin")
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes()[:-100])
    with pytest.raises(InputError, match=r"pytorch_lora_weights\.safetensors is no whole safetensors file"):
        pipeline.load_lora_weights(tmp_path)
    assert not pipeline.get_list_adapters()


def test_folders_and_files_without_an_adapter(pipeline, tmp_path):
    save_file(pipeline.unet.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(
        InputError, match=r"holds no pytorch_lora_weights\.safetensors; give weight_name, of \['unet\.saf"
    ):
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(InputError, match=r"unet\.safetensors holds no LoRA adapter"):
        pipeline.load_lora_weights(tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"^The dict holds no LoRA adapter"):
        pipeline.load_lora_weights({})
    with pytest.raises(InputError, match="nowhere is neither a folder nor a name of a repository on the Hub"):
        pipeline.load_lora_weights(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"block_out_channels": (16, 16)},
            r"is \[2, 8\] \(A.weight\), this one has \[16, 16\] there|is \[2, 8, 3, 3, 3\]",
        ),
        ({"layers_per_block": 2}, "has no such layer"),
    ],
)
def test_an_adapter_of_another_denoiser(folder, tmp_path, changes, sentence):
    pipeline = tiny_pipeline()
    if "layers_per_block" in changes:  # more layers in the file than here
        larger = tiny_pipeline()
        larger.unet = UNet3DModel.from_config(larger.unet.config, **changes)
        with_adapter(pipeline=larger).save_lora_weights(tmp_path)
        folder = tmp_path
    else:
        pipeline.unet = UNet3DModel.from_config(pipeline.unet.config, **changes)
    before = set(pipeline.unet.state_dict())
    with pytest.raises(InputError, match=f"^The adapter is one of another denoiser: .*({sentence})"):
        pipeline.load_lora_weights(folder)
    assert set(pipeline.unet.state_dict()) == before


def test_a_configuration_that_peft_does_not_know(pipeline, folder):
    tensors, metadata = MedVolumePipeline.lora_state_dict(folder, return_lora_metadata=True)
    path = folder.parent / "future.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({**metadata, "unet.telepathy": True})})
    with pytest.raises(InputError, match="configuration is none that this version of peft has: update peft"):
        pipeline.load_lora_weights(path)


def test_names_of_adapters(pipeline, folder, tmp_path):
    with pytest.raises(InputError, match=r"^There is no adapter\.$"):
        pipeline.save_lora_weights(tmp_path)
    with pytest.raises(InputError, match=r"^Give unet_lora_layers, or call save_lora_weights on a pipeline"):
        MedVolumePipeline.save_lora_weights(tmp_path)
    pipeline.load_lora_weights(folder, adapter_name="one")
    with pytest.raises(ValueError, match="one already in use"):
        pipeline.load_lora_weights(folder, adapter_name="one")
    pipeline.load_lora_weights(folder, adapter_name="two")
    with pytest.raises(InputError, match=r"has the adapters \['one', 'two'\]: say which by adapter_name"):
        pipeline.save_lora_weights(tmp_path)
    with pytest.raises(InputError, match=r"no adapter 'three'; there are \['one', 'two'\]"):
        pipeline.save_lora_weights(tmp_path, adapter_name="three")
    with pytest.raises(ValueError, match="three"):
        pipeline.set_adapters("three")
    for name in ("train", "of.two"):
        with pytest.raises(InputError, match=f"^'{name}' can't name an adapter"):
            pipeline.load_lora_weights(folder, adapter_name=name)
    assert not list(tmp_path.iterdir())


def test_a_denoiser_with_an_adapter_is_not_saved_either(tmp_path):
    unet = with_adapter(name="one").unet
    sentence = (
        r"^The denoiser carries the LoRA adapter one and can't .*save_lora_adapter\(FOLDER\), or .*unload_lora\(\)\.$"
    )
    with pytest.raises(InputError, match=sentence):
        unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match=sentence):
        unet.push_to_hub("somebody/unet", token="hf_none")
    assert not (tmp_path / "unet").exists()
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = UNet3DModel.from_pretrained(tmp_path / "unet", variant="fp16")
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())


TRAINERS = [
    (DiffusionPPOTrainer, DiffusionPPOConfig),
    (DiffusionNFTTrainer, DiffusionNFTConfig),
    (RewardBackpropTrainer, RewardBackpropConfig),
]


@pytest.mark.parametrize(("trainer", "config"), TRAINERS)
def test_no_training_on_top_of_an_adapter(pipeline, folder, tmp_path, trainer, config):
    """Its reference is the denoiser without adapters, and what it leaves has them all mixed."""

    def made(use_lora):
        args = config(output_dir=str(tmp_path), report_to="none", use_lora=use_lora)
        return trainer(pipeline, [Brightness()], args, train_conditions=[0, 1])

    def refused(names):
        for use_lora in (True, False):
            sentence = (
                rf"^The denoiser carries the LoRA adapter {names}, .*fuse_lora\(\), then unload_lora_weights\(\)"
            )
            with pytest.raises(InputError, match=sentence):
                made(use_lora)

    pipeline.load_lora_weights(folder, adapter_name="tuned")
    refused("tuned")
    pipeline.disable_lora()
    refused("tuned")
    pipeline.enable_lora()
    pipeline.fuse_lora()
    refused("tuned")
    pipeline.unfuse_lora()
    pipeline.delete_adapters("tuned")
    refused(r"\(deleted\)")
    pipeline.unload_lora_weights()
    assert made(use_lora=True).pipeline.get_list_adapters() == {"unet": ["default"]}
