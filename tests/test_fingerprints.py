"""Fingerprints of stages: they follow all that a result depends on, and nothing else."""

import hashlib
import os
import shutil

import pytest
from layouts import write_datalist
from tiny import settings_with, tiny_phantoms

from msrl_diffusers import StudyConfig, write_phantoms
from msrl_diffusers.errors import InputError
from msrl_diffusers.files import file_mark, folder_mark
from msrl_diffusers.study import STAGES
from msrl_diffusers.study.chain import fingerprint, study_chain


def test_a_fingerprint_follows_what_a_stage_depends_on(tmp_path):
    base = settings_with(tmp_path)
    changed = {
        "num_per_class": set(STAGES),
        "unet": set(STAGES) - {"prepare", "extractors", "vqgan"},
        "target_map": {"score", "rewards", "validity", "ppo", "evaluate", "downstream", "report"},
        "bootstrap_draws": {"evaluate", "baseline_downstream", "downstream", "report"},
        "downstream": {"baseline_downstream", "downstream", "report"},
        "sampling_batch_size": set(),  # what is tuned for memory costs nothing that is done
        "output_dir": set(),
    }
    values = {
        "num_per_class": 5,
        "unet": {"dropout": 0.1},
        "target_map": "rank",
        "sampling_batch_size": 3,
        "bootstrap_draws": 3,
        "downstream": {"widen_factor": 0.125},
    }
    for field, stages in changed.items():
        other = (
            settings_with(tmp_path / "b")
            if field == "output_dir"
            else settings_with(tmp_path, **{field: values[field]})
        )
        assert {name for name in STAGES if fingerprint(base, name) != fingerprint(other, name)} == stages, field


def test_a_fingerprint_follows_the_files_it_is_given(tmp_path):
    write_phantoms(tmp_path / "data", 2, image_size=16)
    config = settings_with(tmp_path, dataset="nifti_folder", data_dir=str(tmp_path / "data"))
    before = fingerprint(config, "prepare")
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    moved = settings_with(tmp_path, dataset="nifti_folder", data_dir=str(tmp_path / "elsewhere"))
    assert fingerprint(moved, "prepare") == before
    (tmp_path / "data" / "metadata.csv").write_text(
        (tmp_path / "data" / "metadata.csv").read_text().replace("HGG", "LGG", 1)
    )
    assert fingerprint(config, "prepare") != before


def test_the_mark_of_a_folder_knows_what_lies_behind_links(tmp_path):
    for name in ("data", "store"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "sub-01").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "data")
    before = folder_mark(tmp_path / "data")
    (tmp_path / "store" / "image.nii").write_bytes(b"1")
    assert folder_mark(tmp_path / "data") != before


def test_the_mark_of_a_folder_passes_over_hidden_files(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id")
    before = folder_mark(tmp_path)
    (tmp_path / ".~lock.participants.tsv#").write_text("open in an editor")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"1")
    assert folder_mark(tmp_path) == before


def test_a_fingerprint_follows_the_images_of_a_list(tmp_path):
    path = write_datalist(tmp_path / "lists")
    for place in (path, path.parent):
        config = settings_with(tmp_path, dataset="datalist", data_dir=str(place))
        before = fingerprint(config, "prepare")
        image = next((path.parent / "imagesTr").iterdir())
        image.write_bytes(image.read_bytes() + b"more")
        assert fingerprint(config, "prepare") != before


def test_outputs_in_the_folder_of_a_data_set_are_refused(tmp_path):
    write_phantoms(tmp_path / "data", 2, image_size=16)
    settings = {"dataset": "nifti_folder", "data_dir": str(tmp_path / "data")}
    with pytest.raises(InputError, match=r"output_dir=.*study lies in data_dir=.*data; give a folder outside it"):
        StudyConfig(**settings, output_dir=str(tmp_path / "data" / "study"))
    assert StudyConfig(**settings, output_dir=str(tmp_path / "data-study")).data_dir
    lists = write_datalist(tmp_path / "lists").parent  # its images are known one by one
    assert StudyConfig(dataset="datalist", data_dir=str(lists), output_dir=str(lists / "study")).data_dir
    (tmp_path / "release").mkdir()
    with pytest.raises(InputError, match=r"release/tuned lies in pretrained=.*release; give a folder outside it"):
        StudyConfig(output_dir=str(tmp_path / "release/tuned"), pretrained=str(tmp_path / "release"))


