"""MedVolumePipeline: class-conditional latent diffusion of medical volumes."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import Attention
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..data.processor import to_nifti
from ..errors import InputError
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.unet_3d import UNet3DModel
from .lora import VolumeLoraLoaderMixin
from .remote_code import plain_index
from .schedulers import set_last_timesteps, set_timesteps, step_arguments


StepCallback = (
    Callable[["MedVolumePipeline", int, torch.Tensor, dict], dict] | PipelineCallback | MultiPipelineCallbacks
)


@dataclass
class MedVolumePipelineOutput(BaseOutput):
    """`volumes`: `Tensor` or `ndarray [B, C, D, H, W]` in [-1, 1], a list of `nibabel.Nifti1Image`, or latents."""

    volumes: torch.Tensor | np.ndarray | list[nib.Nifti1Image]


class MedVolumePipeline(DiffusionPipeline, VolumeLoraLoaderMixin):
    r"""Generates volumes of given classes, and noised reconstructions of given volumes (arXiv 2603.06173).

    What diffusers' pipelines have, it has: `from_pipe`, variants, offloading, step callbacks, LoRA adapters
    (`load_lora_weights`, `set_adapters`, `fuse_lora`, ...). For large volumes there is `pipe.vqvae.enable_tiling()`.

    Args:
        vqvae (`VQModel3D`): autoencoder whose latents are denoised.
        unet (`UNet3DModel`): class-conditional denoiser.
        scheduler (`SchedulerMixin`): DDIM, DPM-Solver++, UniPC, Euler, DDPM or another for noise as DDPM adds it, made by
            `from_config(pipe.scheduler.config)`, which keeps what is predicted and the noise schedule.
        spacing (`tuple[float]`, *optional*): edge lengths of a voxel in millimetres along D, H and W, for the affine of NIfTI
            output; of an image in RAS `image.header.get_zooms()[::-1]`.
        id2label (`dict`, *optional*): names of the classes; JSON's string keys are accepted.
        supports_guidance (`bool`): whether the denoiser was also trained without class (class dropout), as guidance needs it.

    Raises:
        InputError: a denoiser without `sample_size` or without classes.

    Example:
        >>> import msrl_diffusers
        >>> pipe = msrl_diffusers.MedVolumePipeline.from_pretrained("model_cards/phantoms-32")
        >>> image = pipe("HGG", num_inference_steps=25, output_type="nifti").volumes[0]
        >>> image.to_filename("brain.nii.gz")
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs = ["latents", "class_labels"]
    _guidance_scale, _num_timesteps, _interrupt = 1.0, 0, False

    def __init__(
        self,
        vqvae: VQModel3D,
        unet: UNet3DModel,
        scheduler: SchedulerMixin,
        spacing: list[float] | None = None,
        id2label: dict | None = None,
        supports_guidance: bool = True,
    ):
        super().__init__()
        missing = [
            name for name in ("sample_size", "num_class_embeds") if unet is not None and unet.config[name] is None
        ]
        if missing:
            raise InputError(
                f"The pipeline needs a denoiser that states its {missing[0]}; make the UNet3DModel with one."
            )
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)
        self.register_to_config(
            spacing=None if spacing is None else [float(edge) for edge in spacing],
            id2label=id2label,
            supports_guidance=supports_guidance,
        )

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        """An index as `save_pretrained` writes it, also of a repository by `msrl push`: that one names files of its own, which
        diffusers runs with `trust_remote_code`. Who calls this class has the package, so they need not be trusted."""
        return plain_index(super()._dict_from_json_file(json_file))

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label; numbers as names where none were given."""
        if self.config.id2label:
            return {int(label): name for label, name in self.config.id2label.items()}
        return {label: str(label) for label in range(self.unet.config.num_class_embeds or 0)}

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges in millimetres, 1 where not known."""
        return tuple(self.config.spacing or (1.0, 1.0, 1.0))

    @property
    def null_class(self) -> int:
        """The label that stands for no class in guidance."""
        return self.unet.config.num_class_embeds

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """`(C, d, h, w)` of the latents the denoiser was trained on."""
        return (self.unet.config.in_channels, *[self.unet.config.sample_size] * 3)

    @property
    def volume_shape(self) -> tuple[int, int, int, int]:
        """`(C, D, H, W)` of the volumes it makes."""
        edges = (edge * self.vqvae.downsample_factor for edge in self.latent_shape[1:])
        return (self.vqvae.config.out_channels, *edges)

    @property
    def guidance_scale(self) -> float:
        """Of the step that runs. A callback may set `_guidance_scale`, to 1 for a cutoff."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the denoiser also runs without class in the step that runs."""
        return self._guidance_scale != 1.0

    def check_guidance(self) -> None:
        """Raise InputError if the denoiser can't be guided."""
        if not self.config.supports_guidance:
            raise InputError(
                "This denoiser was trained without class dropout, so it can't be guided: use guidance_scale=1, or train one with "
                "class_dropout=0.1."
            )

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the sampling that runs has."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback, and the sampling ends after this step, with the latents as they are."""
        return self._interrupt

    def encode_volumes(self, volumes: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, d, h, w]` of about unit variance, of `volumes [B, C, D, H, W]` in [-1, 1]."""
        config = self.vqvae.config
        volumes = volumes.to(self._execution_device, self.vqvae.dtype)
        return (self.vqvae.encode(volumes).latents - config.shift_factor) * config.scaling_factor

    def decode_latents(self, latents: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """Volumes `[B, C, D, H, W]`, float32, clipped to [-1, 1], of latents (quantized on the way, unless
        `force_not_quantize`)."""
        config = self.vqvae.config
        latents = latents.to(self._execution_device, self.vqvae.dtype) / config.scaling_factor + config.shift_factor
        return self.vqvae.decode(latents, force_not_quantize=force_not_quantize).sample.float().clamp(-1, 1)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As diffusers' own (`variant`, `max_shard_size`, `push_to_hub`, ...).

        Raises:
            InputError: the denoiser carries a LoRA adapter.
        """
        self._check_no_adapter()
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """As diffusers' own (`private`, `variant`, `commit_message`, ...).

        Raises:
            InputError: the denoiser carries a LoRA adapter; no repository is made then.
        """
        self._check_no_adapter()
        return super().push_to_hub(repo_id, *args, **kwargs)

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        """What `enable_attention_slicing` and `disable_attention_slicing` call: `slice_size` heads at a time, half of them
        (`"auto"`) or one (`"max"`). PyTorch's own attention is lean already; without it, slices save memory."""
        for layer in (*self.unet.modules(), *self.vqvae.modules()):
            if isinstance(layer, Attention):
                heads = layer.sliceable_head_dim
                size = {"auto": max(1, heads // 2), "max": 1}.get(slice_size, slice_size)
                layer.set_attention_slice(size and min(size, heads))

    def prepare_class_labels(self, class_labels, device: torch.device | str | None = None) -> torch.Tensor:
        """Labels `[B]`, int64, of a label, a name, a list of either, or a tensor.

        Raises:
            ValueError: a label or a name the model does not know; the sentence lists those it knows.
        """
        if isinstance(class_labels, torch.Tensor | np.ndarray | np.integer):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if not len(class_labels):
            raise ValueError("At least one class label is needed.")
        names = {name: label for label, name in self.id2label.items()}
        labels = [names.get(value, value) for value in class_labels]
        unknown = [label for label in labels if label not in self.id2label]
        if unknown:
            raise ValueError(f"Unknown class {unknown[0]!r}; this model knows {self.id2label}.")
        return torch.tensor(labels, dtype=torch.long, device=device or self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        num_volumes_per_label: int = 1,
    ) -> MedVolumePipelineOutput | tuple:
        """Generate volumes of the classes given.

        Args:
            class_labels: labels or names, one per volume.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off (and halves the cost), 0 ignores the class.
            eta: of DDIM: 0 is deterministic, 1 is as stochastic as DDPM (arXiv 2010.02502, eq. 16); ignored by schedulers
                that have no such setting.
            generator: one generator, or one per volume.
            latents: starting noise `[B, C, d, h, w]`; drawn with `generator` by default.
            output_type: `"pt"`, `"np"`, `"nifti"` (of one channel) or `"latent"`.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)`; what it returns replaces the tensors. It
                may set `pipeline._interrupt` and `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs: which tensors it gets, of `latents` and `class_labels`.
            num_volumes_per_label: so many volumes for each label, one after the other.

        Raises:
            ValueError: unknown class or `output_type`, or latents or generators that don't fit.
            InputError: a scheduler of another kind, guidance of a denoiser that was not trained for it, or NIfTI output of
                several channels.
        """
        if num_volumes_per_label < 1:
            raise InputError(f"num_volumes_per_label must be at least 1, got {num_volumes_per_label}.")
        labels = self.prepare_class_labels(class_labels).repeat_interleave(num_volumes_per_label)
        tensor_inputs = self._tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_inputs(len(labels), output_type, generator, tensor_inputs)
        shape = (len(labels), *self.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"latents of shape {shape} are needed for these class_labels, got {tuple(latents.shape)}."
            )
        latents = latents.to(self._execution_device, self.unet.dtype)
        timesteps = set_timesteps(self.scheduler, num_inference_steps, self._execution_device)
        latents = latents * self.scheduler.init_noise_sigma
        self._guidance_scale = guidance_scale
        latents = self._denoise(latents, timesteps, labels, eta, generator, callback_on_step_end, tensor_inputs)
        return self._output(latents, output_type, return_dict)

    @torch.no_grad()
    def reconstruct(
        self,
        volumes: torch.Tensor,
        noise_step: int,
        class_labels: int | str | list[int] | list[str] | torch.Tensor,
        num_inference_steps: int = 100,
        guidance_scale: float = 1.0,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> MedVolumePipelineOutput | tuple:
        """Noised reconstructions: encode `volumes [B, C, D, H, W]` in [-1, 1], add noise up to `noise_step` of a grid of
        `num_inference_steps`, and denoise from there (arXiv 2603.06173, section 3.1).

        `noise_step` 0 is the plain reconstruction, 1 almost so; `num_inference_steps - 1` forgets nearly all.
        One class label per volume. The other arguments are those of a call.

        Raises:
            ValueError: `noise_step` outside 0 .. `num_inference_steps`, or labels or generators that don't fit.
            InputError: a scheduler that can't start from noised latents, or NIfTI output of several channels.
        """
        if not 0 <= noise_step <= num_inference_steps:
            raise ValueError(f"noise_step must lie in 0 .. {num_inference_steps}, got {noise_step}.")
        labels = self.prepare_class_labels(class_labels)
        if len(labels) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes need as many class labels, got {len(labels)}.")
        tensor_inputs = self._tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_inputs(len(labels), output_type, generator, tensor_inputs)
        device = self._execution_device
        timesteps = []
        if noise_step:
            timesteps = set_last_timesteps(self.scheduler, num_inference_steps, noise_step, device)
        latents = self.encode_volumes(volumes).to(self.unet.dtype)
        if noise_step:
            noise = randn_tensor(latents.shape, generator, device, latents.dtype)
            latents = self.scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents)))
            self._guidance_scale = guidance_scale
            latents = self._denoise(latents, timesteps, labels, eta, generator, callback_on_step_end, tensor_inputs)
        return self._output(latents, output_type, return_dict)

    @staticmethod
    def _tensor_inputs(callback: StepCallback | None, tensor_inputs: list[str] | tuple[str, ...]) -> list[str]:
        """What a callback gets: diffusers' own classes of callbacks say it themselves."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        return list(tensor_inputs)

    def _check_inputs(self, num_volumes: int, output_type: str, generator, tensor_inputs=()) -> None:
        if isinstance(generator, list) and len(generator) != num_volumes:
            raise ValueError(f"A list of generators needs one per volume ({num_volumes}), got {len(generator)}.")
        if output_type not in ("pt", "np", "nifti", "latent"):
            raise ValueError(f"output_type must be 'pt', 'np', 'nifti' or 'latent', got {output_type!r}.")
        channels = self.vqvae.config.out_channels
        if output_type == "nifti" and channels > 1:
            raise InputError(f"A NIfTI image has one channel, and these volumes {channels}: use output_type='np'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"Callbacks can get {self._callback_tensor_inputs}, not {unknown}.")

    def _denoise(self, latents, timesteps, labels, eta, generator, callback, tensor_inputs) -> torch.Tensor:
        step_kwargs = step_arguments(self.scheduler, eta=eta, generator=generator)
        self._num_timesteps, self._interrupt = len(timesteps), False
        for index, timestep in enumerate(self.progress_bar(timesteps)):
            output = self._predict(latents, timestep, labels)
            latents = self.scheduler.step(output, timestep, latents, **step_kwargs).prev_sample.to(latents.dtype)
            if callback is not None:
                tensors = {"latents": latents, "class_labels": labels}
                tensors |= callback(self, index, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
                latents, labels = tensors["latents"], tensors["class_labels"]
            if self.interrupt:
                break
        return latents

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The denoiser's output, guided if asked (arXiv 2207.12598, eq. 6)."""
        latents = self.scheduler.scale_model_input(latents, timestep)
        if not self.do_classifier_free_guidance:
            return self.unet(latents, timestep, labels).sample
        self.check_guidance()
        all_labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        conditional, unconditional = self.unet(torch.cat([latents] * 2), timestep, all_labels).sample.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool):
        volumes = latents if output_type == "latent" else self.decode_latents(latents)
        if output_type == "np":
            volumes = volumes.cpu().numpy()
        elif output_type == "nifti":
            volumes = [to_nifti(volume, self.spacing) for volume in volumes]
        self.maybe_free_model_hooks()
        return MedVolumePipelineOutput(volumes=volumes) if return_dict else (volumes,)
