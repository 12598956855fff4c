"""MedVolumePipeline: class-conditional latent diffusion of medical volumes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..data.processor import to_nifti
from ..models.autoencoder_vq_3d import VQModel3D
from ..models.unet_3d import UNet3DModel


@dataclass
class MedVolumePipelineOutput(BaseOutput):
    """`volumes`: `Tensor` or `ndarray [B, C, D, H, W]` in [-1, 1], a list of `nibabel.Nifti1Image`, or latents."""

    volumes: torch.Tensor | np.ndarray | list[nib.Nifti1Image]


class MedVolumePipeline(DiffusionPipeline):
    r"""Generates volumes of given classes, and noised reconstructions of given volumes (arXiv 2603.06173).

    Args:
        vqvae (`VQModel3D`): autoencoder whose latents are denoised.
        unet (`UNet3DModel`): class-conditional denoiser.
        scheduler (`DDIMScheduler`): any diffusers scheduler; stochastic sampling (`eta`) needs DDIM.
        spacing (`tuple[float]`, *optional*): edge lengths of a voxel in millimetres, for the affine of NIfTI output.
        id2label (`dict`, *optional*): names of the classes; JSON's string keys are accepted.

    Example:
        >>> import msrl_diffusers
        >>> pipe = msrl_diffusers.MedVolumePipeline.from_pretrained("model_cards/phantoms-32")
        >>> image = pipe("HGG", num_inference_steps=25, output_type="nifti").volumes[0]
        >>> image.to_filename("brain.nii.gz")
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vqvae: VQModel3D,
        unet: UNet3DModel,
        scheduler: DDIMScheduler,
        spacing: list[float] | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)
        self.register_to_config(spacing=spacing and list(spacing), id2label=id2label)

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

    def encode_volumes(self, volumes: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, d, h, w]` of about unit variance, of `volumes [B, C, D, H, W]` in [-1, 1]."""
        config = self.vqvae.config
        return (self.vqvae.encode(volumes).latents - config.shift_factor) * config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Volumes `[B, C, D, H, W]`, clipped to [-1, 1], of latents (quantized on the way)."""
        config = self.vqvae.config
        latents = latents.to(self.vqvae.dtype) / config.scaling_factor + config.shift_factor
        return self.vqvae.decode(latents).sample.float().clamp(-1, 1)

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
        callback_on_step_end: Callable[["MedVolumePipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> MedVolumePipelineOutput | tuple:
        """Generate one volume per class label.

        Args:
            class_labels: labels or names, one per volume.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 switches it off (and halves the cost).
            eta: 0 is deterministic, 1 is as stochastic as DDPM (arXiv 2010.02502, eq. 16); ignored by schedulers
                that have no such setting.
            generator: one generator, or one per volume.
            latents: starting noise `[B, C, d, h, w]`; drawn with `generator` by default.
            output_type: `"pt"`, `"np"`, `"nifti"` or `"latent"`.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})`; may return new latents.

        Raises:
            ValueError: unknown class or `output_type`, or latents or generators that don't fit.
        """
        labels = self.prepare_class_labels(class_labels)
        self._check_inputs(len(labels), output_type, generator, callback_on_step_end_tensor_inputs)
        shape = (len(labels), *self.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"latents of shape {shape} are needed for these class_labels, got {tuple(latents.shape)}."
            )
        latents = latents.to(self._execution_device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self._denoise(
            latents * self.scheduler.init_noise_sigma, self.scheduler.timesteps, labels, guidance_scale, eta, generator,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
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
    ) -> MedVolumePipelineOutput | tuple:
        """Noised reconstructions: encode `volumes [B, C, D, H, W]` in [-1, 1], add noise up to `noise_step` of a grid of
        `num_inference_steps`, and denoise from there (arXiv 2603.06173, section 3.1).

        `noise_step` 0 is the plain reconstruction, 1 almost so; `num_inference_steps - 1` forgets nearly all.
        One class label per volume.

        Raises:
            ValueError: `noise_step` outside 0 .. `num_inference_steps`, or labels or generators that don't fit.
        """
        if not 0 <= noise_step <= num_inference_steps:
            raise ValueError(f"noise_step must lie in 0 .. {num_inference_steps}, got {noise_step}.")
        labels = self.prepare_class_labels(class_labels)
        if len(labels) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes need as many class labels, got {len(labels)}.")
        self._check_inputs(len(labels), output_type, generator)
        latents = self.encode_volumes(volumes.to(self._execution_device, self.vqvae.dtype)).to(self.unet.dtype)
        if noise_step:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            timesteps = self.scheduler.timesteps[-noise_step:]
            noise = randn_tensor(latents.shape, generator, self._execution_device, latents.dtype)
            latents = self.scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents)))
            latents = self._denoise(latents, timesteps, labels, guidance_scale, eta, generator)
        return self._output(latents, output_type, return_dict)

    def _check_inputs(self, num_volumes: int, output_type: str, generator, tensor_inputs=()) -> None:
        if isinstance(generator, list) and len(generator) != num_volumes:
            raise ValueError(f"A list of generators needs one per volume ({num_volumes}), got {len(generator)}.")
        if output_type not in ("pt", "np", "nifti", "latent"):
            raise ValueError(f"output_type must be 'pt', 'np', 'nifti' or 'latent', got {output_type!r}.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"Callbacks can get {self._callback_tensor_inputs}, not {unknown}.")

    def _denoise(
        self, latents, timesteps, labels, guidance_scale, eta, generator, callback=None, tensor_inputs=("latents",)
    ) -> torch.Tensor:
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        guided = guidance_scale != 1.0
        all_labels = torch.cat([labels, torch.full_like(labels, self.null_class)]) if guided else labels
        for index, timestep in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            output = self.unet(model_input, timestep, all_labels).sample
            if guided:
                conditional, unconditional = output.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(output, timestep, latents, **step_kwargs).prev_sample
            if callback is not None:
                changed = callback(self, index, timestep, dict.fromkeys(tensor_inputs, latents))
                latents = (changed or {}).get("latents", latents)
        return latents

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool):
        volumes = latents if output_type == "latent" else self.decode_latents(latents)
        if output_type == "np":
            volumes = volumes.cpu().numpy()
        elif output_type == "nifti":
            volumes = [to_nifti(volume, self.spacing) for volume in volumes]
        self.maybe_free_model_hooks()
        return MedVolumePipelineOutput(volumes=volumes) if return_dict else (volumes,)
