"""ClassifierTrainer: a 3D ResNet that tells classes of volumes apart, for the downstream study of arXiv 2603.06173.

Batches hold as many volumes of one class as of another, whatever the data set does: with 229 HGG and 46 LGG a network
would else learn to say HGG. The augmentations are the published ones of training on real volumes, crops and flips.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from monai.networks import nets
from torch import nn

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.downstream import classification_metrics
from ..processes import process_state
from ..seeding import batch_indices, fold_seed, generator_for
from .augmentation import augment_volumes
from .base import TrainingRun, in_fast_memory_format
from .classifier_config import NETWORKS, ClassifierConfig


BACKGROUND = -1.0  # the lowest intensity of a prepared volume


def build_classifier(name: str, in_channels: int, num_classes: int, **kwargs) -> nn.Module:
    """A 3D ResNet of MONAI (arXiv 1512.03385, 1711.09577) from volumes `[B, C, D, H, W]` to logits `[B, K]`.

    Args:
        name (`str`): one of `NETWORKS`; the published study has `"resnet50"`.
        in_channels (`int`): C.
        num_classes (`int`): K.
        **kwargs: further arguments of `monai.networks.nets.ResNet`, such as `widen_factor` or `conv1_t_stride`.

    Raises:
        InputError: an unknown name.
    """
    if name not in NETWORKS:
        raise InputError(f"There is no classifier {name!r}; choose one of {list(NETWORKS)}.")
    return getattr(nets, name)(spatial_dims=3, n_input_channels=in_channels, num_classes=num_classes, **kwargs)


class ClassifierTrainer:
    """Trains `model`, a network from volumes to logits `[B, K]`, for `args.max_steps`; `train()` returns its figures.

    Args:
        model (`nn.Module`): such as one of `build_classifier`.
        args (`ClassifierConfig`): the settings.
        train (`VolumeDataset`): volumes of every class.
        validation (`VolumeDataset`, *optional*): volumes of every class, of other subjects, to watch; picks nothing.

    Raises:
        InputError: a class without volumes, a subject in both sets, or crops larger than half the volumes.
    """

    def __init__(
        self, model: nn.Module, args: ClassifierConfig, train: VolumeDataset, validation: VolumeDataset | None = None
    ):
        self.model, self.args = model, args
        self.train_dataset, self.eval_dataset = train, validation
        check_classes(train, "The training set of the classifier")
        if validation is not None:
            check_classes(validation, "The validation set of the classifier")
            shared = sorted(set(train.subject_ids) & set(validation.subject_ids))
            if shared:
                raise InputError(f"{len(shared)} subjects are in training and validation, {shared[0]!r} first.")
        edge = min(train.pixel_values.shape[2:])
        if 2 * args.max_shift > edge:
            raise InputError(f"max_shift={args.max_shift} is more than half the {edge} voxels of an edge; lower it.")

    def train(self) -> dict[str, float]:
        """Run the training; returns the figures of `evaluate()`."""
        args = self.args
        if process_state().device.type == "cpu":
            # Its bfloat16 gradients of 3D convolutions over maps smaller than their kernel are garbage (torch 2.13,
            # oneDNN), and the last maps of a ResNet are that small: 2 voxels an edge, for a volume of 32.
            args = replace(args, mixed_precision="no")
        self.model = in_fast_memory_format(self.model, args.mixed_precision)
        run = TrainingRun(args, f"classifier {args.network}")
        optimizer = run.optimizer(self.model.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        model, optimizer, scheduler = run.accelerator.prepare(self.model, optimizer, scheduler)
        run.resume()
        model.train()
        for step in run.steps():
            batch_size = args.train_batch_size * run.accelerator.num_processes
            rows = run.shard(balanced_indices(self.train_dataset.class_labels, batch_size, args.seed, step))
            batch = self.train_dataset.batch(rows, run.device)
            volumes = self._augment(batch["pixel_values"], step, run.accelerator.process_index)
            with run.accelerator.accumulate(model):
                logits = model(volumes)
                loss = F.cross_entropy(logits, batch["class_labels"], label_smoothing=args.label_smoothing)
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    run.clip_gradients(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if run.accelerator.sync_gradients:
                scheduler.step()
            run.record(loss=loss, accuracy=(logits.argmax(dim=1) == batch["class_labels"]).float().mean())
        run.finish()
        self.model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        return self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """`{split}_{metric}` of the training volumes, and of the validation volumes where there are any; the metrics
        are those of `classification_metrics`."""
        splits = {"train": self.train_dataset, "validation": self.eval_dataset}
        results = {}
        for split, data in splits.items():
            if data is not None:
                metrics = classification_metrics(
                    predict(self.model, data.pixel_values, self.args.train_batch_size), data.class_labels
                )
                results.update({f"{split}_{name}": value for name, value in metrics.items()})
        return results

    def _augment(self, volumes: torch.Tensor, step: int, process: int) -> torch.Tensor:
        """Flips and crops of a batch; a resumed step draws the same."""
        generator = generator_for(self.args.seed, "augment", step, process)
        if self.args.flips:
            volumes = augment_volumes(volumes, generator, max_shift=0)
        return random_crops(volumes, generator, self.args.max_shift)


@torch.no_grad()
def predict(model: nn.Module, volumes: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Class probabilities `[N, K]` of `volumes [N, C, D, H, W]`, float64 on the CPU; the model is left in `eval`.

    Raises:
        InputError: probabilities that are no numbers; the training diverged.
    """
    model.eval()
    parameter = next(model.parameters())
    batches = (batch.to(parameter.device, parameter.dtype) for batch in volumes.split(batch_size))
    probabilities = torch.cat([model(batch).double().softmax(dim=1).cpu() for batch in batches])
    if not probabilities.isfinite().all():
        raise InputError("The classifier predicts values that are no numbers; train it with a lower learning_rate.")
    return probabilities


def balanced_indices(labels: torch.Tensor, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Which items step number `step` sees, `[batch_size]`: the classes of `labels [N]` in turn, so that their
    numbers in a batch differ by one at most; each class in epochs of its own, shuffled anew."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        draw, turn = divmod(position, len(members))
        chosen.append(members[turn][batch_indices(len(members[turn]), 1, fold_seed(seed, "class", turn), draw)])
    # Without this shuffle, process 0 of 2 would get the even positions: one class of two.
    return torch.cat(chosen)[torch.randperm(batch_size, generator=generator_for(seed, "within batch", step))]


def random_crops(volumes: torch.Tensor, generator: torch.Generator, max_shift: int) -> torch.Tensor:
    """Volumes `[B, C, D, H, W]` padded by `max_shift` voxels of background on each side and cropped to their size,
    each at a place of its own: shifts whose far side does not come back in."""
    if not max_shift:
        return volumes
    B, _, D, H, W = volumes.shape
    corners = torch.randint(0, 2 * max_shift + 1, (B, 3), generator=generator).tolist()
    padded = F.pad(volumes, [max_shift] * 6, value=BACKGROUND)
    crops = [volume[:, d : d + D, h : h + H, w : w + W] for volume, (d, h, w) in zip(padded, corners, strict=True)]
    return torch.stack(crops)


def check_classes(volumes: VolumeDataset, name: str) -> None:
    """Raise InputError unless there are volumes of every class; `name` begins the sentence."""
    missing = [label for label, count in volumes.class_counts().items() if not count]
    if missing:
        raise InputError(f"{name} has no volume of class {missing[0]!r}; it needs some of every class.")
