import numpy as np
import pytest
import torch

from msrl_diffusers.data.dermoscopy import load_dermoscopy, make_image, write_dermoscopy
from msrl_diffusers.data.image_folder import load_image_folder
from msrl_diffusers.data.prompts import ARTIFACTS, DIAGNOSES, PromptBuilder
from msrl_diffusers.errors import InputError


SIZES = (32, 64)


def difference(index, artifact, size, diagnosis="nevus", others=()):
    """How far the channels of each pixel move, `[H, W]` on [0, 2], when an artifact comes in."""
    attributes = {diagnosis: True, **dict.fromkeys(others, True)}
    without, with_it = (make_image(index, {**attributes, artifact: shown}, size) for shown in (False, True))
    return np.abs(with_it - without).max(axis=0)


def test_an_image_is_rgb_in_the_range_and_a_function_of_its_arguments():
    attributes = {"melanoma": True, "hair": True, "ink": True}
    image = make_image(3, attributes, 32, seed=1)
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.float32
    assert -1 <= image.min() < image.max() <= 1
    assert np.array_equal(image, make_image(3, {**attributes, "nevus": False, "ruler": 0}, 32, seed=1))
    others = [make_image(4, attributes, 32, seed=1), make_image(3, attributes, 32), make_image(3, {"nevus": True}, 32)]
    assert all(np.abs(image - other).mean() > 0.02 for other in others)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_an_artifact_is_visible_and_leaves_the_rest_alone(artifact, size):
    for index in range(12):
        change = difference(index, artifact, size, DIAGNOSES[index % 2])
        assert (change > 0.4).mean() > 0.02, index  # a fifth of the range, in one pixel of fifty
        assert (change < 1e-3).mean() > 0.4, index


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_an_artifact_looks_the_same_whatever_else_is_there(artifact):
    """A classifier can't read one attribute off another: what is drawn does not depend on the others."""
    others = [name for name in ARTIFACTS if name != artifact]
    for index in range(4):
        alone, among = (difference(index, artifact, 64, others=some) > 0.15 for some in ((), others))
        assert (among & ~alone).mean() < 0.02
        assert (alone & among).sum() > 0.5 * alone.sum()


def lesion_of(index, diagnosis):
    """Pixels darker than the skin of a bare image, `[H, W]`."""
    image = make_image(index, {diagnosis: True}, 64)
    light = image.mean(axis=0)
    corner = np.median([light[:8, :8], light[:8, -8:], light[-8:, :8], light[-8:, -8:]])
    return light < corner - 0.22, image


def test_a_nevus_is_round_and_brown_and_a_melanoma_neither():
    asymmetry, veil = {name: [] for name in DIAGNOSES}, {name: [] for name in DIAGNOSES}
    for diagnosis in DIAGNOSES:
        for index in range(12):
            mask, image = lesion_of(index, diagnosis)
            assert 0.03 < mask.mean() < 0.4
            turned = np.zeros_like(mask)  # about its middle, by half a turn
            rows, columns = np.nonzero(mask)
            turned[np.clip((2 * rows.mean() - rows).round().astype(int), 0, 63),
                   np.clip((2 * columns.mean() - columns).round().astype(int), 0, 63)] = True  # fmt: skip
            asymmetry[diagnosis].append((mask ^ turned).sum() / mask.sum())
            veil[diagnosis].append(float((image[2] > image[0] + 0.05).mean()))  # more blue than red
    assert np.mean(asymmetry["nevus"]) < 0.1 < 0.2 < np.mean(asymmetry["melanoma"])
    assert max(veil["nevus"]) == 0
    assert min(veil["melanoma"]) > 0.005


def test_skin_light_and_size_vary():
    corners = np.stack([make_image(index, {"nevus": True}, 32)[:, 2:6, 2:6].mean(axis=(1, 2)) for index in range(30)])
    assert (corners.std(axis=0) > 0.08).all()
    areas = [lesion_of(index, "nevus")[0].mean() for index in range(12)]
    assert max(areas) > 1.3 * min(areas)


def test_one_picture_at_any_size():
    attributes = {"melanoma": True, "gel bubble": True, "ruler": True, "ink": True}
    large = torch.from_numpy(make_image(0, attributes, 128))[None]
    small = torch.nn.functional.avg_pool2d(large, 4)[0]
    image = torch.from_numpy(make_image(0, attributes, 32))
    correlation = torch.corrcoef(torch.stack([small.flatten(), image.flatten()]))[0, 1]
    assert correlation > 0.9


def test_a_set_has_every_prompt_and_no_lesion_twice():
    images = load_dermoscopy(2, 16, seed=3)
    builder = PromptBuilder()
    assert images.prompts == builder.prompts() * 2
    assert images.pixel_values.shape == (64, 3, 16, 16)
    assert torch.equal(images.attributes.float(), builder.targets(images.prompts))
    assert len(set(images.subject_ids)) == 64
    expected = (make_image(33, builder.parse(images.prompts[33]), 16, seed=3) + 1) * 127.5
    assert np.array_equal(images.pixel_values[33].numpy(), np.rint(expected).astype(np.uint8))
    second = load_dermoscopy(1, 16, seed=3, first_index=1)
    assert torch.equal(second.pixel_values, images.pixel_values[32:])
    assert second.subject_ids == images.subject_ids[32:]
    skins = images.pixel_values[:, :, 1, 8].tolist()
    assert len({tuple(skin) for skin in skins}) > 60


def test_written_images_load_as_an_image_folder(tmp_path):
    write_dermoscopy(tmp_path / "images", 1, 16, seed=2)
    header = (tmp_path / "images" / "metadata.csv").read_text().splitlines()[0]
    assert header == "file_name,subject_id,diagnosis,hair,gel_bubble,ruler,ink"
    loaded, drawn = load_image_folder(tmp_path / "images", image_size=16), load_dermoscopy(1, 16, seed=2)
    order = torch.tensor([loaded.subject_ids.index(subject) for subject in drawn.subject_ids])
    loaded = loaded.select(order)
    assert torch.equal(loaded.pixel_values, drawn.pixel_values)
    assert torch.equal(loaded.attributes, drawn.attributes)
    assert (loaded.prompts, loaded.attribute_names) == (drawn.prompts, drawn.attribute_names)


def test_what_can_t_be_drawn_is_refused():
    for attributes in ({}, {"hair": True}, {"melanoma": True, "nevus": True}):
        with pytest.raises(InputError, match="one of the diagnoses"):
            make_image(0, attributes)
    with pytest.raises(InputError, match="no attribute 'freckle'"):
        make_image(0, {"nevus": True, "freckle": True})
    with pytest.raises(InputError, match="at least 16 pixels along an edge, got 8"):
        make_image(0, {"nevus": True}, 8)
    for arguments in ((0,), (1, 16, 0, -1)):
        with pytest.raises(InputError, match="At least one image per prompt"):
            load_dermoscopy(*arguments)
