"""PixArt-alpha and PixArt-Sigma (arXiv 2310.00426, 2403.04692): a transformer on T5 that predicts noise."""

from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline
from torch import Tensor

from models.condition import Condition
from models.errors import UserError
from models.teachers.pipeline import PipelineNetwork


class PixArt(PipelineNetwork):
    """Its second half of output channels, a variance, is not used."""

    length = 300
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}

    @classmethod
    def fitting(cls, config: Any, pipe: Any, channels: int) -> type[PipelineNetwork]:
        large, asks = config["sample_size"] == 128, config["use_additional_conditions"]
        if (large if asks is None else asks) and not (large and isinstance(pipe, PixArtAlphaPipeline)):
            raise UserError(
                f"teacher: transformer/config.json: use_additional_conditions {asks}, sample_size "
                f"{config['sample_size']}: the network asks for the picture's sizes, which {type(pipe).__name__} does "
                "not give it; PixArtAlphaPipeline does where sample_size is 128"
            )
        return cls

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.core.config.sample_size == 128:  # its embedding of sizes exists in checkpoints of 1024 pixels alone
            height, width = self.factor * x.shape[2], self.factor * x.shape[3]
            added["resolution"] = x.new_tensor([height, width]).expand(len(x), -1)
            added["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), -1)
        answer = self.core(
            x,
            encoder_hidden_states=self.text(cond).to(x.dtype),
            encoder_attention_mask=cond.text_mask,
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return answer[:, : x.shape[1]]

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        options = {"device": device, "max_sequence_length": length, "clean_caption": False}
        text, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        return Condition(text=text, text_mask=mask)
