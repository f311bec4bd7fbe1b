"""Stable Diffusion 1.x and 2.x, and SDXL: a U-Net that predicts noise or v in a discrete process."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.errors import UserError
from models.teachers.pipeline import PipelineNetwork

ASKING = ("class_embed_type", "num_class_embeds")


def scale_embedding(scale: Tensor, width: int) -> Tensor:
    """Guidance scales (B,) as LCM embeds them (B, width): sines and cosines of 1000 (scale - 1)."""
    half = width // 2
    steps = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * (scale.float() - 1)[:, None] * steps
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2)).to(scale.dtype)


class StableDiffusion(PipelineNetwork):
    """arXiv 2112.10752."""

    part: ClassVar[Literal["unet", "transformer"]] = "unet"
    absent: ClassVar[tuple[str, ...]] = (*ASKING, "addition_embed_type")

    @classmethod
    def fitting(cls, config: Any, pipe: Any, channels: int) -> type[PipelineNetwork]:
        _check_unet(config, channels, [pipe.text_encoder])
        return ToldStableDiffusion if config["time_cond_proj_dim"] else cls

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        text = self.text(cond).to(x.dtype)
        return self.core(
            x, t, encoder_hidden_states=text, timestep_cond=self.timestep_cond(x, cond), return_dict=False
        )[0]

    def timestep_cond(self, x: Tensor, cond: Condition) -> Tensor | None:
        """What a U-Net that is told the guidance scale sees beside the time."""
        width = self.core.config["time_cond_proj_dim"]
        return scale_embedding(self.scale(x, cond), width) if width else None

    @staticmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        """CLIP has a length of its own."""
        return Condition(text=pipe.encode_prompt(prompts, device, 1, False)[0])


def _check_unet(config: Any, channels: int, encoders: list[Any]) -> None:
    """UserError if a U-Net is not one that text of these ``encoders`` makes into noise or v of such latents."""
    if config["out_channels"] != channels:
        raise UserError(
            f"teacher: unet/config.json: out_channels {config['out_channels']}, but latents have {channels}"
        )
    if config["encoder_hid_dim_type"] not in (None, "text_proj") or config["attention_type"] != "default":
        raise UserError(
            f"teacher: unet/config.json: encoder_hid_dim_type {config['encoder_hid_dim_type']}, attention_type "
            f"{config['attention_type']}: the network asks for more than prompts, which its pipeline does not give it"
        )
    given = sum(encoder.config.hidden_size for encoder in encoders)
    wanted = config["encoder_hid_dim"] if config["encoder_hid_dim_type"] else config["cross_attention_dim"]
    if isinstance(wanted, int) and wanted != given:
        raise UserError(
            f"teacher: unet/config.json: its text is {wanted} wide, that of the folder's text encoders {given}: they "
            "are of other checkpoints"
        )


class StableDiffusionXL(StableDiffusion):
    """arXiv 2307.01952; the picture's size is its size condition, uncropped."""

    absent: ClassVar[tuple[str, ...]] = ASKING
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor", "latents_mean", "latents_std")

    @classmethod
    def fitting(cls, config: Any, pipe: Any, channels: int) -> type[PipelineNetwork]:
        _check_unet(config, channels, [pipe.text_encoder, pipe.text_encoder_2])
        pooled = pipe.text_encoder_2.config.projection_dim
        sizes = (config["projection_class_embeddings_input_dim"] or 0) - pooled
        if config["addition_embed_type"] != "text_time" or sizes != 6 * (config["addition_time_embed_dim"] or 0):
            raise UserError(
                f"teacher: unet/config.json: addition_embed_type {config['addition_embed_type']} of "
                f"{config['projection_class_embeddings_input_dim']} numbers is not SDXL's pooled text and six sizes (a "
                "refiner?): choose a base checkpoint"
            )
        return ToldStableDiffusionXL if config["time_cond_proj_dim"] else cls

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("this network is conditional on a pooled text embedding: the condition has none")
        height, width = self.factor * x.shape[2], self.factor * x.shape[3]
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
        added = {"text_embeds": cond.pooled.to(x.dtype), "time_ids": sizes}
        text = self.text(cond).to(x.dtype)
        told = self.timestep_cond(x, cond)
        return self.core(
            x, t, encoder_hidden_states=text, timestep_cond=told, added_cond_kwargs=added, return_dict=False
        )[0]

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


class ToldStableDiffusion(StableDiffusion):
    """Distilled by LCM (arXiv 2310.04378): told the guidance scale, it knows no unconditional answer."""

    null_prompt = None
    told: ClassVar[float] = 7.5
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 7.5}


class ToldStableDiffusionXL(StableDiffusionXL):
    """As :class:`ToldStableDiffusion`."""

    null_prompt = None
    told: ClassVar[float] = 7.5
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 7.5}
