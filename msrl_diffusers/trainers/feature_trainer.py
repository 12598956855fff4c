"""FeatureTrainer: feature networks for Frechet distances, without labels of quality.

The features must carry anatomy, and must exist for any data set. So the network learns, from the training volumes
alone, to tell whose volume it sees (every subject is a class of its own, as in arXiv 1406.6909), of which class the
subject is, which slice of which plane it looks at and, with `degraded_share`, how the volume was degraded. The heads are
thrown away.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..data.degradations import DEGRADATIONS
from ..data.volumes import VolumeDataset
from ..seeding import batch_indices, generator_for
from .augmentation import augment_volumes, degrade_some
from .base import TrainingRun, in_fast_memory_format, thaw
from .feature_config import FeatureConfig


class ExtractorWithHeads(nn.Module):
    """The extractor and a linear head per task; one module, so that data-parallel training reduces all its gradients."""

    def __init__(self, extractor: nn.Module, num_outputs: dict[str, int]):
        super().__init__()
        self.extractor = extractor
        features = extractor.config.num_features
        self.norm = nn.BatchNorm1d(
            features
        )  # at first all inputs give nearly the same features; heads need the difference
        self.heads = nn.ModuleDict({name: nn.Linear(features, size) for name, size in num_outputs.items()})

    def forward(self, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[B, P * S, classes]` by task."""
        features = self.extractor(volumes).flatten(1, 2)
        features = F.leaky_relu(self.norm(features.flatten(0, 1)).unflatten(0, features.shape[:2]))
        return {name: head(features) for name, head in self.heads.items()}


class FeatureTrainer:
    """Trains `model`, a network from volumes to features `[B, P, S, F]`, on `train_dataset`."""

    def __init__(self, model: nn.Module, args: FeatureConfig, train_dataset: VolumeDataset):
        self.model = in_fast_memory_format(model, args.mixed_precision)
        self.args, self.train_dataset = args, train_dataset
        names = sorted(set(train_dataset.subject_ids))
        self.subjects = torch.tensor([names.index(subject) for subject in train_dataset.subject_ids])
        with torch.no_grad():
            planes, slices = model(train_dataset.batch([0], model.device)["pixel_values"]).shape[1:3]
        num_outputs = {"subject": len(names), "label": train_dataset.num_classes}
        if args.degraded_share:
            num_outputs["degradation"] = 1 + len(DEGRADATIONS)
        if planes * slices > 1:
            num_outputs["position"] = planes * slices
        self.network = ExtractorWithHeads(model, num_outputs)

    def train(self) -> dict[str, float]:
        """Run the training; returns the last logged figures (accuracy of every head on augmented volumes)."""
        args, run = self.args, TrainingRun(self.args, f"features {type(self.model).__name__}")
        thaw(self.model)
        optimizer = run.optimizer(self.network.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        network, optimizer, scheduler = run.accelerator.prepare(self.network, optimizer, scheduler)
        run.resume()
        network.train()
        for step in run.steps():
            batch_size = args.train_batch_size * run.accelerator.num_processes
            indices = run.shard(batch_indices(len(self.train_dataset), batch_size, args.seed, step))
            batch = self.train_dataset.batch(indices)
            generator = generator_for(args.seed, "augment", step, run.accelerator.process_index)
            volumes, ways = degrade_some(batch["pixel_values"], args.degraded_share, generator)
            volumes = augment_volumes(volumes.to(run.device), generator, args.max_shift, args.noise_level)
            classes = {"subject": self.subjects[indices], "label": batch["class_labels"], "degradation": ways}
            with run.accelerator.accumulate(network):
                loss = 0
                for name, logits in network(volumes).items():
                    target = _target(classes.get(name), logits)
                    loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten())
                    run.record(**{f"accuracy_{name}": (logits.argmax(dim=-1) == target).float().mean()})
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    run.clip_gradients(network.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if run.accelerator.sync_gradients:
                scheduler.step()
            run.record(loss=loss)
        run.finish()
        run.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
        self.model.eval()
        return run.history[-1] if run.history else {}


def _target(classes: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """What the logits `[B, P * S, classes]` of a head should tell, `[B, P * S]`: `classes [B]` of the volumes, or the position."""
    if classes is None:
        return torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return classes.to(logits.device)[:, None].expand(logits.shape[:2])
