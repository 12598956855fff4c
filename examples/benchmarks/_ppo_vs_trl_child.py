"""One run of one side of `ppo_vs_trl.py`, which starts this file with the Python of either environment:

    python _ppo_vs_trl_child.py SETTINGS.json RESULT.json

Both sides are timed by the same code here: the reward notes when a rollout was scored, `marks` are the ends of epochs. Time
starts after imports, loading and set-up; memory does not, it is the peak of the whole process.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig


# what TRL has no option for; its other start of the first factor makes steps several times larger than peft's default does
ADAPTER = {
    "r": 4,
    "lora_alpha": 4,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_k", "to_q", "to_v", "to_out.0"],
}
FLOOR_REPEATS = 8
PACKAGES = ("trl", "torch", "diffusers", "transformers", "accelerate", "peft")


class MeanBrightness:
    """The reward of both sides, in the form of DDPO trainers; notes the time and the mean of every scored rollout."""

    def __init__(self, batches_per_rollout: int):
        self.batches_per_rollout = batches_per_rollout
        self.batches, self.times, self.means, self.target = [], [], [], None

    def __call__(self, images, prompts, metadata):
        rewards = images.float().flatten(1).mean(dim=1)
        self.batches.append(rewards)
        if len(self.batches) == self.batches_per_rollout:
            rollout, self.batches = torch.cat(self.batches), []
            self.times.append(time.perf_counter())
            self.means.append(rollout.mean().item())
            if self.target is None:  # one standard deviation above the pretrained model
                self.target = self.means[0] + rollout.std().item()
        return rewards, [{}] * len(images)

    @property
    def reached(self) -> bool:
        return self.means[-1] >= self.target


def add_adapter(unet: UNet2DConditionModel) -> None:
    """The adapter that TRL trains, on frozen weights."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(**ADAPTER))


def run_ours(settings: dict, reward: MeanBrightness) -> tuple[StableDiffusionPipeline, list[float]]:
    """The trained pipeline and the marks."""
    from transformers import TrainerCallback

    from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            marks.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.perf_counter())
            control.should_training_stop = settings["race"] and reward.reached

    pipeline = StableDiffusionPipeline.from_pretrained(settings["folder"])
    pipeline.set_progress_bar_config(disable=True)
    add_adapter(pipeline.unet)  # instead of `use_lora`, to start from the same distribution as TRL's
    args = DiffusionPPOConfig(
        output_dir=settings["output_dir"], report_to="none", seed=settings["seed"], max_steps=settings["epochs"],
        rollout_batch_size=settings["batch_size"], num_rollout_batches=settings["num_batches"],
        train_batch_size=settings["batch_size"], num_inference_steps=settings["num_steps"],
        learning_rate=settings["learning_rate"], weight_decay=1e-4, **settings["ours"],
    )  # fmt: skip
    DiffusionPPOTrainer(pipeline, reward, args, train_conditions=settings["prompts"], callbacks=[Clock()]).train()
    return pipeline, marks


def run_trl(settings: dict, reward: MeanBrightness) -> tuple[StableDiffusionPipeline, list[float]]:
    """The trained pipeline and the marks. The loop is that of `DDPOTrainer.train`, with an end."""
    import accelerate
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    accelerate.PartialState()  # TRL's pipeline logs before accelerate is up, which raises
    samples = settings["batch_size"] * settings["num_batches"]
    prompts = iter(settings["prompts"] * (samples * settings["epochs"]))
    config = DDPOConfig(
        seed=settings["seed"], num_epochs=settings["epochs"], save_freq=settings["epochs"] + 1,
        sample_batch_size=settings["batch_size"], sample_num_batches_per_epoch=settings["num_batches"],
        train_batch_size=settings["batch_size"], sample_num_steps=settings["num_steps"],
        train_gradient_accumulation_steps=settings["num_batches"],
        train_learning_rate=settings["learning_rate"], train_adam_weight_decay=1e-4, **settings["trl"],
    )  # fmt: skip
    pipeline = DefaultDDPOStableDiffusionPipeline(settings["folder"])
    trainer = DDPOTrainer(config, reward, lambda: (next(prompts), {}), pipeline)
    updates, marks = 0, [time.perf_counter()]
    for epoch in range(settings["epochs"]):
        updates = trainer.step(epoch, updates)
        marks.append(time.perf_counter())
        if settings["race"] and reward.reached:
            break
    return pipeline.sd_pipeline, marks


def floor_of_an_epoch(settings: dict) -> float:
    """Seconds that the denoiser's forwards and backwards of an epoch take in a bare loop, in the side's memory format."""
    unet = UNet2DConditionModel.from_pretrained(settings["folder"], subfolder="unet")
    add_adapter(unet)
    if settings["side"] == "ours":
        unet.to(memory_format=torch.channels_last)
    size, copies = unet.config.sample_size, 2 if settings["guided"] else 1
    latents = torch.randn(settings["batch_size"] * copies, unet.config.in_channels, size, size)
    embeds = torch.randn(len(latents), settings["prompt_length"], unet.config.cross_attention_dim)
    seconds = {"sample": [], "train": []}
    for _ in range(FLOOR_REPEATS):
        started = time.perf_counter()
        with torch.no_grad():
            unet(latents, 500, embeds)
        seconds["sample"].append(time.perf_counter() - started)
        started = time.perf_counter()
        unet(latents, 500, embeds).sample.square().mean().backward()
        seconds["train"].append(time.perf_counter() - started)
    return settings["num_batches"] * settings["num_steps"] * sum(map(statistics.median, seconds.values()))


@torch.no_grad()
def rise_in_common_sampler(settings: dict, pipeline: StableDiffusionPipeline) -> float:
    """How much brighter the tuned pipeline samples than the pretrained one, in standard deviations of the latter: one
    deterministic guided sampler for both sides, whatever they sampled with in training."""
    rewards = []
    for one in (StableDiffusionPipeline.from_pretrained(settings["folder"]), pipeline):
        one.set_progress_bar_config(disable=True)
        one.unet.eval()
        images = one(
            settings["prompts"], num_images_per_prompt=16, num_inference_steps=settings["num_steps"],
            guidance_scale=settings["common_guidance"], output_type="pt",
            generator=torch.Generator().manual_seed(settings["seed"]),
        ).images  # fmt: skip
        rewards.append(images.float().flatten(1).mean(dim=1))
    return ((rewards[1].mean() - rewards[0].mean()) / rewards[0].std()).item()


def peak_memory_mib() -> float:
    """The largest resident size this process has had. Not `ru_maxrss`, which begins with that of the parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # our trainer does so by itself
    reward = MeanBrightness(settings["num_batches"])
    pipeline, marks = {"ours": run_ours, "trl": run_trl}[settings["side"]](settings, reward)
    epochs = [end - start for start, end in pairwise(marks)]
    result = {"peak_mib": peak_memory_mib(), "reward_means": reward.means, "epoch_seconds": epochs}
    if settings["race"]:
        result |= {
            "seconds": reward.times[-1] - marks[0],  # the rollout that shows the rise is part of it, its update is not
            "reached": reward.reached,
            "target": reward.target,
            "rise_in_common_sampler": rise_in_common_sampler(settings, pipeline),
        }
    else:
        result["floor_seconds"] = floor_of_an_epoch(settings)
    result["threads"] = torch.get_num_threads()
    result["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
