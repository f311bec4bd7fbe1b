"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a joint transformer on three text encoders, a flow."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from models.condition import Condition
from models.teachers.pipeline import PipelineNetwork


class StableDiffusion3(PipelineNetwork):
    """``length`` is T5's share of the tokens; CLIP's 77 come before them."""

    length = 256
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor")
    given: ClassVar[bool] = False

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("this network is conditional on a pooled text embedding: the condition has none")
        text, pooled = self.text(cond).to(x.dtype), cond.pooled.to(x.dtype)
        return self.core(
            x, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t, return_dict=False
        )[0]

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        options = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": length}
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, **options)
        return Condition(text=text, pooled=pooled)
