"""Speed, memory and time to a reward of DiffusionPPOTrainer beside TRL's DDPOTrainer, on one tiny Stable Diffusion.

    python examples/benchmarks/ppo_vs_trl.py --trl_python trl-venv/bin/python --output examples/results/ppo-vs-trl.json

TRL had that trainer up to 0.23.1, so it needs an environment of its own:

    python -m venv trl-venv
    trl-venv/bin/pip install torch==2.13.0 "trl[diffusers]==0.23.1" transformers==5.23.0 diffusers==0.42.1 \
        accelerate==1.15.0 peft==0.21.2 safetensors==0.8.0 ftfy==6.3.1

The two take turns on the same folder of weights, in processes of their own with all cores, by `_ppo_vs_trl_child.py`.

- `ratio_equal_work`: our samples per second over TRL's with the same steps, guidance, batches, precision and adapter, without
  a leash. `floor_share` is the share of an epoch that the denoiser's forwards and backwards take in a bare loop.
- `ratio_time_to_reward`: TRL's seconds over ours until the mean raw reward of a rollout is one standard deviation above that of
  the pretrained model; each side with the settings its own documentation stands for. A run that does not get there counts
  with all its seconds, and `reached` is false: without TRL's the ratio is a lower bound, without ours an upper one. As the two sample differently while
  they train, `rise_in_common_sampler` is what has been gained in one sampler that is the same for both.
- `peak_memory_ratio`: our peak resident memory over TRL's, in the runs of equal work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from msrl_diffusers.files import write_json
from msrl_diffusers.study.report import git_commit


CHILD = Path(__file__).with_name("_ppo_vs_trl_child.py")
PROMPTS, PROMPT_LENGTH = ["a lesion", "a nevus", "hair", "nothing"], 16
LATENT_SIZE, CHANNELS = 16, (64, 96)
GUIDANCE = 5.0  # TRL's default, and the one of Stable Diffusion in DDPO
SHARED = {  # one update per rollout
    "batch_size": 8,
    "num_batches": 4,
    "num_steps": 10,
    "learning_rate": 1e-3,
}
TRL = {"sample_guidance_scale": GUIDANCE, "train_cfg": True, "mixed_precision": "no"}
EQUAL_WORK = {
    "trl": TRL,
    "ours": {"guidance_scale": GUIDANCE, "train_cfg": True, "mixed_precision": "no", "kl_coef": 0.0},
}
RACE = {  # ours: half of the steps trained, no guidance, with a KL penalty
    "trl": TRL,
    "ours": {"guidance_scale": 1.0, "timestep_fraction": 0.5, "mixed_precision": "auto", "kl_coef": 0.01},
}


def write_pipeline(folder: Path) -> int:
    """A Stable Diffusion without pretraining; the denoiser's number of parameters.

    It predicts the velocity. At random weights that is about 0, which is right for white noise, so samples stay in range and
    the reward depends on them from the start, as it would for a pretrained model.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=PROMPT_LENGTH)
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    deeper = len(CHANNELS) - 1
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=4, out_channels=4, block_out_channels=CHANNELS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * deeper + ("DownBlock2D",), norm_num_groups=16,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deeper, cross_attention_dim=64, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=1, sample_size=2 * LATENT_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.0,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, prediction_type="v_prediction",
    )  # fmt: skip
    StableDiffusionPipeline(
        vae, CLIPTextModel(text_config), tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return sum(parameter.numel() for parameter in unet.parameters())


def run_child(python: str, side: str, seed: int, epochs: int, scratch: Path, settings: dict, race: bool) -> dict:
    """What one run of one side measured."""
    guided = settings["ours"]["guidance_scale"] != 1.0 if side == "ours" else True
    content = {
        "side": side, "seed": seed, "epochs": epochs, "race": race, "folder": str(scratch / "pipeline"),
        "output_dir": str(scratch / "run"), "prompts": PROMPTS, "prompt_length": PROMPT_LENGTH, "guided": guided,
        "common_guidance": GUIDANCE, **SHARED, **settings,
    }  # fmt: skip
    write_json(scratch / "settings.json", content)
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "HF_HUB_OFFLINE": "1"}
    command = [python, str(CHILD), str(scratch / "settings.json"), str(scratch / "result.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads((scratch / "result.json").read_text())


def equal_work_figures(runs: list[dict]) -> dict:
    """Figures of one side; the first epoch of every run is warm-up."""
    seconds = [median(run["epoch_seconds"][1:]) for run in runs]
    samples = SHARED["batch_size"] * SHARED["num_batches"]
    return {
        "samples_per_second": [round(samples / value, 3) for value in seconds],
        "epoch_seconds": [round(value, 3) for value in seconds],
        "floor_seconds": [round(run["floor_seconds"], 3) for run in runs],
        "floor_share": round(
            median(run["floor_seconds"] / value for run, value in zip(runs, seconds, strict=True)), 3
        ),
        "peak_mib": [round(run["peak_mib"]) for run in runs],
    }


def race_figures(runs: list[dict]) -> dict:
    """Figures of one side."""
    return {
        "seconds": [round(run["seconds"], 2) for run in runs],
        "reached": [run["reached"] for run in runs],
        "rollouts": [len(run["reward_means"]) for run in runs],
        "rise_in_common_sampler": [round(run["rise_in_common_sampler"], 2) for run in runs],
        "reward_of_the_first_rollout": [round(run["reward_means"][0], 4) for run in runs],
        "reward_aimed_at": [round(run["target"], 4) for run in runs],
    }


def ratio(one: list[float], other: list[float]) -> float:
    """The median of `one / other` over the seeds."""
    return round(median(a / b for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl_python", required=True, help="Python of the environment with TRL 0.23.1")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of equal work; the first is not counted")
    parser.add_argument(
        "--race_epochs", type=int, default=100, help="epochs after which a side has not reached the reward"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/ppo-vs-trl.json"))
    args = parser.parse_args()
    pythons = {"ours": sys.executable, "trl": args.trl_python}
    equal, race = {"ours": [], "trl": []}, {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        parameters = write_pipeline(scratch / "pipeline")
        for seed in range(args.seeds):
            for side in list(pythons)[:: -1 if seed % 2 else 1]:  # a machine that slows down hits both alike
                arguments = (pythons[side], side, seed)
                equal[side].append(run_child(*arguments, args.epochs, scratch, EQUAL_WORK, race=False))
                race[side].append(run_child(*arguments, args.race_epochs, scratch, RACE, race=True))
    work = {side: equal_work_figures(runs) for side, runs in equal.items()}
    times = {side: race_figures(runs) for side, runs in race.items()}
    content = {
        "what": "PPO on a tiny Stable Diffusion, LoRA of rank 4, reward: mean brightness; ours beside TRL's DDPOTrainer",
        "ratio_equal_work": ratio(work["ours"]["samples_per_second"], work["trl"]["samples_per_second"]),
        "floor_share": {side: figures["floor_share"] for side, figures in work.items()},
        "ratio_time_to_reward": ratio(times["trl"]["seconds"], times["ours"]["seconds"]),
        "reached": {side: all(figures["reached"]) for side, figures in times.items()},
        "peak_memory_ratio": ratio(work["ours"]["peak_mib"], work["trl"]["peak_mib"]),
        "equal_work": {"settings": {**SHARED, **EQUAL_WORK, "epochs": args.epochs}, **work},
        "time_to_reward": {"settings": {**SHARED, **RACE, "race_epochs": args.race_epochs}, **times},
        "seeds": args.seeds,
        "denoiser_parameters": parameters,
        "latent_size": LATENT_SIZE,
        "threads": equal["ours"][0]["threads"],
        "commit": git_commit(),
        "versions": {side: runs[0]["versions"] for side, runs in equal.items()},
    }
    write_json(args.output, content)
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
