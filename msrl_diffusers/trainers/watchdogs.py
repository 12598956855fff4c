"""Watchdogs: figures of a rollout that are logged and never trained on. A reward that rises hides what they show."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import InputError
from ..plots import plot_samples
from ..policies import DenoisingPolicy
from ..rollouts import Rollout, StepTable
from .base import TrainingRun


Watchdog = Callable[[Rollout], float]
SPECTRA_AT_ONCE = 32  # samples


def check_patience(patience: int | None, select_by: str | None) -> None:
    """Raise InputError for a `patience` without a figure that could improve."""
    if patience is not None and select_by is None:
        raise InputError(
            f"patience={patience} counts rollouts since the figure of select_by improved, and none is given: name a watchdog by "
            "select_by, or unset patience."
        )


class Watch:
    """The figures of every rollout, the limits they must keep, and the rollout that is the best so far.

    What must survive a resume (`best_figure`, `best_step`, and by which selection: `best_by`) is in `run.state`.

    Args:
        watchdogs: figures of the user's own, by name; beside those of this file.
        select_by: name of the one of `watchdogs` whose highest value (`"-name"`: lowest) marks the best rollout.
        limits: `{figure: [low, high]}`; the run stops when a figure leaves them.
        patience: the run stops at a look at which the selected figure has not improved for so many rollouts.
        every: rollouts between two looks of `watchdogs`; those of this file look at every one.

    Raises:
        InputError: `select_by` names no watchdog.
    """

    def __init__(
        self,
        watchdogs: Mapping[str, Watchdog] | None = None,
        select_by: str | None = None,
        limits: Mapping[str, Sequence[float]] | None = None,
        patience: int | None = None,
        every: int = 1,
    ):
        self.watchdogs, self.select_by = dict(watchdogs or {}), select_by
        self.limits, self.patience, self.every = dict(limits or {}), patience, every
        if select_by is not None and select_by.removeprefix("-") not in self.watchdogs:
            raise InputError(f"select_by={select_by!r} is no watchdog; there are {sorted(self.watchdogs)}.")

    def resume(self, run: TrainingRun) -> None:
        """Forget the best rollout of the checkpoint if it was selected by another figure than `select_by`, or none selects now;
        after `run.resume()`."""
        selected_by = run.state.get("best_by", self.select_by)  # checkpoints of the first version do not say
        if selected_by != self.select_by:
            for name in ("best_figure", "best_step", "best_by"):
                del run.state[name]

    def figures(
        self,
        run: TrainingRun,
        policy: DenoisingPolicy,
        table: StepTable,
        rollout: Rollout,
        scores: Mapping[str, torch.Tensor],
        guidance_scale: float,
    ) -> dict[str, float]:
        """The figures of a rollout of all processes, logged as `watch/NAME`.

        They are of the weights before this rollout's update. Where an average is kept, trainers call this within it: what runs
        the denoiser sees the averaged weights, while the samples of the rollout are of the trained ones. `scores` are its raw
        rewards by name; `guidance_scale` is that of the policy which is trained.
        """
        head = rollout.select(slice(run.args.train_batch_size)).to(run.device)
        with run.accelerator.autocast():
            norm = prediction_norm(policy, table, head, guidance_scale)
        figures = {
            "prediction_norm": norm,
            "diversity": _diversity_everywhere(run, rollout),
            "high_frequency": high_frequency_share(rollout.samples),
        }
        if len(scores) > 1:
            everywhere = {name: run.accelerator.gather(values) for name, values in scores.items()}
            figures["reward_disagreement"] = reward_disagreement(everywhere)
        if run.step % self.every == 0:
            figures.update({name: watchdog(rollout) for name, watchdog in self.watchdogs.items()})
        values = torch.tensor(list(figures.values()), dtype=torch.float32, device=run.device)
        figures = dict(zip(figures, run.accelerator.reduce(values, "mean").tolist(), strict=True))
        run.record(**{f"watch/{name}": value for name, value in figures.items()})
        return figures

    def judge(self, run: TrainingRun, figures: Mapping[str, float], step: int) -> bool:
        """Stop the run where limits or patience say so. Returns whether these `figures`, of rollout number `step`, are within the
        limits and the best so far by `select_by`; keep the present weights then.

        Raises:
            InputError: a limit on a figure that there is not.
        """
        within = True
        for name, (low, high) in self.limits.items():
            if name in self.watchdogs and name not in figures:
                continue  # it did not look at this rollout
            if name not in figures:
                raise InputError(f"watch_limits names {name!r}, which is no watchdog; there are {sorted(figures)}.")
            if not low <= figures[name] <= high:
                within = False
                run.stop(f"the watchdog {name} left its limits {low} to {high}")
        figure = figures.get((self.select_by or "").removeprefix("-"))
        if figure is None:
            return False  # nothing is selected by, or it did not look at this rollout
        figure = -figure if self.select_by.startswith("-") else figure
        improved = within and figure > run.state.get("best_figure", float("-inf"))
        if improved:
            run.state.update(best_figure=figure, best_step=step, best_by=self.select_by)
        if self.patience is not None and step - run.state.get("best_step", 0) >= self.patience:
            run.stop("the selection figure has not improved")
        return improved

    @staticmethod
    def result(run: TrainingRun) -> dict:
        """The log line with the rollout that the kept weights were selected by (the last one without a selection), with the
        reason why the run `stopped`, its number of `rollouts`, and after how many of them the weights are kept (`kept_after`; 0: the
        pretrained ones). Selected weights sampled it; but where an average is kept,
        it is the average at that time, which only watchdogs that run the denoiser have judged. Weights selected after the last
        update sampled none: the line is the last one then."""
        best_step = run.state.get("best_step")
        line = run.history[-1] if run.history else {}
        if best_step is not None and line.get("step", 0) > best_step:
            # a line may be of several rollouts: the first that has this one among them
            line = next(line for line in run.history if line["step"] > best_step) | {"step": best_step + 1}
        kept_after = run.step if best_step is None else best_step
        return {**line, "stopped": run.stopped, "rollouts": run.step, "kept_after": kept_after}


def draw_samples(run: TrainingRun, samples: torch.Tensor, rewards: torch.Tensor, step: int) -> None:
    """Every `log_samples_steps` rollouts, a picture of `samples [B, C, *S]` with their rewards `[B]`, in
    `output_dir/samples` and for trackers that take pictures."""
    every = run.args.log_samples_steps
    if not every or step % every or not run.is_main:
        return
    titles = [f"{reward:+.2f}" for reward in rewards.tolist()]
    picture = plot_samples(samples, titles, run.output_dir / "samples" / f"rollout-{step:05d}.png")
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            # others expect this order, and hand arguments that they do not know on to their service
            order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture[None]}, step=step, **order)


def _diversity_everywhere(run: TrainingRun, rollout: Rollout) -> float:
    """`sample_diversity` of the samples of all processes, of which one may have no two of a condition."""
    spread = torch.tensor(
        spread_in_groups(rollout.samples, rollout.conditions), dtype=torch.float64, device=run.device
    )
    squares, count = run.accelerator.reduce(spread, "sum").tolist()
    return (squares / count) ** 0.5 if count else 0.0


@torch.no_grad()
def prediction_norm(policy: DenoisingPolicy, table: StepTable, rollout: Rollout, guidance_scale: float) -> float:
    """Root mean square of the denoiser's output in the middle of the trajectories, over that of the reference.

    Reinforcement learning inflates it by some percent before pictures are oversaturated (NormGuard, arXiv 2606.27771).
    """
    step = len(table) // 2
    latents, timestep = rollout.latents[:, step], table.timesteps[step]
    current = policy.predict(latents, timestep, rollout.conditioning, guidance_scale)
    with policy.reference():
        reference = policy.predict(latents, timestep, rollout.conditioning, guidance_scale)
    return (current.float().square().mean() / reference.float().square().mean()).sqrt().item()


def sample_diversity(samples: torch.Tensor, groups: torch.Tensor) -> float:
    """Root mean square distance of `samples [B, C, *S]` from the mean sample of their group, per element.

    It falls when the policy collapses to a few samples of high reward. Groups of one sample say nothing and are left out.
    """
    squares, count = spread_in_groups(samples, groups)
    return (squares / count) ** 0.5 if count else 0.0


def spread_in_groups(samples: torch.Tensor, groups: torch.Tensor) -> tuple[float, float]:
    """Sum of the mean squares per element of `samples [B, C, *S]` about the mean of their group, and its degrees of freedom."""
    squares, count = 0.0, 0.0
    for group in groups.unique():
        members = samples[groups == group].float()
        if len(members) > 1:
            squares += (members - members.mean(dim=0)).square().flatten(1).mean(dim=1).sum().item()
            count += len(members) - 1
    return squares, count


def high_frequency_share(samples: torch.Tensor) -> float:
    """Share of the spectral energy of `samples [B, C, *S]` above half the Nyquist frequency along any axis, means removed.

    It falls when edges are wiped out and rises with noise and checkerboards. The spectra of a few samples are in memory at a time.
    """
    axes = tuple(range(2, samples.ndim))
    grids = torch.meshgrid(*(torch.fft.fftfreq(samples.shape[axis]).abs() for axis in axes), indexing="ij")
    high = torch.stack(grids).amax(dim=0).to(samples.device) > 0.25
    above = total = 0.0
    for part in samples.split(SPECTRA_AT_ONCE):
        values = part.float() - part.float().mean(dim=axes, keepdim=True)
        energy = torch.fft.fftn(values, dim=axes).abs().square()
        above, total = above + energy[..., high].sum().item(), total + energy.sum().item()
    return above / max(total, 1e-12)


def reward_disagreement(parts: Mapping[str, torch.Tensor]) -> float:
    """1 - correlation of the first two rewards over the samples: 0 where they agree, 1 where they are unrelated.

    Rewards that see a volume in 3D and slice by slice agree on quality, and part where one of them is exploited.
    """
    first, second = list(parts.values())[:2]
    pair = torch.stack([first.double(), second.double()])
    if len(first) < 2 or (pair.std(dim=1) == 0).any():
        return 1.0
    return 1 - torch.corrcoef(pair)[0, 1].item()
