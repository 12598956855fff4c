"""Chains of stages in general; the study's own are in test_study.py and test_text_to_image_study.py."""

import errno
import fcntl
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from launching import finish

from msrl_diffusers import chains
from msrl_diffusers.chains import Chain, Stage, finished_fingerprint, open_folder
from msrl_diffusers.errors import InputError
from msrl_diffusers.files import write_json


@dataclass
class Settings:
    output_dir: str
    flour: int = 1
    heat: int = 200
    sweet: bool = True
    scale: int = 1


def bakery(log: list[str]) -> Chain:
    def stage(name: str, needs: tuple[str, ...], fields: tuple[str, ...]) -> Stage:
        def run(settings: Settings) -> dict:
            log.append(name)
            return {"made": name, "heat": settings.heat}

        return Stage(run, needs, fields)

    stages = {
        "dough": stage("dough", (), ("flour",)),
        "sugar": stage("sugar", (), ()),
        "cake": stage("cake", ("dough", "sugar"), ("heat",)),
    }
    return Chain(stages, vars, lambda settings: () if settings.sweet else ("sugar",), ("scale",))


def seconds_of(folder: Path) -> float | None:
    return json.loads((folder / "stage.json").read_text())["seconds"]


def test_what_stages_need_of_the_machine_is_looked_for_before_the_first(tmp_path):
    log, settings = [], Settings(str(tmp_path))

    def no_oven(settings, stage):
        if stage == "cake":
            raise InputError("There is no oven.")

    chain = replace(bakery(log), check=no_oven)
    with pytest.raises(InputError, match="There is no oven"):
        chain.run(settings)
    assert log == []
    bakery(log).run(settings)
    assert chain.run(settings) == {"made": "cake", "heat": 200}  # what is done needs none


def test_what_is_done_is_not_done_again_and_what_depends_on_a_change_is(tmp_path):
    log = []
    chain, settings = bakery(log), Settings(str(tmp_path))
    assert chain.run(settings) == {"made": "cake", "heat": 200}
    assert log == ["dough", "sugar", "cake"]
    assert chain.run(settings) == {"made": "cake", "heat": 200}
    assert len(log) == 3
    settings.heat = 180
    assert chain.run(settings)["heat"] == 180
    assert log[3:] == ["cake"]
    settings.flour = 2
    chain.run(settings)
    assert log[4:] == ["dough", "cake"]
    settings.scale = 2  # what all depend on
    chain.run(settings)
    assert log[6:] == ["dough", "sugar", "cake"]


def test_a_stage_that_is_left_out_need_not_count():
    chain, settings, changed = bakery([]), Settings("unused"), Settings("unused", flour=2)
    without = replace(chain, left_out=lambda settings: ("dough",))
    assert without.fingerprint(settings, "cake") != without.fingerprint(changed, "cake")
    free = replace(without, counts_left_out=False)
    assert free.fingerprint(settings, "cake") == free.fingerprint(changed, "cake")
    assert free.fingerprint(settings, "cake") != free.fingerprint(replace(settings, heat=1), "cake")
    all_in = replace(chain, counts_left_out=False)
    assert all_in.fingerprint(settings, "cake") == chain.fingerprint(settings, "cake")


def test_a_killed_stage_keeps_its_files_and_one_of_other_settings_loses_them(tmp_path):
    chain, settings = bakery([]), Settings(str(tmp_path))
    chain.run(settings)
    assert seconds_of(tmp_path / "cake") >= 0
    (tmp_path / "cake" / "stage.json").unlink()
    (tmp_path / "cake" / "crumb").touch()
    assert finished_fingerprint(settings, "cake") is None
    chain.run(settings)
    assert (tmp_path / "cake" / "crumb").is_file()
    assert seconds_of(tmp_path / "cake") is None  # those before it was killed were not counted
    settings.heat = 100
    chain.run(settings)
    assert not (tmp_path / "cake" / "crumb").exists()
    assert seconds_of(tmp_path / "cake") >= 0


def test_a_stage_alone_needs_fresh_inputs(tmp_path):
    chain, settings = bakery([]), Settings(str(tmp_path))
    with pytest.raises(InputError, match="Stage 'cake' needs the result of 'dough'; run that stage first"):
        chain.run(settings, ["cake"])
    chain.run(settings, chain.up_to("cake"))
    settings.flour = 3
    with pytest.raises(InputError, match="Stage 'cake' needs 'dough', which was run with other settings"):
        chain.run(settings, ["cake"])
    with pytest.raises(InputError, match="Unknown stage 'bread'; the stages are"):
        chain.run(settings, ["bread"])


