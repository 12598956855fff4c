"""Callbacks in the form that users of transformers and TRL know: `transformers.TrainerCallback`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState


class Callbacks:
    """Tells `TrainerCallback` objects what happens in a training, and hears whether it should stop or save.

    Callbacks get the trainer's config as `args`, a `TrainerState` (`global_step`, `max_steps`, `log_history`), a
    `TrainerControl`, and `model` (the denoiser) as a keyword; on the first event also `resumed_from`, the folder of the run that
    goes on. Known events: `on_train_begin`, `on_step_end`, `on_log`,
    `on_save`, `on_train_end`.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], args, model, is_main: bool):
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.args, self.model = args, model
        self.state = TrainerState(
            max_steps=args.max_steps, is_local_process_zero=is_main, is_world_process_zero=is_main
        )
        self.control = TrainerControl()

    def train_begin(self, step: int, resumed_from: Path) -> None:
        self.state.global_step = step
        self._tell("on_train_begin", resumed_from=resumed_from)

    def step_end(self, step: int) -> None:
        self.state.global_step, self.state.epoch = step, float(step)
        self._tell("on_step_end")

    def log(self, line: Mapping[str, float]) -> None:
        self.state.log_history.append(dict(line))
        self._tell("on_log", logs=dict(line))

    def save(self, folder: Path) -> None:
        self._tell("on_save", checkpoint=str(folder))

    def train_end(self) -> None:
        self._tell("on_train_end")

    @property
    def wants_stop(self) -> bool:
        return self.control.should_training_stop

    def take_save_request(self) -> bool:
        """Whether a callback asked for a checkpoint since the last call."""
        wanted, self.control.should_save = self.control.should_save, False
        return wanted

    def _tell(self, event: str, **information) -> None:
        for callback in self.callbacks:
            answer = getattr(callback, event)(self.args, self.state, self.control, model=self.model, **information)
            self.control = answer or self.control
