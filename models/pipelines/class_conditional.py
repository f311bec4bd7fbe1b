"""Class-conditional generation in pixel space, in one step or by a teacher. Needs torch and diffusers, nothing else.

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
images = pipe([3, 7], seeds=[0, 1]).images
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.pil_utils import numpy_to_pil
from torch.nn import functional as F


class ClassConditionalPipeline(DiffusionPipeline):
    """A U-Net on patches, preconditioned as in EDM (Karras et al., arXiv 2206.00364, Table 1).

    patch: side of the squares that are folded into channels before the U-Net and unfolded behind it
    sigma_init: noise level of a student's input, ``x = sigma_init z``: one evaluation there gives the picture.
        None for a teacher, which takes Heun steps from sigma 80
    channels, size: shape of a picture, values in [-1, 1]
    student_of_class: with several students, the number of each class's own; 0 is ``unet``, the others are read from
        the folder's ``student_1``, ``student_2``, ... when they are first needed
    """

    def __init__(
        self,
        unet: ModelMixin,
        # The numbers come from model_index.json; diffusers passes on only those that have a default here.
        patch: int = 1,
        num_classes: int = 1,
        channels: int = 3,
        size: int = 32,
        sigma_data: float = 0.5,
        sigma_init: float | None = None,
        class_names: list[str] = [],  # noqa: B006 - diffusers reads the annotation; it is copied below
        student_of_class: list[int] | None = None,
    ):
        super().__init__()
        self.others: dict[int, tuple[ModelMixin, float]] = {}
        self.register_modules(unet=unet)
        self.register_to_config(
            patch=patch,
            num_classes=num_classes,
            channels=channels,
            size=size,
            sigma_data=sigma_data,
            sigma_init=sigma_init,
            class_names=list(class_names),
            student_of_class=student_of_class,
        )

    def student(self, number: int) -> tuple[ModelMixin, float]:
        """The network of one of several students and its ``sigma_init``."""
        if number == 0:
            return self.unet, self.config["sigma_init"]
        if number not in self.others:
            folder = Path(self.config["_name_or_path"]) / f"student_{number}"
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing: load this pipeline from a complete local copy of its folder")
            unet = type(self.unet).from_pretrained(folder / "unet", use_safetensors=True, torch_dtype=self.unet.dtype)
            self.others[number] = (unet.eval(), json.loads((folder / "model_index.json").read_text())["sigma_init"])
        unet, sigma = self.others[number]
        return unet.to(self.unet.device, self.unet.dtype), sigma

    def one_step(self, z: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Each picture by its class's student."""
        table = self.config["student_of_class"]
        if table is None:
            return self.denoise(self.config["sigma_init"] * z, self.config["sigma_init"], class_labels)
        if bool((class_labels < 0).any()):
            raise ValueError("several students need a class for every picture: none of them is unconditional")
        owner, x0 = torch.tensor(table, device=z.device)[class_labels], torch.empty_like(z)
        for number in owner.unique().tolist():
            rows = owner == number
            unet, sigma = self.student(number)
            x0[rows] = self.denoise(sigma * z[rows], sigma, class_labels[rows], unet)
        return x0

    def denoise(
        self, x: torch.Tensor, sigma: float, class_labels: torch.Tensor, unet: ModelMixin | None = None
    ) -> torch.Tensor:
        """x0 for ``x`` (B, C, H, W) at noise ``sigma``; label -1 is unconditional."""
        data, level = self.config["sigma_data"], x.new_full((len(x),), sigma)
        total = level.view(-1, 1, 1, 1) ** 2 + data**2
        labels = torch.where(class_labels < 0, self.config["num_classes"], class_labels)
        folded = F.pixel_unshuffle(x / total.sqrt(), self.config["patch"])
        out = (unet or self.unet)(folded, 250 * level.log(), class_labels=labels).sample
        out = F.pixel_shuffle(out, self.config["patch"])
        return data**2 / total * x + sigma * data / total.sqrt() * out

    def heun(self, z: torch.Tensor, class_labels: torch.Tensor, steps: int) -> torch.Tensor:
        """Heun's method from sigma 80 to 0 on Karras' grid (Algorithm 1 without churn)."""
        position = torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        sigmas = [*((low + position * (high - low)) ** 7).tolist(), 0.0]
        x = sigmas[0] * z.double()
        for now, later in pairwise(sigmas):
            slope = (x - self.denoise(x.to(z.dtype), now, class_labels)) / now
            ahead = x + (later - now) * slope
            if later > 0:
                slope = (slope + (ahead - self.denoise(ahead.to(z.dtype), later, class_labels)) / later) / 2
            x = x + (later - now) * slope
        return x.to(z.dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        seeds: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """One picture per label.

        seeds: one per picture, default 0, 1, 2, ...; picture i depends on its own seed alone
        latents: unit noise (B, C, H, W) to use instead
        num_inference_steps: a student takes 1; a teacher any number of Heun steps, default 18
        output_type: "pil", "np" (B, H, W, C) in [0, 1], or "pt" (B, C, H, W) in [-1, 1], not clamped
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        if bad := [label for label in labels if not -1 <= label < self.config["num_classes"]]:
            raise ValueError(f"class labels {bad} are not in -1 .. {self.config['num_classes'] - 1}")
        if latents is None:
            shape = (self.config["channels"], self.config["size"], self.config["size"])
            seeds = range(len(labels)) if seeds is None else seeds
            draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
            latents = torch.stack(draws)
        if len(latents) != len(labels):
            raise ValueError(f"{len(labels)} class labels but noise for {len(latents)} pictures")
        z = latents.to(self.unet.device, self.unet.dtype)
        classes, sigma = torch.tensor(labels, device=z.device), self.config["sigma_init"]
        if sigma is None:
            x0 = self.heun(z, classes, num_inference_steps or 18)
        elif num_inference_steps in (None, 1):
            x0 = self.one_step(z, classes)
        else:
            raise ValueError(f"this student takes one step, not num_inference_steps={num_inference_steps}")
        images: Any = x0
        if output_type != "pt":
            images = (x0.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
