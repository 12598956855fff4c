"""A watchdog that asks nobody for a label: the Frechet distance of a rollout's samples to real volumes."""

import torch
from accelerate.utils import gather

from ..data.volumes import VolumeDataset
from ..errors import InputError
from ..evaluation.features import extract_features
from ..evaluation.fidelity import frechet_distance
from ..processes import process_state
from ..rollouts import Rollout


class FrechetWatchdog:
    """The Frechet distance to real volumes, the mean over their classes; with `select_by="-NAME"` of a trainer it picks the weights.

    Rewards go on rising when samples get worse; this distance turns as well, but later than that of an unseen judge: it picks weights
    well, and stops no run in time (`examples/results/README.md`, "Rewards under optimization"). As many volumes are compared as the
    smaller side has: give rollouts of a few dozen samples of each class or more, for the distance of fewer is mostly chance.

    Args:
        extractor: network of the features, as `evaluation.features.extract_features` takes it; on the device of the samples, and
            not the one that judges in the end.
        real: the volumes, of the classes that are tuned.
    """

    def __init__(self, extractor: torch.nn.Module, real: VolumeDataset):
        self.extractor, self.real = extractor, real
        self._features = extract_features(extractor, real.pixel_values)

    def __call__(self, rollout: Rollout) -> float:
        """The distance of a rollout's samples, those of all processes, which must all call it."""
        features = extract_features(self.extractor, rollout.samples)
        return self._distance(_everywhere(features), _everywhere(rollout.conditions))

    def distance(self, samples: torch.Tensor, class_labels: torch.Tensor) -> float:
        """The distance of samples `[N, C, D, H, W]` in [-1, 1] with class labels `[N]`.

        Raises:
            InputError: a class with fewer than two features (one sample of a 3D extractor), of which there is no covariance.
        """
        return self._distance(extract_features(self.extractor, samples), class_labels.cpu())

    def _distance(self, features: torch.Tensor, class_labels: torch.Tensor) -> float:
        distances = []
        for label in self.real.class_labels.unique().tolist():
            real, generated = self._features[self.real.class_labels == label], features[class_labels == label]
            count = min(len(real), len(generated))
            if count * features.shape[2] < 2:  # slices count
                raise InputError(
                    f"A Frechet distance needs two samples and two real volumes of every class; of {self.real.id2label[label]!r} there "
                    f"are {len(generated)} and {len(real)}: make rollouts larger, or leave out real volumes of a class that is not tuned."
                )
            distances.append(frechet_distance(real[:count], generated[:count]))
        return sum(distances) / len(distances)


def _everywhere(values: torch.Tensor) -> torch.Tensor:
    """`values [B, ...]` of all processes, on the CPU, in the order of one that has all samples: processes take these in turn."""
    state = process_state()
    if state.num_processes > 1:
        values = gather(values.to(state.device)).unflatten(0, (state.num_processes, -1)).transpose(0, 1).flatten(0, 1)
    return values.cpu()
