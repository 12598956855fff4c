"""Feature networks: what they compute, that id and hash follow it, and that wrong weights are one sentence."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet50
from safetensors.torch import load_file, save_file
from tiny import tiny_phantoms
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from msrl_diffusers import SliceFeatureExtractor, VolumeFeatureExtractor
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.extractors import (
    MedicalNetExtractor,
    RadImageNetExtractor,
    load_extractor,
)
from msrl_diffusers.evaluation.features import extract_features, extractor_identity, source_features
from msrl_diffusers.evaluation.sources import open_source
from msrl_diffusers.models.feature_extractors import plane_slices


def failure(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def own_network(network_class=SliceFeatureExtractor, seed=0):
    torch.manual_seed(seed)
    settings = {"num_slices": 3} if network_class is SliceFeatureExtractor else {}
    return network_class(block_out_channels=(8, 8), num_features=5, **settings)


def resnet50_weights(spatial_dims, in_channels, bias, seed=0):
    """Weights of a ResNet-50 in the names that MONAI and torchvision share: every tensor random, none at its default."""
    network = resnet50(
        spatial_dims=spatial_dims, n_input_channels=in_channels, feed_forward=False, bias_downsample=False
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.ndim > 1:
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
            if bias:
                weights[name.replace("weight", "bias")] = 0.3 * torch.randn(len(tensor), generator=generator)
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.3 * torch.randn(tensor.shape, generator=generator)
        else:
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return weights


def resnet50_features(weights, images, first_strides, dilations, stride_in_first, eps):
    """The pooled features of a ResNet-50 with these weights, spelled out."""
    convolve, pool = (F.conv3d, F.max_pool3d) if images.ndim == 5 else (F.conv2d, F.max_pool2d)

    def conv(hidden, name, **options):
        return convolve(hidden, weights[name + ".weight"], weights.get(name + ".bias"), **options)

    def norm(hidden, name):
        mean, variance, scale, shift = (weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
        return F.batch_norm(hidden, mean, variance, scale, shift, eps=eps)

    hidden = pool(norm(conv(images, "conv1", stride=2, padding=3), "bn1").relu(), 3, stride=2, padding=1)
    for layer, (blocks, first_stride, dilation) in enumerate(
        zip((3, 4, 6, 3), first_strides, dilations, strict=True), 1
    ):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", first_stride if block == 0 else 1
            strides = (stride, 1) if stride_in_first else (1, stride)
            inner = norm(conv(hidden, f"{name}.conv1", stride=strides[0]), f"{name}.bn1").relu()
            inner = conv(inner, f"{name}.conv2", stride=strides[1], padding=dilation, dilation=dilation)
            inner = norm(conv(norm(inner, f"{name}.bn2").relu(), f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                hidden = norm(conv(hidden, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
            hidden = (hidden + inner).relu()
    return hidden.flatten(2).mean(dim=2)


@pytest.fixture(scope="module")
def medicalnet_weights():
    return resnet50_weights(3, 1, bias=False)


@pytest.fixture(scope="module")
def radimagenet_weights():
    return resnet50_weights(2, 3, bias=True)


@pytest.fixture
def saved(tmp_path):
    """Writes weights to a file, which is deleted after the test: they are large."""
    path = tmp_path / "weights.safetensors"

    def save(weights):
        save_file(weights, path)
        return path

    yield save
    path.unlink(missing_ok=True)


@pytest.fixture
def vit(tmp_path):
    """The folder of a tiny ViT with its image processor."""
    torch.manual_seed(0)
    ViTModel(vit_config()).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def vit_config():
    return ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )


def volumes_of(count=2, channels=1, edge=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, edge, edge, edge, generator=generator) * 2 - 1


def test_slices_lie_in_the_middle_of_each_plane():
    places = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(20), torch.arange(30), indexing="ij")).float()
    axial, coronal, sagittal = plane_slices(places[None], 3)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((1, 3, 3, 20, 30), (1, 3, 3, 10, 30), (1, 3, 3, 10, 20))
    assert axial[0, :, 0, 0, 0].tolist() == [2, 4, 7]
    assert coronal[0, :, 1, 0, 0].tolist() == [4, 10, 15]
    assert sagittal[0, :, 2, 0, 0].tolist() == [6, 14, 23]
    assert axial[0, 0, 1:, 5, 7].tolist() == [5, 7]


@pytest.mark.parametrize(
    ("network_class", "kind", "detail", "shape"),
    [
        (SliceFeatureExtractor, "slices", "3 slices", (3, 3, 5)),
        (VolumeFeatureExtractor, "volumes", "whole", (1, 1, 5)),
    ],
)
def test_own_extractors_load_from_their_folder(network_class, kind, detail, shape, tmp_path):
    network = own_network(network_class)
    network.save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path))
    assert extractor.identity == {
        "id": f"{kind}/{network_class.__name__}/{detail}",
        "sha256": extractor_identity(network)["sha256"],
    }
    assert extractor.num_features == 5
    features = extractor(volumes_of())
    assert features.shape == (2, *shape)
    assert torch.equal(features, network.eval()(volumes_of()))
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not extractor.train().network.training
    assert "takes cubes of 1 channels, these volumes are 2 x 16 x 16 x 16" in failure(
        extractor, volumes_of(channels=2)
    )
    assert "1 x 16 x 16 x 12; give --image_size" in failure(extractor, volumes_of()[..., :12])


def test_folders_of_something_else(tmp_path, vit):
    assert "no config.json of an extractor" in failure(load_extractor, str(tmp_path))
    assert f"a model of transformers is given as transformers:{vit}" in failure(load_extractor, str(vit))
    own_network().save_pretrained(tmp_path / "own")
    weights = load_file(tmp_path / "own" / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "project.bias"},
              tmp_path / "own" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    assert "lacks weights of SliceFeatureExtractor, such as project.bias" in failure(
        load_extractor, str(tmp_path / "own")
    )
    (tmp_path / "own" / "diffusion_pytorch_model.safetensors").unlink()
    assert "own holds no SliceFeatureExtractor: Error no file named" in failure(load_extractor, str(tmp_path / "own"))


def test_specs_that_name_nothing(tmp_path):
    assert "'vgg:x' is no folder, nor does it begin with one of ['inception'" in failure(load_extractor, "vgg:x")
    assert "give it as medicalnet:WEIGHTS.safetensors" in failure(load_extractor, "medicalnet")
    assert "give it as transformers:NAME_OR_FOLDER" in failure(load_extractor, "transformers:")
    assert "none.safetensors does not exist" in failure(load_extractor, f"medicalnet:{tmp_path}/none.safetensors")
    (tmp_path / "resnet_50.pth").write_bytes(b"x")
    sentence = failure(load_extractor, f"medicalnet:{tmp_path}/resnet_50.pth")
    assert "resnet_50.pth is no .safetensors file" in sentence
    assert "weights_only=True" in sentence
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    assert "can't be read as safetensors" in failure(load_extractor, f"radimagenet:{tmp_path}/bad.safetensors")


def test_medicalnet_computes_what_its_authors_network_does(medicalnet_weights, saved):
    """That of github.com/Tencent/MedicalNet: a stride of 2 in front, the last two layers dilated by 2 and 4."""
    path = saved({f"module.{name}": tensor for name, tensor in medicalnet_weights.items()})
    extractor = load_extractor(f"medicalnet:{path}")
    volumes = volumes_of(edge=40)[..., :16, :16] * 0.3 + 0.1  # the last layer has five places along D to dilate over
    features = extractor(volumes)
    assert (features.shape, features.dtype, extractor.num_features) == ((2, 1, 1, 2048), torch.float32, 2048)
    normal = torch.stack([(volume - volume.mean()) / volume.std() for volume in volumes])
    expected = resnet50_features(medicalnet_weights, normal, (1, 2, 1, 1), (1, 1, 2, 4), False, eps=1e-5)
    torch.testing.assert_close(features[:, 0, 0], expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    assert expected.std(dim=1).min() > 0.1
    two = extractor(torch.cat([volumes, volumes.flip(0)], dim=1))
    torch.testing.assert_close(two, torch.cat([features, features.flip(0)], dim=1), rtol=1e-4, atol=1e-3)
    assert extractor(torch.zeros(1, 1, 16, 16, 16)).isfinite().all()
    unprefixed = MedicalNetExtractor(medicalnet_weights, "file")
    assert unprefixed.identity == extractor.identity
    assert unprefixed.sha256 != MedicalNetExtractor({**medicalnet_weights, "conv1.weight": torch.zeros(64, 1, 7, 7, 7)}, "file").sha256  # fmt: skip


def test_weights_of_another_network(medicalnet_weights, radimagenet_weights):
    sentence = failure(MedicalNetExtractor, radimagenet_weights, "file")
    assert "file does not hold the weights of MedicalNet's ResNet-50: " in sentence
    assert "convert resnet_50_23dataset" in sentence
    lacking = {name: tensor for name, tensor in medicalnet_weights.items() if name != "layer2.1.bn3.running_var"}
    sentence = failure(MedicalNetExtractor, lacking, "file")
    assert "1 tensors are missing, unknown or of another shape, such as layer2.1.bn3.running_var" in sentence
    assert "such as fc.weight" in failure(
        MedicalNetExtractor, {**medicalnet_weights, "fc.weight": torch.zeros(2)}, "file"
    )
    assert "RadImageNet's ResNet-50" in failure(RadImageNetExtractor, medicalnet_weights, "file")


def test_radimagenet_computes_what_keras_does(radimagenet_weights, saved):
    """With biases, the stride in the first convolution of a block, and Keras' epsilon; images in blue, green, red."""
    extractor = load_extractor(f"radimagenet:{saved(radimagenet_weights)}")
    volumes = volumes_of(count=1, edge=12)
    features = extractor(volumes)
    assert features.shape == (1, 3, 8, 2048)
    for plane, place in ((0, 0), (2, 7)):
        image = plane_slices(volumes, 8)[plane][0, place][None]
        image = F.interpolate((image + 1) / 2, (224, 224), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)
        image = image - torch.tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)
        expected = resnet50_features(radimagenet_weights, image, (1, 2, 2, 2), (1, 1, 1, 1), True, eps=1.001e-5)
        torch.testing.assert_close(features[:, plane, place], expected, rtol=1e-3, atol=1e-4 * expected.max().item())
    assert extractor.identity["id"] == "radimagenet/resnet50/pooled/8 slices/224 bilinear/less means"


