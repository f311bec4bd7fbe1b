"""Unconditional DDPMs (arXiv 2006.11239) in pixels: a UNet2DModel that predicts noise. Its only class is "all"."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from models.condition import Condition
from models.errors import UserError
from models.teachers.class_pipeline import ClassNetwork


class DDPM(ClassNetwork):
    part: ClassVar[Literal["unet", "transformer"]] = "unet"

    def __init__(self, core: nn.Module):
        super().__init__(core)
        if self.core.config["num_class_embeds"] or self.core.config["class_embed_type"]:
            raise UserError("teacher: its U-Net takes classes, which DDPMPipeline does not give it")

    @staticmethod
    def count(config: Mapping[str, Any]) -> int:
        return 1

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.core(x, t, return_dict=False)[0][:, : x.shape[1]]

    @staticmethod
    def call(labels: list[int]) -> dict[str, Any]:
        return {"batch_size": len(labels)}
