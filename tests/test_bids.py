"""bids: subjects, sessions and their tables, and why the rest is left out."""

import pytest
from layouts import lock, write_bids, write_csv
from listings import assert_spot_is_in_place, labels, reasons

from msrl_diffusers.data.cases import list_cases
from msrl_diffusers.errors import InputError


@pytest.mark.parametrize("prefix", ["sub-", ""])
def test_bids(tmp_path, prefix):
    write_bids(tmp_path, prefix=prefix)
    (tmp_path / "derivatives").mkdir()
    listing = list_cases("bids", tmp_path)
    assert listing.rejected == []
    assert listing.classes == ["control", "patient"]
    assert labels(listing) == {"sub-01": "control", "sub-02": "patient", "sub-03": "control", "sub-04": "patient"}
    assert all(case.session == "" and case.split is None for case in listing.cases)
    assert all(list(case.images) == ["T1w"] for case in listing.cases)
    assert_spot_is_in_place(listing)


def test_bids_sessions_and_modalities(tmp_path):
    write_bids(tmp_path, sessions=["ses-1", "ses-2"], modalities=["T1w", "FLAIR"])
    listing = list_cases("bids", tmp_path, modality=["FLAIR", "T1w"])
    assert len(listing.cases) == 8
    assert [(case.subject_id, case.session) for case in listing.cases[:2]] == [
        ("sub-01", "ses-1"),
        ("sub-01", "ses-2"),
    ]
    first = listing.cases[0].images
    assert list(first) == ["FLAIR", "T1w"]
    assert first["FLAIR"].endswith("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz")


def test_bids_takes_the_first_of_several_runs(tmp_path):
    write_bids(tmp_path, diagnoses=["a", "b"])
    anat = tmp_path / "sub-01/anat"
    (anat / "sub-01_T1w.nii.gz").rename(anat / "sub-01_run-2_T1w.nii.gz")
    for name in ("sub-01_run-1_T1w.nii", "sub-01_run-1_T1w.json", "sub-01_run-1_notT1w.nii", "other_T1w.nii"):
        (anat / name).touch()
    assert list_cases("bids", tmp_path).cases[0].images == {"T1w": str(anat / "sub-01_run-1_T1w.nii")}


def test_bids_ages_in_bins(tmp_path):
    write_bids(tmp_path)  # 30, 40, 50, 60
    listing = list_cases("bids", tmp_path, label_column="age", label_bins=[35, 55])
    assert listing.classes == ["age under 35", "age 35 to 55", "age from 55"]
    assert [case.label for case in listing.cases] == ["age under 35", "age 35 to 55", "age 35 to 55", "age from 55"]
    some = list_cases("bids", tmp_path, label_column="age", label_bins={"young": [None, 35], "old": [55, None]})
    assert labels(some) == {"sub-01": "young", "sub-04": "old"}
    assert some.rejected == []
    text = tmp_path / "participants.tsv"
    text.write_text(text.read_text().replace("\t40\t", "\tforty\t"))
    odd = list_cases("bids", tmp_path, label_column="age", label_bins=[35, 55])
    assert reasons(odd) == {"sub-02": f"{tmp_path}/sub-02: 'forty' is no number, but label_bins asks for one."}


def test_bids_labels_of_sessions(tmp_path):
    write_bids(tmp_path, diagnoses=["n/a", "b", "n/a"], sessions=["ses-1", "ses-2"])
    write_csv(
        tmp_path / "sub-01/sub-01_sessions.tsv", [["session_id", "diagnosis"], ["ses-1", "a"], ["ses-2", "b"]], "\t"
    )
    write_csv(tmp_path / "sub-02/sub-02_sessions.tsv", [["session_id", "diagnosis"], ["2", "n/a"]], "\t")
    listing = list_cases("bids", tmp_path)
    assert labels(listing) == {"sub-01_ses-1": "a", "sub-01_ses-2": "b", "sub-02_ses-1": "b", "sub-02_ses-2": "b"}
    assert reasons(listing) == {
        name: f"{tmp_path}/sub-03/{name}: column 'diagnosis' has nothing for it." for name in ("ses-1", "ses-2")
    }


def test_bids_labels_in_sessions_files_only(tmp_path):
    write_bids(tmp_path, diagnoses=["?", "?"], sessions=["ses-1"])
    write_csv(tmp_path / "participants.tsv", [["participant_id"], ["sub-01"], ["sub-02"]], "\t")
    for name, stage in [("sub-01", "a"), ("sub-02", "b")]:
        write_csv(tmp_path / name / f"{name}_sessions.tsv", [["session_id", "stage"], ["ses-1", stage]], "\t")
    assert labels(list_cases("bids", tmp_path, label_column="stage")) == {"sub-01_ses-1": "a", "sub-02_ses-1": "b"}


