"""An adapter on its way into training: how it is drawn, and which that are there already may be trained or replaced."""

import pytest
import torch
from accelerate import DistributedType
from peft.utils import get_peft_model_state_dict
from tiny import Brightness, tiny_pipeline

from msrl_diffusers import DiffusionNFTConfig, DiffusionNFTTrainer, DiffusionPPOConfig
from msrl_diffusers.errors import InputError
from msrl_diffusers.models.adapters import carried_adapters
from msrl_diffusers.trainers.base import TrainingRun
from msrl_diffusers.trainers.tuned_weights import TunedWeights, add_lora, tunable_policy


def test_a_new_adapter_follows_from_the_seed():
    found = []
    for state, seed in ((0, 3), (1, 3), (0, 4)):
        pipeline = tiny_pipeline()
        torch.manual_seed(state)
        add_lora(pipeline.unet, rank=2, seed=seed)
        found.append(get_peft_model_state_dict(pipeline.unet))
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(state)))  # untouched
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not all(torch.equal(value, found[2][name]) for name, value in found[0].items())


def test_an_adapter_that_has_learned_nothing_may_be_trained():
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet, rank=2)
    policy = tunable_policy(pipeline, DiffusionPPOConfig(output_dir="unused", report_to="none"))
    assert policy.denoiser is pipeline.unet
    trained = [name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    with pytest.raises(InputError, match=r"^The denoiser carries the LoRA adapter default, and a second would"):
        add_lora(pipeline.unet, rank=3)
    add_lora(pipeline.unet, rank=2, seed=1)  # the same one, drawn again
    trained = [name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        dict(pipeline.unet.named_parameters())[trained[-1]].fill_(0.1)  # a single B of many
    with pytest.raises(InputError, match=r"which the reference that training is held to would lack"):
        tunable_policy(pipeline, DiffusionPPOConfig(output_dir="unused", report_to="none"))


@pytest.mark.parametrize("use_lora", [False, True], ids=["put in by the caller", "by the config"])
def test_an_adapter_is_not_sharded(use_lora, tmp_path, monkeypatch):
    pipeline, args = tiny_pipeline(), DiffusionPPOConfig(output_dir=str(tmp_path), report_to="none", use_lora=use_lora)
    if not use_lora:
        add_lora(pipeline.unet, rank=2)
    policy, run = tunable_policy(pipeline, args), TrainingRun(args, "ppo")
    monkeypatch.setattr(type(run.accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="With FSDP all weights are trained"):
        TunedWeights(run, pipeline, policy, num_updates=1)


def test_a_trainer_that_was_refused_may_be_made_again(tmp_path):
    pipeline = tiny_pipeline()
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_lora": True}
    wrong = DiffusionNFTConfig(**settings, sampler="DPMSolverMultistepScheduler", eta=1.0)
    with pytest.raises(InputError, match="has no eta"):
        DiffusionNFTTrainer(pipeline, [Brightness()], wrong)
    assert not carried_adapters(pipeline.unet)
    DiffusionNFTTrainer(
        pipeline, [Brightness()], DiffusionNFTConfig(**settings, sampler="DPMSolverMultistepScheduler")
    )
    assert carried_adapters(pipeline.unet) == "default"
