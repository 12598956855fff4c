"""Chains of stages in general; the study's own are in test_study.py and test_text_to_image_study.py."""

from dataclasses import dataclass

import pytest

from msrl_diffusers.chains import Chain, Stage, finished_fingerprint
from msrl_diffusers.errors import InputError


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


def test_a_killed_stage_keeps_its_files_and_one_of_other_settings_loses_them(tmp_path):
    chain, settings = bakery([]), Settings(str(tmp_path))
    chain.run(settings)
    (tmp_path / "cake" / "stage.json").unlink()
    (tmp_path / "cake" / "crumb").touch()
    assert finished_fingerprint(settings, "cake") is None
    chain.run(settings)
    assert (tmp_path / "cake" / "crumb").is_file()
    settings.heat = 100
    chain.run(settings)
    assert not (tmp_path / "cake" / "crumb").exists()


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
