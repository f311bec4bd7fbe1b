"""DiT (arXiv 2212.09748): a transformer on classes that predicts noise in latents."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from models.condition import Condition
from models.teachers.class_pipeline import ClassNetwork


class DiT(ClassNetwork):
    """Its second half of output channels, a variance, is not used; neither is its own dropout of classes."""

    part: ClassVar[Literal["unet", "transformer"]] = "transformer"

    def __init__(self, core: nn.Module):
        super().__init__(core)
        for module in core.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # a student or critic must be answered for the class it was asked for

    @staticmethod
    def count(config: Mapping[str, Any]) -> int:
        return config["num_embeds_ada_norm"]

    def apart(self) -> list[nn.Module]:
        """The embedding of time and class in its first block, which its last layer asks again."""
        return [self.core.transformer_blocks[0].norm1.emb]

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.class_ids is None:
            raise ValueError("this network is conditional on classes: the condition has no class_ids")
        labels = torch.where(cond.class_ids < 0, self.num_classes, cond.class_ids)
        return self.core(x, timestep=t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]

    @staticmethod
    def call(labels: list[int]) -> dict[str, Any]:
        return {"class_labels": labels, "guidance_scale": 1.0}
