"""Stable Diffusion 1.x and 2.x, and SDXL: a U-Net that predicts noise or v in a discrete process."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.condition import Condition
from models.teachers.pipeline import PipelineNetwork


class StableDiffusion(PipelineNetwork):
    """arXiv 2112.10752."""

    part: ClassVar[Literal["unet", "transformer"]] = "unet"

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.core(x, t, encoder_hidden_states=self.text(cond).to(x.dtype), return_dict=False)[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        """CLIP has a length of its own."""
        return Condition(text=pipe.encode_prompt(prompts, device, 1, False)[0])


class StableDiffusionXL(PipelineNetwork):
    """arXiv 2307.01952; the picture's size is its size condition, uncropped."""

    part: ClassVar[Literal["unet", "transformer"]] = "unet"

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("this network is conditional on a pooled text embedding: the condition has none")
        height, width = self.factor * x.shape[2], self.factor * x.shape[3]
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
        added = {"text_embeds": cond.pooled.to(x.dtype), "time_ids": sizes}
        text = self.text(cond).to(x.dtype)
        return self.core(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, device, 1, False)
        return Condition(text=text, pooled=pooled)

    @classmethod
    def null(cls, pipe: Any, length: int, device: torch.device) -> Condition:
        cond = cls.embed(pipe, [""], length, device)
        if not pipe.config.get("force_zeros_for_empty_prompt"):
            return cond
        assert cond.text is not None and cond.pooled is not None
        return Condition(text=torch.zeros_like(cond.text), pooled=torch.zeros_like(cond.pooled))
