"""Text-to-image teachers of published sizes with random weights, and tiny ones: for measuring time and memory.

Sizes are those of the published configurations; text encoders are tiny ones of the right width, since training asks
them once for each prompt.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.scene import captions
from models.teachers import miniature, sana

Shape = Literal["tiny_sd", "tiny_sana", "sd15", "sdxl", "sana_600m", "sana_1600m"]

SD_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY_UNET: dict[str, Any] = dict(
    sample_size=32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
)  # fmt: skip
SD15_UNET: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SDXL_UNET: dict[str, Any] = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD_VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
    up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=512,
)  # fmt: skip
TINY_VAE = SD_VAE | dict(
    block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
    up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=64,
)  # fmt: skip
SANA_VAE: dict[str, Any] = dict(  # dc-ae-f32c32
    latent_channels=32, scaling_factor=0.41407, upsample_block_type="interpolate",
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
)  # fmt: skip


def sana_transformer(depth: int, heads: int, width: int) -> SanaTransformer2DModel:
    """Sana 0.6B is (28, 36, 1152), 1.6B (20, 70, 2240), with SANA-Sprint's QK norm and time embedding."""
    return SanaTransformer2DModel(
        num_layers=depth, num_attention_heads=heads, num_cross_attention_heads=width // 112,
        cross_attention_head_dim=112, cross_attention_dim=width, qk_norm="rms_norm_across_heads", timestep_scale=0.001,
    )  # fmt: skip


def clip_tokenizer() -> Any:
    """CLIP's own class, of single letters."""
    letters = [chr(code) for code in range(97, 123)]
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token="<|endoftext|>")


def clip(width: int = 32, projection: bool = False) -> Any:
    """A tiny text encoder of ``width`` for :func:`clip_tokenizer`; with a projection of that width."""
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _scheduler() -> Any:
    return DDIMScheduler(**SD_NOISE)


def _stable_diffusion(unet: dict[str, Any], vae: dict[str, Any]) -> Any:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**vae, scaling_factor=0.18215), text_encoder=clip(unet["cross_attention_dim"]),
        tokenizer=clip_tokenizer(), unet=UNet2DConditionModel(**unet), scheduler=_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip


def _sdxl() -> Any:
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SD_VAE, scaling_factor=0.13025), text_encoder=clip(768), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(1280, True), tokenizer_2=clip_tokenizer(), unet=UNet2DConditionModel(**SDXL_UNET),
        scheduler=_scheduler(), add_watermarker=False,
    )  # fmt: skip


def _write_sana(folder: Path, transformer: SanaTransformer2DModel, vae: AutoencoderDC) -> None:
    tokenizer = miniature.new_tokenizer(captions.VOCABULARY, 300)
    text_encoder = miniature.new_text_encoder(len(tokenizer), transformer.config["caption_channels"], 1, 300)
    side = transformer.config["sample_size"]
    shape = (transformer.config["in_channels"], side, side)
    sana.SanaSpec(tokenizer, text_encoder, vae, shape).save(folder, sana.SanaNetwork(transformer), "")


def write(folder: Path, shape: Shape) -> Path:
    """The pipeline folder of ``shape``, with random weights from seed 0."""
    torch.manual_seed(0)
    match shape:
        case "tiny_sd":
            _stable_diffusion(TINY_UNET, TINY_VAE).save_pretrained(folder)
        case "sd15":
            _stable_diffusion(SD15_UNET, SD_VAE).save_pretrained(folder)
        case "sdxl":
            _sdxl().save_pretrained(folder)
        case "tiny_sana":
            _write_sana(folder, miniature.new_transformer(8, 16, 64, 4, 64), miniature.new_autoencoder([16, 32], 8, 1))
        case "sana_600m":
            _write_sana(folder, sana_transformer(28, 36, 1152), AutoencoderDC(**SANA_VAE))
        case "sana_1600m":
            _write_sana(folder, sana_transformer(20, 70, 2240), AutoencoderDC(**SANA_VAE))
    return folder
