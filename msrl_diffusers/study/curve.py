"""The stage curve: what became of rewards and of fidelity along a run, against its distance from the pretrained model.

Over-optimization shows as two curves that part: the reward that is trained on goes on rising while what nobody trained on
turns (Gao et al., arXiv 2210.10760). Everything here is measured after the training, on weights it left behind: no figure,
least of all the judge's, can have a part in it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.comparison import ms_ssim_of
from ..evaluation.features import extract_features, extractor_identity
from ..evaluation.fidelity import frechet_distance, kernel_distance
from ..evaluation.memorization import WORKING_EDGE
from ..evaluation.neighbours import VoxelSpace, shrink
from ..evaluation.sources import open_source
from ..files import write_json
from ..functional.denoising import gaussian_kl
from ..policies import make_policy
from ..policies.base import DenoisingPolicy
from ..precision import autocast
from ..processes import process_state
from ..rewards import LearnedReward, WeightedSum
from ..rollouts import Rollout, StepTable, sample_rollout, step_moments
from ..seeding import fold_seed, sample_generators
from ..trainers.online_config import OnlineConfig
from ..trainers.snapshots import FOLDER, Snapshot, choose_snapshots, read_snapshots
from ..trainers.tuned_weights import BEST_WEIGHTS, LORA_TARGETS, add_lora
from ..trainers.watchdogs import high_frequency_share, sample_diversity
from .artifacts import load_extractors, load_pipeline, load_reward_models, load_split
from .config import StudyConfig


KL_PER_CLASS = 16  # samples on whose path the divergence is measured
NEIGHBOURS = 10
BATCH_SIZE = 32  # of volumes made float32 at once
MIN_STD = 0.01  # of a step whose divergence counts, where the method has no such setting


def measure_curve(config: StudyConfig) -> dict:
    """Measure the pretrained weights, snapshots at about equal steps of the square root of the divergence, the last weights, and
    those that were kept. A point that was measured stays, so that a killed stage goes on. Writes `curve/curve.json`.

    Raises:
        InputError: the snapshots of the run were removed.
    """
    folder, run_folder = Path(config.output_dir) / "curve", Path(config.output_dir) / config.method
    path = folder / "curve.json"
    if path.is_file():  # of this very stage, killed after it: some or all snapshots may be removed already
        content = json.loads(path.read_text())
    else:
        content = _measure(config, folder, run_folder)
        write_json(path, content)
    if not config.keep_snapshots and process_state().is_main_process:
        for snapshot in (run_folder / FOLDER).glob("*"):
            snapshot.unlink()
    return content


def _measure(config: StudyConfig, folder: Path, run_folder: Path) -> dict:
    """The content of `curve.json`; raises InputError as `measure_curve` states."""
    if not read_snapshots(run_folder):
        raise InputError(
            f"{run_folder / FOLDER} holds no snapshots; remove {run_folder} to tune again, and set keep_snapshots: true."
        )
    instruments, measured = _Instruments(config), {}
    snapshots = choose_snapshots(_measured_snapshots(instruments, run_folder, folder), config.num_curve_points)
    places = {0: None, **{snapshot.rollout: run_folder / FOLDER / snapshot.name for snapshot in snapshots}}
    names = {f"rollout-{rollout:05d}": (rollout, weights) for rollout, weights in places.items()}
    if (run_folder / BEST_WEIGHTS).is_file():
        tuned = json.loads((run_folder / "stage.json").read_text())["result"]
        names["kept"] = (tuned["kept_after"], run_folder / BEST_WEIGHTS)
    for name, (rollout, weights) in tqdm(names.items(), desc="curve"):
        path = folder / "points" / f"{name}.json"
        if not path.is_file():
            write_json(path, {"rollout": rollout, **instruments.measure(weights)})
        measured[name] = json.loads(path.read_text())
    rows = dict(zip(measured, _with_reward(list(measured.values()), instruments.reward), strict=True))
    kept = rows.pop("kept", None)
    return {
        "points": list(rows.values()),
        "kept": kept,
        "n": len(instruments.volumes),
        "sampler": instruments.sampler,
        "extractors": instruments.identities,
        "real": instruments.real_figures,
        "turning_point": turning_point(list(rows.values())),
    }


def _measured_snapshots(instruments: "_Instruments", run_folder: Path, folder: Path) -> list[Snapshot]:
    """The snapshots of a run with their divergences measured: what the run reported is of few steps and of the update before."""
    path, found = folder / "points" / "divergences.json", []
    known = json.loads(path.read_text()) if path.is_file() else {}
    for snapshot in tqdm(read_snapshots(run_folder), desc="divergences"):
        if snapshot.name not in known:
            instruments.load(run_folder / FOLDER / snapshot.name)
            known[snapshot.name] = instruments.divergence() ** 0.5
            write_json(path, known)
        found.append(Snapshot(snapshot.rollout, known[snapshot.name]))
    return found


def turning_point(points: list[dict]) -> dict | None:
    """The point of the lowest judge distance, and whether the reward rose after it: from there on the reward is followed at the
    expense of fidelity. None where that is the end of the curve."""
    best = min(range(len(points)), key=lambda row: points[row]["fid"]["judge"])
    if best == len(points) - 1:
        return None
    after = max(points[best + 1 :], key=lambda point: point["reward"]["mean"])
    return {
        "rollout": points[best]["rollout"],
        "sqrt_kl": points[best]["sqrt_kl"],
        "reward_rose_after_it": after["reward"]["mean"] > points[best]["reward"]["mean"],
    }


class _Instruments:
    """What every point is measured with: one set of noise, the sampler of the rollouts, extractors, rewards."""

    def __init__(self, config: StudyConfig):
        train = load_split(config, "train")
        self.config, self.volumes = config, train.take_per_class(config.curve_per_class)
        self.args: OnlineConfig = config.trainer_config(config.method)
        self.sampler = config.rollout_sampler
        self.pipeline = load_pipeline(config)
        self.pipeline.set_progress_bar_config(disable=True)
        if self.args.use_lora:
            add_lora(self.pipeline.unet, self.args.lora_rank, self.args.lora_target_modules or LORA_TARGETS)
        self._pretrained = {name: value.detach().clone() for name, value in self.pipeline.unet.named_parameters()}
        self.policy = make_policy(self.pipeline)
        self.extractors = load_extractors(config)
        self.identities = {role: extractor_identity(extractor) for role, extractor in self.extractors.items()}
        self.features = {
            role: extract_features(extractor, self.volumes.pixel_values) for role, extractor in self.extractors.items()
        }
        self.rewards = {role: LearnedReward(role, model) for role, model in load_reward_models(config).items()}
        trained = [self.rewards["volume"], self.rewards["slice"]]
        self.reward = WeightedSum(trained, self.args.reward_weights)
        self.space = VoxelSpace(_shrunk(train), min(NEIGHBOURS, len(train) - 1), max_shift=1)
        self.real_figures = self._plain_figures(self.volumes)

    def load(self, path: Path | None) -> None:
        """Take up the weights in a file, the pretrained ones for None."""
        weights = load_file(path) if path else self._pretrained
        with torch.no_grad():
            for name, parameter in self.pipeline.unet.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])

    def measure(self, path: Path | None) -> dict:
        """All figures of the weights in a file, of the pretrained ones for None."""
        self.load(path)
        samples = self._sampled()
        volumes = VolumeDataset(
            samples.half().cpu(), self.volumes.class_labels, self.volumes.subject_ids, self.volumes.id2label,
            self.volumes.spacing,
        )  # fmt: skip
        features = {
            role: extract_features(extractor, volumes.pixel_values) for role, extractor in self.extractors.items()
        }
        seed = self.config.seed_of("curve")
        return {
            "sqrt_kl": self.divergence() ** 0.5 if path else 0.0,
            "scores": {
                role: reward(volumes.pixel_values, volumes.class_labels).tolist()
                for role, reward in self.rewards.items()
            },
            "fid": {role: frechet_distance(self.features[role], found) for role, found in features.items()},
            "kid": {role: kernel_distance(self.features[role], found, seed) for role, found in features.items()},
            **self._plain_figures(volumes),
            "nearest": self._nearest(volumes),
        }

    @torch.no_grad()
    def _sampled(self) -> torch.Tensor:
        """One sample of each volume's class, `[N, C, D, H, W]`, from the same noise at every point."""
        table = StepTable.of(
            self.policy.scheduler,
            self.sampler["num_inference_steps"],
            self.sampler["eta"],
            getattr(self.args, "min_std", MIN_STD),
            self.pipeline.device,
        )
        rows = torch.arange(len(self.volumes)).split(self.config.sampling_batch_size)
        return torch.cat([self._rollout(table, part).samples.cpu() for part in rows])

    def _rollout(self, table: StepTable, rows: torch.Tensor) -> Rollout:
        generators = sample_generators(fold_seed(self.config.seed_of("curve"), "curve"), "sample", rows.tolist())
        with autocast(self.pipeline.device, self.config.mixed_precision):
            return sample_rollout(
                self.policy,
                self.volumes.class_labels[rows].tolist(),
                table,
                generators,
                self.sampler["guidance_scale"],
            )

    @torch.no_grad()
    def divergence(self) -> float:
        """The KL divergence from the pretrained policy per stochastic step and element, at the states that the tuned one visits;
        of steps with full noise where the method samples without any."""
        steps, eta, guidance = (self.sampler[name] for name in ("num_inference_steps", "eta", "guidance_scale"))
        table = StepTable.of(
            self.policy.scheduler, steps, eta or 1.0, getattr(self.args, "min_std", MIN_STD), self.pipeline.device
        )
        guidance = getattr(self.args, "train_guidance_scale", guidance)
        labels = self.volumes.class_labels
        rows = torch.cat([(labels == label).nonzero()[:KL_PER_CLASS, 0] for label in self.volumes.id2label])
        rollout = self._rollout(table, rows)
        with autocast(self.pipeline.device, self.config.mixed_precision):
            values = [_step_divergence(self.policy, table, step, rollout, guidance) for step in table.stochastic]
        return torch.stack(values).mean().item()

    def _plain_figures(self, volumes: VolumeDataset) -> dict:
        similarity = ms_ssim_of(open_source(volumes), self.config.seed_of("curve"))
        return {
            "diversity": sample_diversity(volumes.pixel_values, volumes.class_labels),
            "ms_ssim": None if similarity is None else similarity["value"],
            "high_frequency": high_frequency_share(volumes.pixel_values),
        }

    def _nearest(self, volumes: VolumeDataset) -> dict:
        """Distance to the nearest training volume, in [0, sqrt(2)], and its ratio to that of the 10th nearest: means."""
        found = self.space.search(_shrunk(volumes))
        return {"distance": found.distances.mean().item(), "ratio": found.scores.mean().item()}


