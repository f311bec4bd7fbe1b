"""FLUX.1: a flow transformer on packed latents, guidance-distilled (dev) or distilled in steps (schnell)."""

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.teachers.pipeline import PipelineNetwork


class Flux(PipelineNetwork):
    """It is told a guidance scale (dev) and knows no unconditional answer."""

    length = 512
    null_prompt = None
    packed: ClassVar[int] = 4
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor")
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 3.5}

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("this network is conditional on a pooled text embedding: the condition has none")
        text, (height, width) = self.text(cond).to(x.dtype), x.shape[2:]
        places = FluxPipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype)
        answer = self.core(
            F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            pooled_projections=cond.pooled.to(x.dtype),
            timestep=t,
            img_ids=places,
            txt_ids=text.new_zeros(text.shape[1], 3),
            guidance=self.embedded(x, cond),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(answer.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        text, pooled, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=length)
        return Condition(text=text, pooled=pooled)
