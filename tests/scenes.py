"""The register of scenes: how each thing that README.md and examples/README.md print to be typed is carried out."""

from collections.abc import Callable

from documented import Scene, Stage


SCENES: dict[str, Scene] = {}


def scene(*printed: str, **how) -> Callable:
    """Register how these commands, expressions or blocks (by their first line) are carried out."""

    def register(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        for text in printed:
            assert text not in SCENES, f"{text!r} has two scenes"
            SCENES[text] = Scene(play, **how)
        return play

    return register