def test_a_vision_transformer_sees_rgb_slices(vit):
    extractor = load_extractor(f"transformers:{vit}")
    volumes = volumes_of(channels=2)
    features = extractor(volumes)
    assert (features.shape, extractor.num_features) == ((2, 6, 8, 12), 12)  # two channels are planes of their own
    model, processor = ViTModel.from_pretrained(vit).eval(), ViTImageProcessorPil.from_pretrained(vit)
    for plane, axis, channel in ((0, 0, 0), (3, 1, 1), (5, 2, 1)):
        for volume in range(2):
            image = plane_slices(volumes, 8)[axis][volume, 3, channel]
            pixels = ((image + 1) * 127.5).round().byte().repeat(3, 1, 1)
            with torch.no_grad():
                expected = model(**processor(images=pixels, return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(features[volume, plane, 3], expected, rtol=1e-4, atol=1e-5)
    assert extractor.id.startswith("transformers/ViTModel/pooled/8 slices/ViTImageProcessorPil ")


def test_a_model_without_a_trained_pooler_gives_the_mean(vit):
    """Transformers draws the missing pooler at random: neither features nor hash may depend on it."""
    torch.manual_seed(1)
    classifier = ViTForImageClassification(vit_config()).eval()
    classifier.save_pretrained(vit)
    first, second = load_extractor(f"transformers:{vit}"), load_extractor(f"transformers:{vit}")
    assert not torch.equal(first.network.pooler.dense.weight, second.network.pooler.dense.weight)
    assert first.identity == second.identity
    assert "/ViTModel/mean/" in first.id
    features = first(volumes_of())
    assert torch.equal(features, second(volumes_of()))
    image = plane_slices(volumes_of(), 8)[0][0, 0]
    pixels = first.processor(images=((image + 1) * 127.5).round().byte().repeat(3, 1, 1), return_tensors="pt")
    with torch.no_grad():
        expected = classifier.vit(**pixels).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(features[0, 0, :1], expected, rtol=1e-4, atol=1e-5)


def test_other_vision_models(vit):
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 10], depths=[1, 1])).save_pretrained(vit)
    assert load_extractor(f"transformers:{vit}")(volumes_of()).shape == (2, 3, 8, 10)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    segformer = {"hidden_sizes": [4, 6], "depths": [1, 1], "num_attention_heads": [1, 1], "num_encoder_blocks": 2,
                 "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [4, 2], "mlp_ratios": [1, 1]}  # fmt: skip
    SegformerModel(SegformerConfig(**segformer)).save_pretrained(vit)
    extractor = load_extractor(f"transformers:{vit}")  # a map of features, and no pooled output
    image = plane_slices(volumes_of(), 8)[0][0, 0]
    pixels = extractor.processor(images=((image + 1) * 127.5).round().byte().repeat(3, 1, 1), return_tensors="pt")
    expected = SegformerModel.from_pretrained(vit).eval()(**pixels).last_hidden_state
    assert expected.shape == (1, 6, 4, 4)
    torch.testing.assert_close(extractor(volumes_of())[0, 0, 0], expected.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    text, vision = {**sizes, "vocab_size": 9}, {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(vit)
    extractor = load_extractor(f"transformers:{vit}")
    assert extractor(volumes_of()).shape == (2, 3, 8, 8)
    assert not any("text" in name for name in extractor.state_dict())


def test_identity_follows_preprocessing_and_weights(vit):
    before = load_extractor(f"transformers:{vit}")
    settings = json.loads((vit / "preprocessor_config.json").read_text())
    (vit / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4, 0.5, 0.5]}))
    after = load_extractor(f"transformers:{vit}")
    assert after.sha256 == before.sha256
    assert after.id != before.id
    weights = load_file(vit / "model.safetensors")
    save_file(
        {**weights, "layernorm.bias": weights["layernorm.bias"] + 1}, vit / "model.safetensors", {"format": "pt"}
    )
    assert load_extractor(f"transformers:{vit}").sha256 != before.sha256


