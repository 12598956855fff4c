"""TunedWeights: the denoiser of a policy in training, from its optimizer to the weights the pipeline ends with."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import DistributedType
from diffusers.training_utils import cast_training_params
from huggingface_hub import HfApi
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..hub.client import in_one_sentence, prepare_repository
from ..models.adapters import carried_adapters, carries_fresh_adapters
from ..policies import DenoisingPolicy, make_policy
from ..precision import resolve_precision
from ..processes import process_state
from ..seeding import fold_seed
from .base import TrainingRun, in_fast_memory_format, thaw
from .lora import merge_lora
from .online_config import OnlineConfig
from .weight_average import WeightAverage


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
BEST_WEIGHTS = "best.safetensors"
REMEDY = "keep it by fuse_lora(), then unload_lora_weights(), before you train"


def add_lora(
    denoiser: torch.nn.Module, rank: int, target_modules: Sequence[str] = LORA_TARGETS, seed: int = 0
) -> None:
    """Freeze `denoiser` and inject a LoRA adapter (arXiv 2106.09685) of scale 1, the only part that is trained then; in float32,
    whatever the denoiser is in. Its initial weights follow from `seed` alone.

    A policy looks for the adapter when it is made, so this comes before `make_policy`. The same one that has learned nothing
    yet, as a trainer that never came to train leaves it, is replaced.

    Raises:
        InputError: another adapter is in it, or one that has learned.
    """
    wanted = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(target_modules))
    names = carried_adapters(denoiser)
    if names and carries_fresh_adapters(denoiser) and list(denoiser.peft_config.values()) == [wanted]:
        denoiser.unload_lora()
    elif names:
        raise InputError(f"The denoiser carries the LoRA adapter {names}, and a second would train on top; {REMEDY}.")
    denoiser.requires_grad_(False)
    device = next(denoiser.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(fold_seed(seed, "lora"))
        denoiser.add_adapter(wanted)
    cast_training_params(denoiser, torch.float32)


def check_precision(network: torch.nn.Module, mixed_precision: str, use_lora: bool = False) -> None:
    """Raise InputError unless what is trained of a network is in float32 (with `use_lora` an adapter, which will be), and all of
    it can compute with float32 inputs."""
    trained = {value.dtype for value in network.parameters() if value.requires_grad} - {torch.float32}
    if trained and not use_lora:
        raise InputError(
            f"The weights of {type(network).__name__} are {trained.pop()}, in which small updates are lost: load the pipeline in "
            "float32, and set mixed_precision; or train an adapter alone, by use_lora."
        )
    half = {value.dtype for value in network.parameters()} & {torch.float16, torch.bfloat16}
    if half and resolve_precision(mixed_precision, process_state().device) == "no":
        raise InputError(
            f"{type(network).__name__} is {half.pop()}, and its inputs are float32 in training: set mixed_precision (bf16 or fp16), "
            "or load the pipeline in float32."
        )


def tunable_policy(pipeline, args: OnlineConfig) -> DenoisingPolicy:
    """The policy of a pipeline, after its denoiser got the adapter and the checkpointing that the config asks for.

    Without `use_lora` the denoiser may carry an adapter by `add_lora`, which then is what is trained, and stays in it. A
    denoiser that is frozen as a whole, as an earlier adapter leaves it, is trained as a whole.

    Raises:
        InputError: the denoiser carries another adapter (one that has learned already is no part of the policy's reference), or
            is in a precision that can't be trained.
    """
    if args.use_lora:
        check_precision(pipeline.unet, args.mixed_precision, use_lora=True)  # a refused pipeline stays as it was
        add_lora(pipeline.unet, args.lora_rank, args.lora_target_modules or LORA_TARGETS, args.seed)
    elif names := carried_adapters(pipeline.unet):
        if not carries_fresh_adapters(pipeline.unet):
            raise InputError(
                f"The denoiser carries the LoRA adapter {names}, which the reference that training is held to would lack; {REMEDY}."
            )
    else:
        thaw(pipeline.unet)
    check_precision(pipeline.unet, args.mixed_precision)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return make_policy(pipeline)


@contextmanager
def only_denoiser_trained(pipeline, others: Sequence[torch.nn.Module] = ()) -> Iterator[None]:
    """Within it no network of the pipeline but the denoiser, and none of `others`, keeps gradients of its own, and all are in
    evaluation mode (as samplers use them; a codebook that learns would move)."""
    networks = [*(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)), *others]
    frozen = [
        value
        for network in networks
        if network is not pipeline.unet
        for value in network.parameters()
        if value.requires_grad
    ]
    for network in networks:
        network.eval()
    for value in frozen:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(True)


class TunedWeights:
    """The trained parameters of `pipeline.unet`, their optimizer, learning rate and exponential average.

    Making it puts the denoiser that accelerate wrapped into `policy.denoiser`; `finish` gives the plain one back to
    the pipeline. Make it before `run.resume()`, which then loads weights, optimizer, learning rate and average.

    Args:
        run: the training; its `args` are an `OnlineConfig`.
        pipeline: has the denoiser, as `unet`, and is pushed to the Hub at the end where the config asks for it.
        policy: the policy of this pipeline.
        num_updates: optimizer updates of the whole training.

    Attributes:
        denoiser: the wrapped denoiser, for `Accelerator.accumulate`.
        trainable: the trained parameters by name.

    Raises:
        InputError: LoRA or an average where the weights are sharded (FSDP), or a repository that can't be written to.
    """

    def __init__(self, run: TrainingRun, pipeline, policy: DenoisingPolicy, num_updates: int):
        args = run.args
        self.run, self.args, self.pipeline, self.policy = run, args, pipeline, policy
        self._sharded = run.accelerator.distributed_type == DistributedType.FSDP
        lora = args.use_lora or carried_adapters(pipeline.unet)  # the latter put in by the caller
        if self._sharded and (lora or args.ema_decay is not None):
            raise InputError("With FSDP all weights are trained, without averages: unset use_lora and ema_decay.")
        self._repository = self._prepare_repository()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module) and part is not pipeline.unet:
                part.eval()  # in training mode a codebook learns from what it decodes
        denoiser = pipeline.unet
        if not self._sharded:  # FSDP wants them contiguous
            denoiser = in_fast_memory_format(denoiser, args.mixed_precision)
        optimizer = run.optimizer([value for value in denoiser.parameters() if value.requires_grad])
        scheduler = run.lr_scheduler(optimizer, num_updates)
        self.denoiser, self._optimizer, self._scheduler = run.accelerator.prepare(denoiser, optimizer, scheduler)
        policy.denoiser = self.denoiser
        inner = run.accelerator.unwrap_model(self.denoiser)  # sharding has put other parameters into it
        self.trainable = {name: value for name, value in inner.named_parameters() if value.requires_grad}
        self._average = None
        if args.ema_decay is not None:
            self._average = WeightAverage(list(self.trainable.values()), args.ema_decay, run.device)
            run.keep(self._average, "ema_decay")
        run.accelerator.register_save_state_pre_hook(self._keep_best_in)
        run.accelerator.register_load_state_pre_hook(self._take_best_from)
        self._broken = False

    def backward(self, loss: torch.Tensor) -> torch.Tensor | None:
        """Add the gradient of one micro-batch; with the last one of an update, clip it and step. A gradient that is not finite
        ends the run before it reaches the weights.

        Call it within `Accelerator.accumulate(weights.denoiser)`. Returns the norm before clipping with the last micro-batch.
        """
        accelerator, norm = self.run.accelerator, None
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.trainable.values(), self.args.max_grad_norm)
            if not self.run.may_step(norm):
                self._broken = True
                self.run.stop("the gradient is not finite", binding=False)  # a lower rate may mend it
        if not self._broken:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def end_update(self) -> bool:
        """Move the learning rate and the average on, once per optimizer update. Returns whether another may follow in this rollout:
        none does after a gradient that was not finite, which moves nothing."""
        if self._broken:
            return False
        self._scheduler.step()
        if self._average is not None:
            self._average.step(self.trainable.values())
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the denoiser has its averaged weights, if there are any."""
        if self._average is None:
            yield
            return
        parameters = list(self.trainable.values())
        self._average.store(parameters)
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            self._average.restore(parameters)

    def whole(self) -> dict[str, torch.Tensor]:
        """What is trained, put together from all processes where it is sharded (FSDP); a copy, on the CPU.

        All processes must call it.
        """
        whole = {}
        for name, value in self.trainable.items():
            value = value.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            whole[name] = value.cpu().clone(memory_format=torch.contiguous_format)
        return whole

    def save_best(self) -> None:
        """Keep the present weights (averaged, if there is an average) for `finish(best=True)`, also after a resume."""
        with self.averaged():
            weights = self.whole()
        if self.run.is_main:
            path = self.run.output_dir / BEST_WEIGHTS
            save_file(weights, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        self.run.accelerator.wait_for_everyone()

    def _keep_best_in(self, models, weights, folder: str) -> None:
        """A checkpoint has the best weights of its time: the run may be resumed elsewhere, or from an earlier one."""
        best = self.run.output_dir / BEST_WEIGHTS
        if self.run.is_main and best.is_file():
            shutil.copyfile(best, Path(folder) / BEST_WEIGHTS)

    def _take_best_from(self, models, folder: str) -> None:
        best = self.run.output_dir / BEST_WEIGHTS
        if self.run.is_main and (Path(folder) / BEST_WEIGHTS).is_file():
            shutil.copyfile(Path(folder) / BEST_WEIGHTS, f"{best}.tmp")
            os.replace(f"{best}.tmp", best)
        self.run.accelerator.wait_for_everyone()

    def finish(self, best: bool) -> None:
        """Give the pipeline its denoiser back, unwrapped, with a LoRA adapter fused into it.

        Its weights are those of the last `save_best` if `best`, else the averaged or the last ones.
        """
        if best:
            weights = load_file(self.run.output_dir / BEST_WEIGHTS)
        else:
            with self.averaged():
                weights = self.whole()
        unet = self.run.accelerator.unwrap_model(self.denoiser, keep_fp32_wrapper=False)
        if self._sharded:
            unet = self.policy.frozen_copy()  # the same network in one piece
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        if self.args.use_lora:
            merge_lora(unet)
        self.pipeline.unet = self.policy.denoiser = unet.requires_grad_(True).eval()

    def _prepare_repository(self) -> str | None:
        """The repository for the tuned pipeline, if the config asks for one. It is made before the training: who may not write
        there learns it then."""
        if not (self.args.push_to_hub and self.run.is_main):
            return None
        name = self.args.hub_model_id or self.run.output_dir.resolve().name
        with in_one_sentence(name, None):
            return prepare_repository(HfApi(), name, self.args.hub_private_repo, None)[0]

    def push_to_hub(self) -> None:
        """Save the pipeline in `output_dir/pipeline` and push it from there to its repository on the Hub, if the config asks for it;
        after `finish`.

        Raises:
            InputError: the Hub refuses it or is out of reach.
        """
        if self._repository is None:
            return
        folder = self.run.output_dir / "pipeline"
        try:
            with in_one_sentence(self._repository, None):
                self.pipeline.save_pretrained(
                    str(folder), push_to_hub=True, repo_id=self._repository, private=self.args.hub_private_repo
                )
        except InputError as error:
            raise InputError(
                f"The tuned pipeline could not be pushed: {error} It is in {folder}, from where `msrl push` sends it without "
                "another training."
            ) from error
