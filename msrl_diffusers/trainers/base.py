"""TrainingRun: what every trainer needs around its loop."""

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from ..errors import InputError
from ..files import write_text
from ..precision import resolve_precision
from ..processes import check_shared, process_state, use_whole_cpu
from ..seeding import fold_seed
from .base_config import TrainingConfig
from .callbacks import Callbacks


logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
LIMITS = ("patience", "kl_budget", "watch_limits")  # settings that end a run early


class TrainingRun:
    """Accelerator, optimizers, checkpoints, history and progress of one training.

    Numbers go to `output_dir/log.jsonl` (one line per log, also the source of the curves) and to the tracker
    named by `report_to`. Checkpoints are written under a temporary name and renamed, so a killed run leaves only
    whole ones.

    Args:
        args: the settings.
        description: what the progress bar says.
        gradient_accumulation_steps: batches per optimizer update; by default those of `args`.
        allow_fsdp: whether the trainer can have its weights sharded over processes.

    Raises:
        InputError: processes under FSDP, for a trainer that can't, or processes that do not share `output_dir`.
    """

    def __init__(
        self,
        args: TrainingConfig,
        description: str,
        gradient_accumulation_steps: int | None = None,
        allow_fsdp: bool = False,
    ):
        self.args, self.description = args, description
        self.output_dir = Path(args.output_dir)
        check_tracker(args)
        use_whole_cpu()
        AcceleratorState._reset_state()  # a process may train one model after the other, in different precision
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(args.mixed_precision, process_state().device),
            gradient_accumulation_steps=gradient_accumulation_steps or args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=str(self.output_dir),
            step_scheduler_with_optimizer=False,
        )
        if self.accelerator.distributed_type == DistributedType.FSDP and not allow_fsdp:
            raise InputError(
                f"{description}: FSDP shards the denoiser that is tuned, and can't be used in pretraining; start this with another file of "
                "accelerate_configs, and with fsdp.yaml the tuning of a finished --pipeline, or a study's stage of the method alone."
            )
        check_shared(self.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if args.report_to != "none":
            self.accelerator.init_trackers("logs")
        self.step = 0
        self.state: dict = {}  # what else the loop must remember; plain JSON
        self.history: list[dict] = []
        self.stopped: str | None = None
        self._binding = True
        self.resumed_from = self.output_dir  # where the checkpoint lay that was resumed, and what belongs to it
        self.callbacks: Callbacks | None = None
        self.progress: tqdm | None = None
        self._pending: dict[str, list[float]] = defaultdict(list)
        self._kept_for: list[str] = []
        self._started = time.monotonic()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def optimizer(self, parameters, learning_rate: float | None = None) -> torch.optim.AdamW:
        """AdamW with the settings of the run."""
        args = self.args
        return torch.optim.AdamW(
            parameters,
            lr=args.learning_rate if learning_rate is None else learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.weight_decay,
            fused=True if self.device.type == "cuda" else None,  # one kernel, where a small network waits for launches
        )

    def lr_scheduler(self, optimizer: torch.optim.Optimizer, num_updates: int):
        """The learning rate schedule over `num_updates` optimizer updates, with warm-up whatever its type."""
        name = self.args.lr_scheduler_type
        return get_scheduler(
            "constant_with_warmup" if name == "constant" else name,  # the latter ignores warm-up
            optimizer,
            num_warmup_steps=self.args.warmup_steps,
            num_training_steps=max(1, num_updates),
        )

    def shard(self, indices: torch.Tensor) -> torch.Tensor:
        """This process' part of a batch drawn for all processes."""
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    def keep(self, weights, setting: str) -> None:
        """Have checkpoints hold further weights (an object with a state), which the run has for the sake of `setting`."""
        self.accelerator.register_for_checkpointing(weights)
        self._kept_for.append(setting)

    def resume(self) -> None:
        """Load the checkpoint that `resume_from_checkpoint` names, if any. Learning rate, weight decay and betas are those of this
        run's config: who resumes a run that diverged wants a lower rate.

        Raises:
            InputError: the named checkpoint does not exist, or is of a run that kept other weights; or none does, none will
                (`save_steps` is 0), and an earlier run's log would be lost.
        """
        wanted = self.args.resume_from_checkpoint
        if wanted is None:
            return
        if wanted == "latest":
            found = checkpoints(self.output_dir)
            if not found:
                if not self.args.save_steps and read_log(self.output_dir):
                    raise InputError(
                        f'{self.output_dir} holds the log of an earlier run and no checkpoint: resume_from_checkpoint="latest" '
                        "needs checkpoints, so set save_steps, or unset it to begin anew."
                    )
                return
            path = found[-1]
        else:
            path = Path(wanted)
        if not (path / "trainer_state.json").is_file():
            raise InputError(f"{path} is not a checkpoint of this trainer; give 'latest' or a checkpoint-N folder.")
        saved = json.loads((path / "trainer_state.json").read_text())
        self._check_kept(path, saved.get("kept_for", self._kept_for))  # older ones do not say
        self._load_state(path)
        # checkpoints lie between updates; counted on, micro-batches of another size would put updates out of step with rollouts
        self.accelerator.step = 0
        self.step, self.state = saved["step"], saved["state"]
        self.stopped = saved.get("stopped") if saved.get("limits") == self._limits() else None
        if self.stopped and self.is_main:
            logger.warning(
                "%s is where the run ended early (%s): nothing more is trained from it, unless %s change.",
                path, self.stopped, ", ".join(LIMITS),
            )  # fmt: skip
        self._pending.update(saved["pending"])  # figures since the last log line
        self.resumed_from = path.parent
        self.history = read_log(self.resumed_from, up_to=self.step)

    def _check_kept(self, path: Path, found: list[str]) -> None:
        wanted = self._kept_for
        differences = [f"no weights for {name}, which this run needs" for name in wanted if name not in found]
        differences += [f"weights for {name}, which this run has no use for" for name in found if name not in wanted]
        if differences:
            raise InputError(
                f"{path} has {', and '.join(differences)}: go on with the settings it was written with, or start anew in another "
                "output_dir."
            )

    def _load_state(self, path: Path) -> None:
        """Weights and the moments of optimizers from a checkpoint, their settings from the config."""
        optimizers = self.accelerator._optimizers
        schedulers = [each.scheduler for each in self.accelerator._schedulers]
        settings = [
            [{name: group[name] for name in ("lr", "betas", "weight_decay")} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        rates = [list(scheduler.base_lrs) for scheduler in schedulers]
        self.accelerator.load_state(str(path))
        for optimizer, groups in zip(optimizers, settings, strict=True):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group.update(own)
        for scheduler, own in zip(schedulers, rates, strict=True):
            scheduler.base_lrs = own
            for group, rate, factor in zip(scheduler.optimizer.param_groups, own, scheduler.lr_lambdas, strict=True):
                group["lr"] = rate * factor(scheduler.last_epoch)

    def clip_gradients(
        self, parameters, optimizer: torch.optim.Optimizer | None = None, max_norm: float | None = None
    ) -> torch.Tensor:
        """Clip the gradient of an update, before the optimizer's step, to `max_norm` (by default `max_grad_norm`); its norm before.
        Name the optimizer where the run has another, whose gradient is not there yet.

        Raises:
            InputError: the norm is not finite; the weights are still those of the update before.
        """
        max_norm = self.args.max_grad_norm if max_norm is None else max_norm
        if optimizer is None:
            norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        else:
            self.accelerator.unscale_gradients(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if not self.may_step(norm):
            raise InputError(
                f"{self.description}: the gradient of step {self.step + 1} is not finite, so the weights did not take it and the training "
                "ends; give the command again with a lower learning_rate, or look for what is not finite in the data."
            )
        return norm

    def may_step(self, norm: torch.Tensor) -> bool:
        """Whether an optimizer may take a gradient of this norm: a finite one, or any where there is a scaler (fp16), which leaves
        such updates out."""
        return self.accelerator.scaler is not None or bool(torch.isfinite(norm))

    def steps(self) -> Iterator[int]:
        """Step numbers from where the run stands to `max_steps`, with a progress bar; seeds each step.

        History lines of an earlier run past this point are dropped, so the file never holds a step twice.
        """
        if self.is_main:
            write_log(self.output_dir, self.history)
        self._tell("train_begin", self.step, self.resumed_from)
        due = False  # a checkpoint
        with tqdm(
            total=self.args.max_steps, initial=self.step, desc=self.description, disable=not self.is_main, leave=True
        ) as self.progress:
            while self.step < self.args.max_steps and not self.stopped:
                set_seed(fold_seed(self.args.seed, "step", self.step) % 2**32)
                yield self.step
                self.step += 1
                self.progress.set_description(self.description, refresh=False)
                self.progress.update()
                self._tell("step_end", self.step)
                if self.callbacks and self.callbacks.wants_stop and not self.stopped:
                    self.stop("a callback asked for it", binding=False)
                self._flush()
                asked = bool(self.callbacks and self.callbacks.take_save_request())
                due = due or asked or bool(self.args.save_steps and self.step % self.args.save_steps == 0)
                if due and self.accelerator.sync_gradients:  # a checkpoint has no gradients that wait for an update
                    self.save_checkpoint()
                    due = False
        self._tell("train_end")

    def _limits(self) -> dict:
        return {name: getattr(self.args, name, None) for name in LIMITS}

    def doing(self, what: str) -> None:
        """Say on the progress bar, if there is one by now, what a long step is at."""
        if self.progress is not None:
            self.progress.set_description(f"{self.description}, {what}")

    def stop(self, reason: str, binding: bool = True) -> None:
        """End the loop after this step. A `binding` end holds for who resumes the run, until one of `LIMITS` changes; what else ends the
        same step does not take its place."""
        if not self.stopped or not self._binding:
            self.stopped, self._binding = reason, binding

    def record(self, **metrics: float | torch.Tensor) -> None:
        """Collect figures of this step; their means are logged every `logging_steps`."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                value = value.detach()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value  # a norm of sharded gradients
            self._pending[name].append(value)

    def _flush(self) -> None:
        if self.step % self.args.logging_steps and self.step < self.args.max_steps and not self.stopped:
            return
        means = {
            name: float(torch.as_tensor(values, dtype=torch.float64).mean()) for name, values in self._pending.items()
        }
        self._pending.clear()
        if not means:
            return
        line = {"step": self.step, "seconds": round(time.monotonic() - self._started, 2), **means}
        self.history.append(line)
        if self.is_main:
            with (self.output_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.progress.set_postfix({name: f"{value:.4g}" for name, value in list(means.items())[:6]})
        self.accelerator.log(means, step=self.step)
        self._tell("log", line)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-{step}`, all processes taking part, and drop the oldest over `save_total_limit`; and those that an
        earlier run left past this step, which would be kept in place of this run's, and resumed as the latest."""
        final = self.output_dir / f"{CHECKPOINT_PREFIX}{self.step}"
        temporary = self.output_dir / f".{final.name}.tmp"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            pending = {name: [float(value) for value in values] for name, values in self._pending.items()}
            stopped = self.stopped if self._binding else None
            saved = {"step": self.step, "state": self.state, "pending": pending}
            saved |= {"stopped": stopped, "limits": self._limits(), "kept_for": self._kept_for}
            (temporary / "trainer_state.json").write_text(json.dumps(saved))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            found = checkpoints(self.output_dir)
            past = [path for path in found if _number(path) > self.step]
            for old in [*found[: len(found) - len(past)][: -self.args.save_total_limit], *past]:
                _remove(old)
        self.accelerator.wait_for_everyone()
        self._tell("save", final)

    def _tell(self, event: str, *information) -> None:
        if self.callbacks:
            getattr(self.callbacks, event)(*information)

    def finish(self) -> None:
        """Close the trackers, and drop gradients that waited for an update: the next training of these weights would add them to
        its own. `Accelerator.end_training` would end the process group too, which that one needs."""
        for optimizer in self.accelerator._optimizers:
            optimizer.optimizer.zero_grad(set_to_none=True)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints under `output_dir`, oldest first; copies that somebody keeps under longer names are none of them."""
    found = [
        path
        for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal() and (path / "trainer_state.json").is_file()
    ]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed half way it leaves none that looks whole."""
    (checkpoint / "trainer_state.json").unlink()
    shutil.rmtree(checkpoint)


def read_log(output_dir: str | Path, up_to: int | None = None) -> list[dict]:
    """The lines of `log.jsonl`, those after step `up_to` left out; a line cut by a kill is dropped."""
    path = Path(output_dir) / "log.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if up_to is None or line["step"] <= up_to:
            lines.append(line)
    return lines


def write_log(output_dir: str | Path, lines: list[dict]) -> None:
    """Replace `log.jsonl`."""
    write_text(Path(output_dir) / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def thaw(module: torch.nn.Module) -> bool:
    """Let all weights be trained where none may be, as an adapter that was merged leaves a denoiser; where some may, these alone are
    trained. Whether all were frozen."""
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    if frozen:
        module.requires_grad_(True)
    return frozen


def check_tracker(args: TrainingConfig) -> None:
    """Raise InputError where a config reports to a tracker that is not installed here; it may be read on any machine."""
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        raise InputError(
            f"report_to={args.report_to} needs a package that is not installed; install it, or report to none."
        )


def in_fast_memory_format(module: torch.nn.Module, mixed_precision: str) -> torch.nn.Module:
    """The module with its convolutions in the memory format to train in: channels-last on a CPU in float32, where denoiser and
    autoencoder gain by it, and contiguous there in bfloat16, where all networks lose (`examples/benchmarks/memory_formats.py`). On a
    GPU channels-last for 2D convolutions, as PyTorch advises, which says nothing of 3D ones.
    """
    device, last = process_state().device, channels_last_format(module)
    if device.type == "cpu":
        gains = resolve_precision(mixed_precision, device) == "no"
    else:
        gains = last is torch.channels_last
    return module.to(memory_format=last if gains else torch.contiguous_format)


def channels_last_format(module: torch.nn.Module) -> torch.memory_format:
    """The channels-last format of its convolutions, which are of volumes or of images."""
    is_3d = any(isinstance(part, torch.nn.Conv3d) for part in module.modules())
    return torch.channels_last_3d if is_3d else torch.channels_last
