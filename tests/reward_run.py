"""A short training of a reward model in processes of their own.

    torchrun --nproc_per_node N reward_run.py OUTPUT_DIR

Writes `OUTPUT_DIR/model-RANK.safetensors`, the model that each process ends with.
"""

import os
import sys

from safetensors.torch import save_file
from trainers_scene import build


def main() -> None:
    output_dir = sys.argv[1]
    trainer, _ = build("reward-volume", output_dir, max_steps=3)
    trainer.train()
    weights = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
    save_file(weights, f"{output_dir}/model-{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()
