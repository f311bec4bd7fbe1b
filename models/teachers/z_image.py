"""Z-Image (arXiv 2511.22699): a single-stream flow transformer whose time and velocity run the other way."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from models.condition import Condition
from models.teachers.pipeline import PipelineNetwork, padded


class ZImage(PipelineNetwork):
    """Tap blocks of ``transformer.noise_refiner``, which see the picture alone; the layers see it with the text."""

    length = 512
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor")
    absent: ClassVar[tuple[str, ...]] = ("siglip_feat_dim",)
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 0.0}  # the pipeline counts from 0

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.text_mask is None:
            raise ValueError("this network takes texts of their own lengths: the condition has no text_mask")
        rows = zip(self.text(cond).to(x.dtype), cond.text_mask.bool(), strict=True)
        texts = [row[mask] for row, mask in rows]
        answer = self.core(list(x.unsqueeze(2)), 1 - t, texts, return_dict=False)[0]
        return -torch.stack(list(answer)).squeeze(2)

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        text, _ = pipe.encode_prompt(prompts, device, False, max_sequence_length=length)
        return padded(text, length)
