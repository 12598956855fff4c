"""Every verb of `msrl` has examples in its help, and ends with 1 and one sentence where its command line is wrong."""

import os
import sys

import pytest
import torch

from msrl_diffusers.cli import VERBS, main


def ended(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `msrl` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["msrl", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return (caught.value.code, *capsys.readouterr())


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb, monkeypatch, capsys):
    code, out, _ = ended(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: msrl {verb} ")
    description = out.partition("\noptions:")[0].partition("\npositional arguments:")[0]
    assert f"\n{verb_example(description, verb)}\n" in description


def verb_example(description: str, verb: str) -> str:
    examples = [
        line for line in description.splitlines() if line.strip().startswith(f"msrl {verb}") and ":" not in line
    ]
    assert examples, "the module docstring holds commands that work"
    return examples[0]


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_one_sentence(verb, monkeypatch, capsys):
    code, out, err = ended(monkeypatch, capsys, verb, "--zzz", "x")
    assert (code, out) == (1, "")
    assert err == "error: There is no option --zzz; --help shows the options.\n"


def test_ctrl_c_is_one_sentence(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("msrl_diffusers.cli.env.run", interrupted)
    code, out, err = ended(monkeypatch, capsys, "env")
    assert (code, out) == (130, "")
    assert err.startswith(
        "\nInterrupted. Studies, and `msrl prepare`, `generate` and `push`, go on when the same command"
    )
    assert "a single trainer does with --resume_from_checkpoint latest" in err  # without it one begins anew


def test_a_full_gpu_is_one_sentence(monkeypatch, capsys):
    def full(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    monkeypatch.setattr("msrl_diffusers.cli.env.run", full)
    code, out, err = ended(monkeypatch, capsys, "env")
    assert (code, out) == (1, "")
    assert err.startswith("error: The GPU's memory is full: make sampling_batch_size")
    assert err.endswith("(torch: CUDA out of memory. Tried to allocate 2.00 GiB.)\n")


def test_options_that_are_taken_before_stand_in_the_help(monkeypatch, capsys):
    _, out, _ = ended(monkeypatch, capsys, "study", "--help")
    assert "--config CONFIG" in out
    code, _, err = ended(monkeypatch, capsys, "study", "--conf", "x")
    assert (code, err) == (
        1,
        "error: --config must be written out, and may need others beside it; --help shows how.\n",
    )


def test_the_verbs_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["msrl"])
    main()
    out = capsys.readouterr().out
    assert all(f"\n  {verb:<10}{purpose}" in out for verb, purpose in VERBS.items())


@pytest.mark.parametrize(
    ("verb", "message"),
    [("generat", "did you mean generate?"), ("teapot", "there are generate, prepare, evaluate, ")],
)
def test_an_unknown_verb_is_one_sentence(verb, message, monkeypatch, capsys):
    code, out, err = ended(monkeypatch, capsys, verb)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: There is no verb {verb!r}; {message}")


WRITING = {
    "generate": ["--model", "model_cards/phantoms-32"],
    "prepare": ["--dataset", "nifti_folder", "--data_dir", "nowhere"],
    "evaluate": ["real", "generated"],
    "audit": ["train", "generated"],
    "study": ["--dataset", "phantoms"],
    "study --seeds": ["--dataset", "phantoms", "--seeds", "0"],
}


@pytest.mark.parametrize("below", ["", "further/down"])
@pytest.mark.parametrize("command", WRITING)
def test_where_nothing_can_be_written_no_work_begins(command, below, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    output_dir = tmp_path / "notes.txt" / below
    code, _, err = ended(monkeypatch, capsys, command.split()[0], *WRITING[command], "--output_dir", str(output_dir))
    (sentence,) = err.splitlines()[-1:]
    assert (code, sentence.startswith(f"error: Nothing can be written into {output_dir}")) == (1, True)
    assert sentence.endswith(f": {tmp_path / 'notes.txt'} is a file; give another folder.")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_folder_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs").mkdir(mode=0o500)
    code, _, err = ended(
        monkeypatch, capsys, "audit", "train", "generated", "--output_dir", str(tmp_path / "theirs/audit")
    )
    assert (code, f"{tmp_path / 'theirs'} is closed to this user" in err) == (1, True)
