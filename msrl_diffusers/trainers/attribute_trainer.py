"""AttributeTrainer: an image classifier of transformers that says of each attribute whether an image shows it.

Two of them are wanted for reinforcement learning, of different architecture: one is the reward, the other judges.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from ..data.image_folder import ImageDataset, check_attributes
from ..errors import InputError
from ..models.image_inputs import ImageInputs
from ..rewards.attribute_match import attribute_columns
from ..seeding import batch_indices, generator_for
from .attribute_config import AttributeConfig
from .base import TrainingRun, in_fast_memory_format
from .base_config import check_batch_statistics


class AttributeTrainer:
    """Trains `model` for `args.max_steps` by binary cross-entropy per attribute; `train()` returns its figures.

    Args:
        model (`nn.Module`): an image classifier of transformers with a label for each attribute of the data, from
            `models.image_classifiers` (`build_image_classifier`, or `load_image_classifier` with `attribute_names`).
        args (`AttributeConfig`): the settings.
        train_dataset (`ImageDataset`): images with and without every attribute.
        eval_dataset (`ImageDataset`, *optional*): of other subjects, to watch; it picks nothing.
        processor: the model's image processor, or what else `ImageInputs.of` takes; None for images as they are, in
            [-1, 1].

    Raises:
        InputError: an attribute of one class only, or without a label of the model; other attributes in the two sets, or a
            subject in both; a model that does not take the images.
    """

    def __init__(
        self,
        model: nn.Module,
        args: AttributeConfig,
        train_dataset: ImageDataset,
        eval_dataset: ImageDataset | None = None,
        processor=None,
    ):
        self.model, self.args = in_fast_memory_format(model, args.mixed_precision).requires_grad_(True), args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        check_attributes(train_dataset, "The training images of the classifier")
        if eval_dataset is not None:
            if eval_dataset.attribute_names != train_dataset.attribute_names:
                raise InputError(
                    f"Training images have the attributes {list(train_dataset.attribute_names)}, those of the evaluation "
                    f"{list(eval_dataset.attribute_names)}; give both the same."
                )
            shared = sorted(set(train_dataset.subject_ids) & set(eval_dataset.subject_ids))
            if shared:
                raise InputError(f"{len(shared)} subjects are in training and evaluation, {shared[0]!r} first.")
        self.columns = attribute_columns(model, train_dataset.attribute_names)
        self.inputs = ImageInputs.of(processor)
        if any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
            check_batch_statistics(args)
        self._try(train_dataset.select([0]))

    def train(self) -> dict[str, float]:
        """Run the training; returns the figures of `evaluate()`."""
        args = self.args
        run = TrainingRun(args, f"attributes {type(self.model).__name__}")
        optimizer = run.optimizer(self.model.parameters())
        scheduler = run.lr_scheduler(optimizer, args.max_steps // args.gradient_accumulation_steps)
        weights = class_weights(self.train_dataset.attributes) if args.class_weights else torch.ones(2)[:, None]
        model, optimizer, scheduler = run.accelerator.prepare(self.model, optimizer, scheduler)
        weights = weights.to(run.device)
        run.resume()
        model.train()
        for step in run.steps():
            batch_size = args.train_batch_size * run.accelerator.num_processes
            rows = run.shard(batch_indices(len(self.train_dataset), batch_size, args.seed, step))
            batch = self.train_dataset.batch(rows, run.device)
            generator = generator_for(args.seed, "augment", step, run.accelerator.process_index)
            images = augment_images(batch["pixel_values"], generator, args.flips, args.crop_share, args.color_jitter)
            targets = batch["attributes"]
            with run.accelerator.accumulate(model):
                logits = model(pixel_values=self.inputs(images)).logits[:, self.columns].float()
                smoothed = targets * (1 - args.label_smoothing) + 0.5 * args.label_smoothing
                weight = targets * weights[1] + (1 - targets) * weights[0]
                loss = F.binary_cross_entropy_with_logits(logits, smoothed, weight)
                run.accelerator.backward(loss)
                if run.accelerator.sync_gradients:
                    run.clip_gradients(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            if run.accelerator.sync_gradients:
                scheduler.step()
            right = (logits.sigmoid() >= args.threshold) == targets.bool()
            run.record(loss=loss, accuracy=right.float().mean(), exact_match=right.all(dim=1).float().mean())
        run.finish()
        self.model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
        return self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """`{train, heldout}_{metric}`, the latter where there is an `eval_dataset`; metrics of `attribute_metrics`."""
        splits = {"train": self.train_dataset, "heldout": self.eval_dataset}
        results = {}
        for split, images in splits.items():
            if images is not None:
                probabilities = predict_attributes(self.model, images, self.inputs, self.args.eval_batch_size)
                metrics = attribute_metrics(
                    probabilities, images.attributes, images.attribute_names, self.args.threshold
                )
                results.update({f"{split}_{name}": value for name, value in metrics.items()})
        return results

    def _try(self, image: ImageDataset) -> None:
        """Raise InputError unless the model takes images of this size; its own error comes late and names layers."""
        try:
            predict_attributes(self.model, image, self.inputs)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{type(self.model).__name__} can't be used on images of {image.image_size} pixels "
                f"({' '.join(str(error).split())}); give images or an image processor of the size it was made for."
            ) from error


def class_weights(attributes: torch.Tensor) -> torch.Tensor:
    """Weights `[2, A]` of images without and with each attribute, from zeros and ones `[N, A]`: inverse to how many there
    are, so that both count the same and the mean weight is one."""
    share = attributes.float().mean(dim=0)
    return 0.5 / torch.stack([1 - share, share])


@torch.no_grad()
def predict_attributes(model: nn.Module, images: ImageDataset, processor=None, batch_size: int = 64) -> torch.Tensor:
    """Probabilities `[N, A]` of the attributes of `images`, float64 on the CPU; the model is left in `eval`.

    Args:
        model: an image classifier of transformers with labels for these attributes.
        images: whose attributes' names and pixels are used.
        processor: of the model, or what else `ImageInputs.of` takes.
        batch_size: images looked at at once.

    Raises:
        InputError: a missing label, or probabilities that are no numbers; the training diverged.
    """
    model.eval()
    inputs, columns = ImageInputs.of(processor), attribute_columns(model, images.attribute_names)
    parameter = next(model.parameters())
    parts = []
    for rows in tqdm(torch.arange(len(images)).split(batch_size), desc="attributes", leave=False, disable=None):
        pixels = inputs(images.batch(rows, parameter.device)["pixel_values"]).to(parameter.dtype)
        parts.append(model(pixel_values=pixels).logits[:, columns].double().sigmoid().cpu())
    probabilities = torch.cat(parts)
    if not probabilities.isfinite().all():
        raise InputError("The classifier gives values that are no numbers; train it with a lower learning_rate.")
    return probabilities


def attribute_metrics(
    probabilities: torch.Tensor, attributes: torch.Tensor, attribute_names: Sequence[str], threshold: float = 0.5
) -> dict[str, float]:
    """Metrics in [0, 1], from probabilities `[N, A]` and zeros and ones `[N, A]`.

    `accuracy_{name}` and `auc_{name}` (area under the ROC curve) of each attribute, spaces in names written as underscores;
    their means `accuracy` and `auc`; `exact_match`, the share of images with all attributes right. An area is left out
    where all images have the attribute, or none has it.
    """
    targets = attributes.long()
    # as the reward does: at the threshold an attribute is present; torchmetrics counts it as absent, and takes no single attribute
    seen = (probabilities >= threshold).long()
    right = (seen == targets).double()
    accuracies = right.mean(dim=0).tolist()
    names = [name.replace(" ", "_") for name in attribute_names]
    areas = {
        name: binary_auroc(probabilities[:, column], targets[:, column]).item()
        for column, name in enumerate(names)
        if 0 < targets[:, column].sum() < len(targets)
    }
    metrics = {f"accuracy_{name}": value for name, value in zip(names, accuracies, strict=True)}
    metrics |= {f"auc_{name}": value for name, value in areas.items()}
    metrics["accuracy"] = right.mean().item()
    if areas:
        metrics["auc"] = sum(areas.values()) / len(areas)
    metrics["exact_match"] = right.all(dim=1).double().mean().item()
    return metrics


def augment_images(
    images: torch.Tensor,
    generator: torch.Generator,
    flips: bool = True,
    crop_share: float = 0.05,
    color_jitter: float = 0.1,
) -> torch.Tensor:
    """Flips, crops and other colors, drawn for each image by itself; `[B, 3, H, W]` in [-1, 1]. Hue stays: it tells ink from
    hair, and a veil from skin."""
    B, _, H, W = images.shape
    if flips:
        for axis in (2, 3):
            chosen = (torch.rand(B, generator=generator) < 0.5).to(images.device)
            images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    margin = round(crop_share * min(H, W))
    if margin:
        corners = torch.randint(0, 2 * margin + 1, (B, 2), generator=generator).tolist()
        padded = F.pad(images, [margin] * 4, mode="reflect")
        crops = [image[:, h : h + H, w : w + W] for image, (h, w) in zip(padded, corners, strict=True)]
        images = torch.stack(crops)
    if color_jitter:
        factors = 1 + color_jitter * (2 * torch.rand(3, B, 1, 1, 1, generator=generator) - 1).to(images.device)
        brightness, contrast, saturation = factors
        light = images / 2 + 0.5
        gray = light.mean(dim=1, keepdim=True)
        light = gray + saturation * (light - gray)
        middle = light.mean(dim=(1, 2, 3), keepdim=True)
        light = brightness * (middle + contrast * (light - middle))
        images = (2 * light - 1).clamp(-1, 1)
    return images