def test_bids_leaves_out_what_is_incomplete(tmp_path, monkeypatch):
    write_bids(tmp_path, diagnoses=["a", "b", "a", "n/a", "b", "a", "b"])
    table = tmp_path / "participants.tsv"
    table.write_text(table.read_text().replace("sub-03\t", "sub-33\t"))
    (tmp_path / "sub-02/anat/sub-02_T1w.nii.gz").unlink()
    annexed = tmp_path / "sub-05/anat/sub-05_T1w.nii.gz"
    annexed.unlink()
    annexed.symlink_to("../../.git/annex/objects/gone")
    lock(tmp_path / "sub-06/anat", monkeypatch)
    (tmp_path / "sub-08").symlink_to(tmp_path / "sub-08")
    listing = list_cases("bids", tmp_path)
    assert labels(listing) == {"sub-01": "a", "sub-07": "b"}
    assert reasons(listing) == {
        "sub-02": f"{tmp_path}/sub-02 has no T1w image, anat/sub-02_*T1w.nii.gz.",
        "sub-03": f"{tmp_path}/sub-03 is not in {table}; add it there or drop the folder.",
        "sub-04": f"{tmp_path}/sub-04: column 'diagnosis' has nothing for it.",
        "sub-05": f"{annexed} is no file; if it is a link of DataLad, run 'datalad get'.",
        "sub-06": f"{tmp_path}/sub-06/anat can't be opened: Permission denied; check its permissions.",
        "sub-08": f"{tmp_path}/sub-08 is a link that leads nowhere or in a circle; copy what it stands for.",
        "sub-33": f"{tmp_path}/sub-33 does not exist, though {table} has a row for it.",
    }


def test_bids_tables_as_programs_write_them(tmp_path):
    write_bids(tmp_path, diagnoses=["a", "b"])
    (tmp_path / "participants.tsv").write_bytes(
        b"\xef\xbb\xbfparticipant_id\tname, of sorts\tdiagnosis\r\nsub-01\tAndr\xe9\ta\r\nsub-02\tx\tb\r\n"
    )
    assert labels(list_cases("bids", tmp_path)) == {"sub-01": "a", "sub-02": "b"}


def test_bids_a_cell_too_many(tmp_path):
    write_bids(tmp_path, diagnoses=["a", "b"])
    sessions = tmp_path / "sub-01/sub-01_sessions.tsv"
    sessions.write_text("session_id\tdiagnosis\nses-1\ta\t\nses-2\tnot\tb\n")
    reason = f"{sessions}, line 3 has more cells than the header; quote cells that hold '\\t'."
    assert reasons(list_cases("bids", tmp_path)) == {"sub-01": reason}
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tdiagnosis\nsub-01\tnot\ta\n")
    with pytest.raises(InputError, match=f"{table}, line 2 has more cells than the header"):
        list_cases("bids", tmp_path)


def test_bids_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no participants\.tsv; give the top folder of a BIDS data set"):
        list_cases("bids", tmp_path)
    write_bids(tmp_path)
    with pytest.raises(InputError, match=r"has no column 'stage'; it has \['age', 'diagnosis', 'participant_id'\]"):
        list_cases("bids", tmp_path, label_column="stage")
    with pytest.raises(InputError, match="needs at least one modality"):
        list_cases("bids", tmp_path, modality=[])
    with pytest.raises(InputError, match="edges must rise"):
        list_cases("bids", tmp_path, label_column="age", label_bins=[2, 1])
    (tmp_path / "participants.tsv").write_text("participant_id,diagnosis\nsub-01,a\n")
    with pytest.raises(InputError, match="needs rows with a tab-separated column participant_id"):
        list_cases("bids", tmp_path)


@pytest.mark.parametrize("session", ["n/a", "", "1", "ses-1", "ses-01"])
def test_bids_the_only_row_of_a_subject_is_of_all_its_sessions(tmp_path, session):
    write_bids(tmp_path, diagnoses=["?"], sessions=["ses-01", "ses-02"])
    rows = [["participant_id", "session_id", "diagnosis"], ["sub-01", session, "a"]]
    write_csv(tmp_path / "participants.tsv", rows, "\t")
    assert labels(list_cases("bids", tmp_path)) == {"sub-01_ses-01": "a", "sub-01_ses-02": "a"}


def test_bids_rows_of_sessions_in_the_table_of_participants(tmp_path):
    write_bids(tmp_path, diagnoses=["?", "?", "?"], sessions=["ses-1", "ses-2"])
    rows = [["participant_id", "session_id", "diagnosis"], ["sub-01", "ses-1", "a"], ["sub-01", "2", "b"]]
    rows += [
        ["sub-02", "ses-1", "a"],
        ["sub-02", "n/a", "b"],
        ["sub-02", "ses-2", "n/a"],
        ["sub-03", "", "a"],
        ["sub-03", "", "b"],
    ]
    write_csv(tmp_path / "participants.tsv", rows, "\t")
    listing = list_cases("bids", tmp_path)
    assert labels(listing) == {"sub-01_ses-1": "a", "sub-01_ses-2": "b", "sub-02_ses-1": "a", "sub-02_ses-2": "b"}
    assert reasons(listing)["ses-1"] == (
        f"{tmp_path}/sub-03/ses-1: participants.tsv has several rows for it, with 'diagnosis' ['a', 'b']; keep one, or move them "
        "to the subject's sessions.tsv."
    )
