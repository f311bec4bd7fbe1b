"""Qwen-Image (arXiv 2508.02324): a flow transformer on packed latents of a video autoencoder."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.teachers.pipeline import PipelineNetwork, padded


class QwenImage(PipelineNetwork):
    length = 512
    null_prompt = " "
    packed: ClassVar[int] = 4
    scaling: ClassVar[tuple[str, ...]] = ("latents_mean", "latents_std")
    absent: ClassVar[tuple[str, ...]] = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    call: ClassVar[dict[str, Any]] = {"true_cfg_scale": 1.0}

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        answer = self.core(
            F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=self.text(cond).to(x.dtype),
            encoder_hidden_states_mask=cond.text_mask,
            timestep=t,
            img_shapes=[[(1, height, width)]] * len(x),
            guidance=self.embedded(x, cond),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(answer.transpose(1, 2).unflatten(2, (height, width)), 2)

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        text, mask = pipe.encode_prompt(prompts, device)
        counts = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
        return padded([row[:count] for row, count in zip(text, counts, strict=True)], length)