def test_the_mark_of_given_files_is_theirs_and_they_are_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"c" * 300_000)
    parts = b"a/b 5\n12345c 300000\n" + b"c" * (1 << 18)
    assert folder_mark(tmp_path) == hashlib.sha256(parts).hexdigest()[:16]
    assert file_mark(tmp_path / "c") == hashlib.sha256(b"300000" + b"c" * 300_000).hexdigest()[:16]
    (tmp_path / "table.csv").write_bytes(b"t" * 300_000)
    tables = parts + b"table.csv 300000\n" + b"t" * 300_000
    assert folder_mark(tmp_path) == hashlib.sha256(tables).hexdigest()[:16]
    (tmp_path / "table.csv").unlink()
    (tmp_path / "README.md").write_text("A card, rendered anew.")
    assert folder_mark(tmp_path) == hashlib.sha256(parts).hexdigest()[:16]
    before, times = folder_mark(tmp_path), (tmp_path / "a" / "b").stat()
    (tmp_path / "a" / "b").write_bytes(b"54321")
    os.utime(tmp_path / "a" / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_mark(tmp_path) == before  # size and time are the same
    os.utime(tmp_path / "a" / "b", ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
    assert folder_mark(tmp_path) != before


def test_a_fingerprint_of_extractors_knows_their_precision(tmp_path):
    one, other = (settings_with(tmp_path, mixed_precision=precision) for precision in ("no", "bf16"))
    assert one.trainer_config("extractors").mixed_precision != other.trainer_config("extractors").mixed_precision
    assert fingerprint(one, "extractors") != fingerprint(other, "extractors")


def test_options_that_are_not_used_change_no_fingerprint():
    base = StudyConfig()
    marks = {name: fingerprint(base, name) for name in STAGES}
    same = StudyConfig(
        curve_per_class=5, keep_snapshots=False, nft={"max_steps": 5},
        degraded_anchors={}, marginal_labels=0.0,
    )  # fmt: skip
    assert {name: fingerprint(same, name) for name in STAGES} == marks
    changed = {
        "marginal_labels": ({"marginal_labels": 0.5}, "rewards"),
        "conditional_rewards": ({"conditional_rewards": True}, "rewards"),
        "degraded_anchors": ({"degraded_anchors": {"kinds": ["blur"], "strengths": [0.5]}}, "score"),
        "policy_anchors": ({"policy_anchors": {"a": "nowhere"}}, "score"),
        "refresh": ({"refresh": {"every": 2}}, "ppo"),
        "validity_floors": ({"validity_floors": {"auc": 0.0, "spearman": -1.0}}, "ppo"),
        "watch_per_class": ({"watch_per_class": 4}, "ppo"),
    }
    features = {"frechet_features": ["label", "slice"]}
    assert fingerprint(StudyConfig(**features), "ppo") == marks["ppo"]  # of no effect there
    frechet = [fingerprint(StudyConfig(method="frechet", **fields), "frechet") for fields in ({}, features)]
    assert frechet[0] != frechet[1]
    names = list(STAGES)
    for option, (fields, first) in changed.items():
        other = StudyConfig(**fields)
        found = [name for name in names if fingerprint(other, name) != marks[name]]
        assert found[0] == first, option
        chain = study_chain(other)
        assert found == [name for name in names if first in chain.up_to(name)], option


def test_a_limit_of_trajectories_counts_where_a_class_may_have_more(tmp_path):
    """What was finished before there was one stays finished."""

    def mark(**fields) -> str:
        return fingerprint(StudyConfig(num_per_class=300, **fields), "trajectories")

    unlimited = mark(trajectories_per_class=None)
    assert mark(trajectories_per_class=300) == mark(trajectories_per_class=301) == unlimited
    assert len({unlimited, mark(), mark(trajectories_per_class=299)}) == 3
    write_phantoms(tmp_path, 2, image_size=16)
    folder = {"dataset": "nifti_folder", "data_dir": str(tmp_path)}  # it is not known yet how many there are
    assert mark(**folder) != mark(**folder, trajectories_per_class=None)


def test_whatever_decides_about_a_policy_is_in_its_fingerprint():
    """Floors let it be tuned at all; the sampler at which it is watched picks its weights, with a refresh as well."""
    lax, strict = (StudyConfig(validity_floors={"auc": floor}) for floor in (0.1, 0.9))
    assert fingerprint(lax, "validity") == fingerprint(strict, "validity")
    assert fingerprint(lax, "ppo") != fingerprint(strict, "ppo")
    watched = StudyConfig(refresh={"every": 2}, watch_per_class=4)
    assert {"samplers", "trajectories", "score"} <= set(study_chain(watched).stages["ppo"].needs)


def test_classifiers_that_are_asked_for_at_their_defaults_make_the_report_anew():
    """A section is on as soon as it says anything, and what it says may be the default."""
    without, asked = (StudyConfig(downstream=section) for section in ({}, {"report_to": "none"}))
    assert fingerprint(without, "downstream") == fingerprint(asked, "downstream")
    assert fingerprint(without, "report") != fingerprint(asked, "report")


def test_samples_that_other_runs_have_yet_to_make_are_not_the_same():
    one, other = (StudyConfig(policy_anchors={"a": f"nowhere/{seed}"}) for seed in (0, 1))
    assert fingerprint(one, "score") != fingerprint(other, "score")


def test_a_given_file_counts_by_what_it_holds(tmp_path):
    path = tmp_path / "samples.safetensors"
    tiny_phantoms().save(path)
    config = StudyConfig(policy_anchors={"a": str(path)})
    before = fingerprint(config, "score")
    tiny_phantoms(4).save(path)
    assert fingerprint(config, "score") != before
