"""The recipes of configs/ name blocks and layers that the published architectures have (on the meta device)."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from distill.settings import read_config
from distill.workshop.shapes import SD15_UNET, SDXL_UNET, sana_transformer
from models.teachers.edm_networks import DhariwalUNet, SongUNet
from models.teachers.embedded import PatchUNet
from models.teachers.flux import Flux
from models.teachers.sana import SanaNetwork
from models.teachers.sd3 import StableDiffusion3
from models.teachers.stable_diffusion import StableDiffusion, StableDiffusionXL
from tests.tiny import ROOT

RECIPES = sorted(
    path
    for family in ("cifar10", "imagenet64", "sd15", "sdxl", "sd35", "flux", "sana")
    for path in (ROOT / "configs" / family).glob("*.yaml")
    if path.stem != "vsd_3d"  # its discriminator is a setting, and its figures are none
)


@cache
def network(name: str) -> nn.Module:
    """The published network of a recipe, with its configuration's sizes and without memory."""
    with torch.device("meta"):
        match name:
            case "cifar10":  # edm-cifar10-32x32-cond-vp
                return PatchUNet(SongUNet(32, 3, 3, label_dim=10, augment_dim=9, channel_mult=[2, 2, 2]), 1, 10)
            case "imagenet64":  # edm-imagenet-64x64-cond-adm
                return PatchUNet(DhariwalUNet(64, 3, 3, label_dim=1000), 1, 1000)
            case "sd15":
                return StableDiffusion(UNet2DConditionModel(**SD15_UNET), 8)
            case "sdxl":
                return StableDiffusionXL(UNet2DConditionModel(**SDXL_UNET), 8)
            case "sd35":  # medium
                return StableDiffusion3(
                    SD3Transformer2DModel(
                        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
                        num_attention_heads=24, caption_projection_dim=1536, pooled_projection_dim=2048,
                        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
                    ), 8,
                )  # fmt: skip
            case "flux":
                return Flux(FluxTransformer2DModel(guidance_embeds=True), 8)
            case "sprint_600m":
                return SanaNetwork(sana_transformer(28, 36, 1152))
            case "sprint_1600m":
                return SanaNetwork(sana_transformer(20, 70, 2240))
            case _:
                raise ValueError(name)


PARAMETERS = {
    "cifar10": 56, "imagenet64": 296, "sd15": 860, "sdxl": 2567, "sd35": 2243, "flux": 11901,
    "sprint_600m": 592, "sprint_1600m": 1605,
}  # fmt: skip
"""Millions, of the published networks: what tells that these are their sizes."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_taps_and_targets_are_the_published_networks(path: Path):
    config = read_config(path)
    name = path.stem if path.parent.name == "sana" else path.parent.name
    found = network(name)
    count = sum(parameter.numel() for parameter in found.parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], rel=0.01)
    modules = dict(found.named_modules())
    method: Any = config.method
    heads = method.ladd if method.kind == "consistency" else method.gan
    assert heads.taps and not set(heads.taps) - modules.keys()
    order = [list(modules).index(tap) for tap in heads.taps]
    assert order == sorted(order)
    text = path.read_text()
    assert "not run here" in " ".join(text.replace("\n#", "").lower().split()) and "figure" in text
    if path.parent.name in ("cifar10", "imagenet64"):
        assert config.lora is None
    elif path.parent.name == "sana":
        assert "--lora" in text or path.stem == "sprint_600m"
    else:
        assert config.lora is not None and "--lora null" in text
        linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
        reached = {target: sum(key.endswith(f".{target}") for key in linear) for target in config.lora.targets}
        assert all(reached[target] >= 16 for target in ("to_q", "to_k", "to_v", "to_out.0"))
        joint = path.parent.name in ("sd35", "flux")
        assert all((reached[target] > 0) == joint for target in reached if "add" in target)