def test_a_stage_that_is_left_out_is_neither_run_nor_needed(tmp_path):
    log = []
    chain, settings = bakery(log), Settings(str(tmp_path), sweet=False)
    chain.run(settings)
    assert log == chain.enabled(settings) == ["dough", "cake"]
    assert chain.up_to("sugar") == ["sugar"]


def test_the_mark_of_a_folder_is_written_once(tmp_path):
    """And whole: a killed run that leaves half of one would cost the next its checkpoints."""
    folder, marker = tmp_path / "cake", tmp_path / "cake" / ".fingerprint"
    open_folder(folder, "one")
    (folder / "crumb").touch()
    written = marker.stat()
    open_folder(folder, "one")
    assert (marker.stat().st_ino, marker.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert {path.name for path in folder.iterdir()} == {"crumb", ".fingerprint"}
    open_folder(folder, "other")
    assert marker.read_text() == "other"
    assert {path.name for path in folder.iterdir()} == {".fingerprint"}


def test_of_a_removal_that_is_killed_nothing_is_gone_on_from(monkeypatch, tmp_path):
    """Half of what other settings left, without its mark, would look like an interrupted run of these."""
    folder = tmp_path / "cake"
    open_folder(folder, "one")
    (folder / "checkpoint").touch()

    def killed(path, **_):
        if Path(path).exists():
            (Path(path) / ".fingerprint").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chains.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_folder(folder, "two")
    assert not open_folder(folder, "two")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".fingerprint"]


def test_what_a_copy_without_hidden_files_left_is_known_by_its_record(tmp_path):
    write_json(tmp_path / "stage.json", {"fingerprint": "one"})
    (tmp_path / "weights").touch()
    assert open_folder(tmp_path, "one")
    (tmp_path / ".fingerprint").unlink()
    assert not open_folder(tmp_path, "two")
    assert (tmp_path / ".fingerprint").read_text() == "two"


def test_of_a_link_to_another_folder_only_the_link_is_removed(tmp_path):
    open_folder(tmp_path / "theirs", "one")
    for target in ("theirs", "nowhere"):
        link = tmp_path / target[0]
        link.symlink_to(target, target_is_directory=True)
        open_folder(link, "two")
        assert not link.is_symlink()
        assert (link / ".fingerprint").read_text() == "two"
    assert (tmp_path / "theirs" / ".fingerprint").read_text() == "one"
    (tmp_path / "same").symlink_to("theirs", target_is_directory=True)
    open_folder(tmp_path / "same", "one")
    assert (tmp_path / "same").is_symlink()


def bake_twice(settings: Settings) -> dict:
    """While the cake is in the oven, somebody else comes with another one."""
    finish(__file__, settings.output_dir, processes=2)
    return {}


def test_of_two_commands_in_one_folder_the_second_is_refused(tmp_path):
    """Otherwise each would remove, or go on from, what the other writes."""
    chain, settings = Chain({"cake": Stage(bake_twice, (), ())}, vars), Settings(str(tmp_path))
    chain.run(settings)
    for rank in (0, 1):
        refusal = (tmp_path / f"refused-{rank}").read_text()
        assert refusal.startswith(f"Another command is at work in {tmp_path / 'cake'}; wait for its end")
    bakery([]).run(settings)  # nobody is in the kitchen any more


def test_where_the_file_system_has_no_locks_work_goes_on(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert bakery([]).run(Settings(str(tmp_path)))["made"] == "cake"


def burn(settings: Settings) -> dict:
    raise InputError("The oven is too hot.")


def test_what_the_first_process_refuses_is_refused_in_all(tmp_path):
    """None waits for it: they would wait until the time of the collective is out."""
    with pytest.raises(InputError, match="too hot"):
        Chain({"cake": Stage(burn, (), ())}, vars).run(Settings(str(tmp_path / "alone")))
    finish(__file__, tmp_path, processes=2)
    assert [(tmp_path / f"refused-{rank}").read_text() for rank in (0, 1)] == 2 * ["The oven is too hot."]


if __name__ == "__main__":
    try:
        Chain({"cake": Stage(burn, (), ())}, vars).run(Settings(sys.argv[1]))
    except InputError as error:
        (Path(sys.argv[1]) / f"refused-{os.environ['RANK']}").write_text(str(error))
    torch.distributed.destroy_process_group()