def _shrunk(volumes: VolumeDataset) -> torch.Tensor:
    """The volumes of at most `WORKING_EDGE` voxels along every axis, float16; the large ones are float32 by batches alone."""
    return torch.cat([shrink(part.float(), WORKING_EDGE).half() for part in volumes.pixel_values.split(BATCH_SIZE)])


def _step_divergence(
    policy: DenoisingPolicy, table: StepTable, step: int, rollout: Rollout, guidance_scale: float
) -> torch.Tensor:
    """Mean divergence of one step over the samples of a rollout."""
    place = (table, step, rollout.latents[:, step], rollout.conditioning, guidance_scale)
    mean, std = step_moments(policy, *place)
    with policy.reference():
        reference, _ = step_moments(policy, *place)
    return gaussian_kl(mean, reference, std).mean()


def _with_reward(points: list[dict], reward: WeightedSum) -> list[dict]:
    """The points with the means of the rewards instead of every score: in deviations of the pretrained samples, the first
    point's; `mean` is that of the weighted sum that was trained on, in deviations of its own."""
    scores = [{role: torch.tensor(values) for role, values in point["scores"].items()} for point in points]
    reward.fit(scores[0])
    deviation = max(reward.combine(scores[0]).std().item(), 1e-6)
    rows = []
    for point, values in zip(points, scores, strict=True):
        parts = {role: reward.scales[role].standardise(value).mean().item() for role, value in values.items()}
        figures = {name: value for name, value in point.items() if name != "scores"}
        rows.append({**figures, "reward": {"mean": reward.combine(values).mean().item() / deviation, **parts}})
    return rows
