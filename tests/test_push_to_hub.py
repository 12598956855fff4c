"""PPO's last step on the way to others: the tuned pipeline in a repository, on a Hub of our own."""

import subprocess
import sys

import torch
from hub_server import HubServer
from tiny import tiny_pipeline

from msrl_diffusers import MedVolumePipeline


SCRIPT = """
import sys
from tiny import tiny_pipeline
from msrl_diffusers import DiffusionPPOConfig, DiffusionPPOTrainer

def brightness(samples, conditions):
    return samples.flatten(1).mean(dim=1)

args = DiffusionPPOConfig(
    output_dir=sys.argv[1], max_steps=1, rollout_batch_size=4, num_rollout_batches=1, train_batch_size=4, num_inference_steps=3,
    min_std=1e-6, learning_rate=1e-2, report_to="none", use_lora=True, push_to_hub=True, hub_model_id="somebody/tuned",
)
pipeline = tiny_pipeline()
DiffusionPPOTrainer(pipeline, brightness, args).train()
pipeline.save_pretrained(sys.argv[1] + "/kept")
"""


def push_run(hub, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=hub.environment(folder / "cache"),
        capture_output=True,
        text=True,
    )


def test_the_tuned_pipeline_is_pushed(tmp_path):
    with HubServer() as hub:
        done = push_run(hub, tmp_path / "run")
        assert done.returncode == 0, done.stderr[-2000:]
        repository = hub.repositories["somebody/tuned"]
    assert repository["private"] is True
    for name, content in repository["files"].items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    pulled, kept = (
        MedVolumePipeline.from_pretrained(folder).unet.state_dict()
        for folder in (tmp_path / "pulled", tmp_path / "run" / "kept")
    )
    assert all(torch.equal(pulled[name], kept[name]) for name in kept)
    before = tiny_pipeline().unet.state_dict()
    assert set(pulled) == set(before)  # the adapter is part of the weights
    assert any(not torch.equal(pulled[name], before[name]) for name in before)
    assert "README.md" in repository["files"]


def test_who_may_not_push_learns_it_before_the_training(tmp_path):
    with HubServer() as hub:
        hub.fail("POST", "/api/repos/create", status=403)
        done = push_run(hub, tmp_path)
    assert done.returncode == 1
    assert "The Hub does not let this token write to somebody/tuned (403)" in done.stderr
    assert not (tmp_path / "log.jsonl").exists()


def test_a_push_that_fails_leaves_the_tuned_pipeline(tmp_path):
    with HubServer() as hub:
        hub.fail("POST", "/commit/", status=403)
        done = push_run(hub, tmp_path)
    assert done.returncode == 1
    assert "The tuned pipeline could not be pushed: The Hub does not let this token write" in done.stderr
    assert f"It is in {tmp_path}/pipeline, from where `msrl push` sends it without another training." in done.stderr
    tuned, before = (
        MedVolumePipeline.from_pretrained(tmp_path / "pipeline").unet.state_dict(),
        tiny_pipeline().unet.state_dict(),
    )
    assert any(not torch.equal(tuned[name], before[name]) for name in before)
