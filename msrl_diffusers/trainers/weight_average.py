"""WeightAverage: the exponential average of weights that every trainer which keeps one keeps."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


class WeightAverage(EMAModel):
    """diffusers' `EMAModel`, warmed up, on a device of its own.

    It stays there when it is loaded, with its decay: accelerate reads checkpoints of such objects to the CPU.

    Args:
        parameters: what is averaged.
        decay: the largest decay; it is reached with the number of updates.
        device: where the averages lie.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, device: torch.device):
        # many tensors at once: slower on a CPU
        super().__init__(parameters, decay=decay, use_ema_warmup=True, power=0.75, foreach=device.type == "cuda")
        self.to(device)

    def load_state_dict(self, state_dict: dict) -> None:
        device = self.shadow_params[0].device
        super().load_state_dict({**state_dict, "decay": self.decay})
        self.to(device)
