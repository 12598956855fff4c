"""Image folders: images of any size and mode come in, and what goes wrong is one sentence."""

import numpy as np
import pytest
import torch
from layouts import picture
from tiny import tiny_phantoms

from msrl_diffusers.data.image_folder import (
    ImageDataset,
    check_attributes,
    load_image_folder,
    square_image,
    to_samples,
    to_uint8,
)
from msrl_diffusers.data.prompts import PromptBuilder
from msrl_diffusers.errors import InputError
from msrl_diffusers.evaluation.sources import open_source


BUILDER = PromptBuilder(artifacts=["hair", "gel bubble"])
HEADER = "file_name,subject_id,diagnosis,hair,gel_bubble"
SIZE = 16


def four_rows():
    """Four images with every attribute present and absent."""
    return [f"i{n}.png,s{n},{('melanoma', 'nevus')[n % 2]},{n // 2},{int(n in (1, 2))}" for n in range(4)]


def write_folder(folder, rows=None, header=HEADER, images=None):
    for number, name in enumerate(images or [f"i{n}.png" for n in range(4)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    (folder / "metadata.csv").write_text("\n".join([header, *(four_rows() if rows is None else rows)]) + "\n")
    return folder


def load(folder, **kwargs):
    return load_image_folder(folder, **{"builder": BUILDER, "image_size": SIZE, **kwargs})


def failure(folder, **kwargs):
    with pytest.raises(InputError) as caught:
        load(folder, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def by_subject(images):
    rows = zip(images.subject_ids, images.attributes.tolist(), images.prompts, strict=True)
    return {subject: (values, prompt) for subject, values, prompt in rows}


def some_images(num=8, builder=BUILDER, subjects=None):
    prompts = [builder.prompts()[number % len(builder.prompts())] for number in range(num)]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    subjects = subjects or [f"s{number}" for number in range(num)]
    return ImageDataset(pixels, builder.targets(prompts), builder.attribute_names, prompts, subjects)


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_loads(tmp_path):
    images = load(write_folder(tmp_path))
    assert images.pixel_values.shape == (4, 3, SIZE, SIZE)
    assert images.attribute_names == ("melanoma", "nevus", "hair", "gel bubble")
    assert by_subject(images) == {
        "s0": ([1, 0, 0, 0], "dermoscopy image of melanoma"),
        "s1": ([0, 1, 0, 1], "dermoscopy image of nevus with gel bubble"),
        "s2": ([1, 0, 1, 1], "dermoscopy image of melanoma with hair and gel bubble"),
        "s3": ([0, 1, 1, 0], "dermoscopy image of nevus with hair"),
    }
    row = images.subject_ids.index("s2")
    assert np.array_equal(images.pixel_values[row].numpy(), square_image(picture(2), SIZE, "x"))


def test_isic_tables_have_a_column_per_diagnosis(tmp_path):
    header = "file_name,lesion_id,MEL,NV,BCC,dark_corner,Hair,GEL_Bubble"
    rows = ["i0.png,a,1.0,0.0,0.0,1,0,1", "i1.png,b,0.0,1.0,0.0,1,1,0", "i2.png,c,0.0,0.0,1.0,1,1,1"]
    images = load(write_folder(tmp_path, rows, header), subject_column="lesion_id")
    assert by_subject(images) == {
        "a": ([1, 0, 0, 1], "dermoscopy image of melanoma with gel bubble"),
        "b": ([0, 1, 1, 0], "dermoscopy image of nevus with hair"),
    }
    assert set(load(tmp_path).subject_ids) == {"i0.png", "i1.png"}


def test_images_of_a_participant_are_of_one_subject(tmp_path, caplog):
    """As BIDS calls the column; no split puts a person's images on both sides."""
    rows = [row.replace(f"s{n}", "ab"[n // 2]) for n, row in enumerate(four_rows())]
    images = load(write_folder(tmp_path, rows, HEADER.replace("subject_id", "participant_id")))
    assert images.subject_ids == ["a", "a", "b", "b"]
    assert caplog.messages == []


def test_a_table_that_names_no_subjects_is_pointed_out(tmp_path, caplog):
    write_folder(tmp_path, header=HEADER.replace("subject_id", "patient_id"))
    assert load(tmp_path).subject_ids == [f"i{n}.png" for n in range(4)]
    (warning,) = caplog.messages
    assert warning.startswith("metadata.csv names no subjects, so each of its 4 images counts as one: if people")
    assert load(tmp_path, subject_column="patient_id").subject_ids == ["s0", "s1", "s2", "s3"]
    assert len(caplog.messages) == 1


def test_rows_of_other_diagnoses_are_counted(tmp_path, caplog):
    rows = [*four_rows()[:2], "i2.png,s2,BCC,0,0", "i3.png,s3,MM,1,0", "i3.png,s3,MM,1,0"]
    assert len(load(write_folder(tmp_path, rows), both_classes=False)) == 2
    (warning,) = caplog.messages
    assert warning.startswith(
        f"{tmp_path}/metadata.csv: 3 of 5 rows have a diagnosis that is none of ['melanoma', 'nevus'] and are left out "
        "(2 of 'MM', 1 of 'BCC'); if some mean"
    )
    caplog.clear()
    rows = ["i0.png,s0,1,0,0,1", "i1.png,s1,0,1,1,0", "i2.png,s2,0,0,1,1"]
    load(write_folder(tmp_path, rows, "file_name,subject_id,MEL,NV,hair,gel_bubble"))
    assert (
        "1 of 3 rows have a diagnosis that is none of ['melanoma', 'nevus'] and are left out; if" in caplog.messages[0]
    )


def test_a_subject_that_is_not_known_is_none(tmp_path):
    """Else all of these would be images of one."""
    rows = ["i0.png,n/a,melanoma,0,1", "i1.png,NA,nevus,1,0", "i2.png,s2,nevus,1,0"]
    assert set(load(write_folder(tmp_path, rows)).subject_ids) == {"i0.png", "i1.png", "s2"}


def test_files_of_one_name_in_folders_of_patients_are_subjects_of_their_own(tmp_path):
    """As CheXpert lays them out; by their last names all would be images of one."""
    names = [f"patient{n}/study1/view1_frontal.png" for n in range(4)]
    rows = [f"{name},{row.split(',', 2)[2]}" for name, row in zip(names, four_rows(), strict=True)]
    rows[0] = f"./{rows[0]}"
    images = load(write_folder(tmp_path, rows, "file_name,diagnosis,hair,gel_bubble", names))
    assert images.subject_ids == names
    train, heldout = images.split(0.25)
    assert (len(train), len(heldout)) == (3, 1)


def test_isic_s_own_column_of_images_beside_file_names(tmp_path):
    header = "file_name,image,MEL,NV,hair,gel_bubble"
    rows = ["i0.png,ISIC_0,1.0,0.0,0,1", "i1.png,ISIC_1,0.0,1.0,1,0"]
    assert set(load(write_folder(tmp_path, rows, header)).subject_ids) == {"i0.png", "i1.png"}


def test_diagnoses_may_be_called_by_isic_s_codes(tmp_path):
    rows = ["i0.png,mel,0,1", "i1.png,nv,1,0", "i2.png,melanoma,1,1"]
    images = load(
        write_folder(tmp_path, rows, "file_name,diagnosis,hair,gel_bubble"),
        builder=PromptBuilder(diagnoses=["mel", "nv"], artifacts=["hair", "gel bubble"]),
    )
    assert {subject: values[:2] for subject, (values, _) in by_subject(images).items()} == {
        "i0.png": [1, 0], "i1.png": [0, 1],
    }  # fmt: skip


def test_other_names_in_the_table(tmp_path):
    header = "file_name,finding,hairy,bubbles"
    rows = ["i0.png,NV,no,yes", "i1.png,MM,TRUE,false", "i2.png,other,0,0"]
    images = load(
        write_folder(tmp_path, rows, header), diagnosis_column="finding", diagnosis_names={"mm": "melanoma"},
        artifact_columns={"hair": "hairy", "gel bubble": "bubbles"},
    )  # fmt: skip
    assert by_subject(images) == {
        "i0.png": ([0, 1, 0, 1], "dermoscopy image of nevus with gel bubble"),
        "i1.png": ([1, 0, 1, 0], "dermoscopy image of melanoma with hair"),
    }


def test_folders_whose_names_mean_something_to_others(tmp_path):
    """A folder named test is no split, brackets are no pattern, and images that no row names are left out."""
    names = ["test/i0.png", "train/i 1.JPG", "[a]/i2.png", "i3.png"]
    folder = tmp_path / "my [1] images"
    folder.mkdir()
    rows = [row.replace(f"i{n}.png", names[n]) for n, row in enumerate(four_rows())]
    write_folder(folder, rows, images=[*names, "more.png"])
    assert sorted(load(folder).subject_ids) == ["s0", "s1", "s2", "s3"]


def test_a_table_in_a_folder_below_is_not_asked(tmp_path):
    names = ["below/i0.png", "./i1.png", "below/../i2.png", "i3.png"]
    rows = [row.replace(f"i{n}.png", names[n]) for n, row in enumerate(four_rows())]
    write_folder(tmp_path, rows, images=["below/i0.png", "i1.png", "i2.png", "i3.png"])
    (tmp_path / "below" / "metadata.csv").write_text("name,hair\ni0.png,7\n")
    assert by_subject(load(tmp_path))["s0"] == ([1, 0, 0, 0], "dermoscopy image of melanoma")


def test_a_table_of_another_encoding_is_read(tmp_path):
    write_folder(tmp_path)
    table = tmp_path / "metadata.csv"
    table.write_bytes(table.read_bytes().replace(b"s1", b"s\xe9"))
    images = load(tmp_path)
    assert sorted(images.subject_ids) == ["s0", "s2", "s3", "s\ufffd"]


def test_a_changed_table_is_read_again(tmp_path):
    first = load(write_folder(tmp_path))
    rows = [row.replace("melanoma", "x").replace("nevus", "melanoma").replace("x", "nevus") for row in four_rows()]
    second = load(write_folder(tmp_path, rows))
    assert by_subject(first)["s0"][0] == [1, 0, 0, 0]
    assert by_subject(second)["s0"][0] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("image,subject_id,diagnosis,hair,gel_bubble", "has no column file_name; it has ['image'"),
        ("file_name,subject_id,dx,hair,gel_bubble", "has no column 'diagnosis', nor one for each of ['melanoma', 'nevus']"),
        ("file_name,subject_id,MEL,hair,gel_bubble", "has no column 'diagnosis', nor one for each of"),
        ("file_name,subject_id,diagnosis,hair,gel", "has no column 'gel_bubble' for the artifact 'gel bubble'"),
        ("file_name,Hair,diagnosis,hair,gel_bubble", "has several columns ['Hair', 'hair'] for the artifact 'hair'"),
        ("file_name;subject_id;diagnosis;hair;gel_bubble", "has no column file_name; it has ['file_name;"),
    ],
)  # fmt: skip
def test_missing_columns(tmp_path, header, sentence):
    message = failure(write_folder(tmp_path, header=header))
    assert message.startswith(f"{tmp_path / 'metadata.csv'} ")
    assert sentence in message


def test_columns_that_were_named_and_are_missing(tmp_path):
    write_folder(tmp_path)
    assert "has no column 'patient' of subjects" in failure(tmp_path, subject_column="patient")
    assert "has no column 'h' for the artifact 'hair'" in failure(tmp_path, artifact_columns={"hair": "h"})
    assert "has no column 'dx'" in failure(tmp_path, diagnosis_column="dx")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("i0.png,s0,melanoma,0.7,0", "line 6: column 'hair' must be 0 or 1, got '0.7'"),
        ("i0.png,s0,,0,0", "line 6: column 'diagnosis' is empty"),
        ("gone.png,s0,nevus,0,0", "line 6: the image 'gone.png' is missing; copy it or leave out the row"),
        (",s0,nevus,0,0", "line 6: the image '' is missing"),
        ("i0.png,s0,nevus, of the back,0,0", "line 6 has more cells than the header; quote cells that hold ','"),
        ("i0.png,s0,nevus,0,0", "line 6: i0.png has a row already"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, sentence):
    assert sentence in failure(write_folder(tmp_path, [*four_rows(), row]))


def test_empty_cells_of_an_artifact_are_counted(tmp_path):
    """Those of other diagnoses do not matter."""
    rows = [*four_rows()[:1], "i1.png,s1,eczema,0,", "i2.png,s2,nevus,0,", "i3.png,s3,nevus,1,n/a"]
    assert failure(write_folder(tmp_path, rows)) == (
        f"{tmp_path / 'metadata.csv'}: column 'gel_bubble' is empty in 2 rows (line 4 first): fill it, leave these rows out, or take "
        "'gel bubble' out of artifacts."
    )


def test_an_image_of_two_diagnoses(tmp_path):
    rows = ["i0.png,1,0,0,0", "i1.png,1,1,0,0"]
    sentence = failure(write_folder(tmp_path, rows, "file_name,MEL,NV,hair,gel_bubble"))
    assert "line 3 has the diagnoses ['melanoma', 'nevus']; an image has one" in sentence


def test_no_table_no_rows_or_none_of_these_diagnoses(tmp_path):
    assert "has no metadata.csv; write one with the columns file_name, diagnosis and one per artifact" in failure(
        tmp_path
    )
    assert "metadata.csv has no rows" in failure(write_folder(tmp_path, []))
    rows = [row.replace("melanoma", "eczema").replace("nevus", "wart") for row in four_rows()]
    assert "no row with a diagnosis among ['melanoma', 'nevus']" in failure(write_folder(tmp_path, rows))


@pytest.mark.parametrize(
    ("rows", "name", "value"),
    [
        ([row.replace(",1,", ",0,") for row in four_rows()], "hair", 0),
        ([row.replace("nevus", "melanoma") for row in four_rows()], "melanoma", 1),
    ],
)
def test_an_attribute_of_one_class_only(tmp_path, rows, name, value):
    sentence = failure(write_folder(tmp_path, rows))
    assert f"the attribute {name!r} is {value} in all 4 images; give images with it and without it" in sentence
    assert len(load(tmp_path, both_classes=False)) == 4


# ------------------------------------------------------------------------------------------------------------- images


def test_a_mixed_folder(tmp_path):
    write_folder(tmp_path)
    for number, (mode, size) in enumerate([("L", (50, 30)), ("P", (16, 64)), ("RGBA", (8, 8)), ("1", (33, 33))]):
        picture(number, size, mode).save(tmp_path / f"i{number}.png")
    assert load(tmp_path).pixel_values.shape == (4, 3, SIZE, SIZE)


def test_a_damaged_image_is_named(tmp_path):
    write_folder(tmp_path)
    whole = (tmp_path / "i2.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>please log in</html>", b""):
        (tmp_path / "i2.png").write_bytes(content)
        sentence = failure(tmp_path)
        assert sentence.startswith(f"{tmp_path / 'i2.png'} can't be read as an image (")
        assert sentence.endswith("copy or convert it again.")


def test_a_file_that_is_no_image_is_named(tmp_path):
    rows = [row.replace("i3.png", "notes.txt") for row in four_rows()]
    write_folder(tmp_path, rows)
    (tmp_path / "notes.txt").write_text("none")
    assert f"{tmp_path / 'notes.txt'} can't be read as an image" in failure(tmp_path)


# --------------------------------------------------------------------------------------------------------------- sets


def test_samples_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    samples = to_samples(levels)
    assert (samples.min(), samples.max()) == (-1, 1)
    assert torch.equal(to_uint8(samples), levels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.999, 1.0, 1.2])).tolist() == [
        0,
        0,
        255,
        255,
        255,
    ]  # no wrapping around


def test_a_batch():
    images = some_images()
    batch = images.batch(torch.tensor([5, 1]))
    torch.testing.assert_close(batch["pixel_values"], images.pixel_values[[5, 1]].float() / 127.5 - 1)
    assert batch["attributes"].dtype == torch.float32
    assert batch["attributes"].tolist() == images.attributes[[5, 1]].tolist()
    assert batch["prompt"] == [images.prompts[5], images.prompts[1]]
    assert batch["subject_id"] == ["s5", "s1"]
    assert images.select([5, 1]).subject_ids == ["s5", "s1"]


def test_a_mask_chooses_where_it_is_true():
    images, volumes = some_images(), tiny_phantoms()
    mask = images.attributes[:, 0] == 0
    rows = mask.nonzero()[:, 0].tolist()
    assert 0 < len(rows) < len(images)
    for chosen in (mask, mask.tolist(), mask.numpy()):
        assert torch.equal(images.select(chosen).pixel_values, images.pixel_values[rows])
        assert images.batch(chosen)["subject_id"] == [images.subject_ids[row] for row in rows]
    sick = volumes.class_labels == 1
    source = open_source(volumes)
    assert volumes.select(sick).subject_ids == volumes.batch(sick)["subject_id"] == volumes.subject_ids[1::2]
    assert torch.equal(volumes.batch(sick)["pixel_values"], volumes.pixel_values[1::2].float())
    assert source.select(sick).names == volumes.subject_ids[1::2]
    assert torch.equal(source.take(sick), volumes.pixel_values[1::2].float())
    for select in (images.select, images.batch, volumes.select, volumes.batch, source.select, source.take):
        with pytest.raises(InputError, match=r"A mask of \d rows needs one truth value for each, got shape \[3\]"):
            select([True, False, True])


def test_a_set_of_samples():
    prompts = BUILDER.prompts()[:3]
    samples = torch.rand(3, 3, SIZE, SIZE) * 2.4 - 1.2
    images = ImageDataset.from_samples(samples, prompts, BUILDER, name="standard")
    assert torch.equal(images.attributes.float(), BUILDER.targets(prompts))
    assert images.subject_ids == ["standard-000000", "standard-000001", "standard-000002"]
    assert (to_samples(images.pixel_values) - samples.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    both = ImageDataset.cat([some_images(4), images])
    assert len(both) == 7
    assert both.prompts[4:] == prompts
    assert torch.equal(both.pixel_values[4:], images.pixel_values)
    with pytest.raises(InputError, match="outside the templates"):
        ImageDataset.from_samples(samples, [*prompts[:2], "a cat"], BUILDER)
    with pytest.raises(InputError, match="got 2 kinds"):
        ImageDataset.cat([images, some_images(4, PromptBuilder())])


def test_save_and_load(tmp_path):
    images = some_images()
    images.save(tmp_path / "deep" / "images.safetensors")
    loaded = ImageDataset.load(tmp_path / "deep" / "images.safetensors")
    assert torch.equal(loaded.pixel_values, images.pixel_values)
    assert torch.equal(loaded.attributes, images.attributes)
    for name in ("attribute_names", "prompts", "subject_ids"):
        assert getattr(loaded, name) == getattr(images, name)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["images.safetensors"]
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad", "gone"):
        with pytest.raises(InputError, match=f"{name}.safetensors can't be read as a set of images"):
            ImageDataset.load(tmp_path / f"{name}.safetensors")


def test_a_split_keeps_subjects_apart_and_prompts_together():
    subjects = [f"s{number // 2}" for number in range(160)]  # two images of each, the first one's prompt counts
    images = some_images(160, subjects=subjects)
    train, heldout = images.split(0.25, seed=1)
    assert not set(train.subject_ids) & set(heldout.subject_ids)
    assert sorted(train.subject_ids + heldout.subject_ids) == sorted(subjects)
    assert len(set(heldout.subject_ids)) == 20
    firsts = dict(zip(subjects[::2], images.prompts[::2], strict=True))
    counts = [
        sum(firsts[subject] == prompt for subject in set(heldout.subject_ids)) for prompt in set(firsts.values())
    ]
    assert counts == [5, 5, 5, 5]
    assert images.split(0.25, seed=1)[1].subject_ids == heldout.subject_ids
    assert images.split(0.25, seed=2)[1].subject_ids != heldout.subject_ids


def test_prompts_with_one_subject_each_can_be_split():
    train, heldout = some_images(8).split(0.25)
    assert (len(train), len(heldout)) == (6, 2)


@pytest.mark.parametrize(
    ("fraction", "sentence"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.01, "too few for a hold-out")]
)
def test_a_split_that_can_t_be_made(fraction, sentence):
    with pytest.raises(InputError, match=sentence):
        some_images().split(fraction)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": ["one"]}, "8 images, 8 rows of attributes, 1 prompts, 8 subject ids: not equal"),
        (
            {"pixel_values": torch.zeros(8, 3, 4, 4)},
            r"uint8 \[N, 3, H, W\], got torch.float32 \[8, 3, 4, 4\]; to_uint8",
        ),
        ({"pixel_values": torch.zeros(8, 1, 4, 4, dtype=torch.uint8)}, r"got torch.uint8 \[8, 1, 4, 4\]"),
        ({"attributes": torch.zeros(8, 3)}, r"8 images with 4 attributes need as many zeros and ones, got \[8, 3\]"),
        ({"attributes": torch.full((8, 4), 0.5)}, "0 or 1; threshold probabilities first"),
    ],
)
def test_fields_that_do_not_fit_are_refused(change, sentence):
    images = some_images()
    names = ("pixel_values", "attributes", "attribute_names", "prompts", "subject_ids")
    with pytest.raises(InputError, match=sentence):
        ImageDataset(**{**{name: getattr(images, name) for name in names}, **change})


def test_both_classes_are_asked_for():
    images = some_images()
    check_attributes(images, "These")
    with pytest.raises(InputError, match="These: the attribute 'melanoma' is 1 in all 4 images"):
        check_attributes(images.select(range(4)), "These")
    with pytest.raises(InputError, match="in all 0 images"):
        check_attributes(images.select([]), "These")