def test_models_that_transformers_cannot_load(vit):
    sentence = failure(load_extractor, "transformers:nobody/no-such-model")
    assert "transformers:nobody/no-such-model can't be loaded" in sentence
    weights = load_file(vit / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "layernorm.bias"}, vit / "model.safetensors", {"format": "pt"})
    assert "lacks weights of its ViTModel, such as layernorm.bias" in failure(load_extractor, f"transformers:{vit}")
    (vit / "preprocessor_config.json").unlink()
    assert "can't be loaded" in failure(load_extractor, f"transformers:{vit}")


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install -e '.[evaluation]'" in failure(load_extractor, "inception")


def test_inception_with_given_weights(monkeypatch, saved):
    """Random weights, as torch-fidelity would download the real ones."""
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = NoTrainInceptionV3("random", ["2048"])
    path = saved(network.state_dict())
    extractor = load_extractor(f"inception:{path}")
    volumes = volumes_of(count=1)
    features = extractor(volumes)
    assert features.shape == (1, 3, 8, 2048)
    image = plane_slices(volumes, 8)[1][0, 4][None]
    expected = network(((image + 1) * 127.5).round().byte().repeat(1, 3, 1, 1))
    torch.testing.assert_close(features[:, 1, 4], expected, rtol=1e-3, atol=1e-4)
    saved({"a": torch.zeros(1)})
    assert f"{path} does not hold the weights of the FID's Inception-v3" in failure(
        load_extractor, f"inception:{path}"
    )


def test_features_of_a_source_are_those_of_its_volumes(capsys):
    dataset, network = tiny_phantoms(), own_network()
    source = open_source(dataset)
    features = source_features(network, source, batch_size=4)
    assert "6/6" in capsys.readouterr().err
    assert (features.shape, features.dtype) == ((6, 3, 3, 5), torch.float32)
    expected = extract_features(network, dataset.pixel_values).float()
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(source_features(network, source.select([4, 1]), 1, False), expected[[4, 1]], rtol=1e-5, atol=1e-5)  # fmt: skip
    assert capsys.readouterr().err == ""
    assert features.flatten(1).std(dim=0).min() > 0
    assert "holds no volumes" in failure(source_features, network, source.select([]))
