"""Tiny random checkpoints of every family, written by the stock pipelines themselves, without a download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distill.workshop.shapes import SD_NOISE, TINY_VAE, clip, clip_tokenizer

FLOW: dict[str, Any] = {"shift": 3.0}


def letters_tokenizer(special: dict[str, str], template: str | None = None) -> Any:
    """A fast tokenizer of single letters for T5 and Qwen pipelines."""
    names = ["<pad>", "</s>", "<unk>", *sorted(set(special.values()) - {"<pad>", "</s>", "<unk>"})]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate([*names, *map(chr, range(32, 127))])}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    if template:
        made.chat_template = template
    return made


def t5(width: int = 32) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=128, d_model=width, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    tokenizer = letters_tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    return transformers.T5EncoderModel(config), tokenizer


def autoencoder(channels: int, **more: Any) -> Any:
    return diffusers.AutoencoderKL(**TINY_VAE | {"latent_channels": channels} | more)


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )  # fmt: skip


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(4, scaling_factor=0.18215), text_encoder=clip(), tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=32), scheduler=diffusers.PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_2() -> Any:
    pipe = stable_diffusion()
    pipe.register_modules(scheduler=diffusers.DDIMScheduler(**SD_NOISE, prediction_type="v_prediction"))
    return pipe


def stable_diffusion_xl() -> Any:
    tokenizer = clip_tokenizer()
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13025, force_upcast=True), text_encoder=clip(), tokenizer=tokenizer,
        text_encoder_2=clip(projection=True), tokenizer_2=tokenizer, unet=unet(cross_attention_dim=64, **added),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"), add_watermarker=False,
    )  # fmt: skip


def pixart_sigma() -> Any:
    encoder, tokenizer = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        out_channels=8, cross_attention_dim=24, caption_channels=32, norm_type="ada_norm_single",
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        vae=autoencoder(4, scaling_factor=0.13025), text_encoder=encoder, tokenizer=tokenizer, transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    encoder, t5_tokenizer = t5(64)
    tokenizer = clip_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    vae = autoencoder(4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae, text_encoder=clip(projection=True), tokenizer=tokenizer,
        text_encoder_2=clip(projection=True), tokenizer_2=tokenizer,
        text_encoder_3=encoder, tokenizer_3=t5_tokenizer, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def flux() -> Any:
    encoder, t5_tokenizer = t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.FluxPipeline(
        vae=vae, text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=encoder,
        tokenizer_2=t5_tokenizer, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def qwen_image() -> Any:
    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Qwen2_5_VLConfig(
        text_config=sizes | dict(num_key_value_heads=2, vocab_size=256, max_position_embeddings=1024,
                                 rope_scaling={"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default"}),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.5, 2.0],
    )  # fmt: skip
    tokenizer = letters_tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    return diffusers.QwenImagePipeline(
        vae=vae, text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def z_image() -> Any:
    config = transformers.Qwen3Config(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = letters_tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, template)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32], rope_theta=256.0,
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159), text_encoder=transformers.Qwen3Model(config),
        tokenizer=tokenizer, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=3, norm_type="ada_norm_zero",
    )  # fmt: skip
    labels = {0: "cube, die", 1: "sphere", 2: "cone"}
    pipe = diffusers.DiTPipeline(transformer, autoencoder(4, scaling_factor=0.18215), diffusers.DDIMScheduler(), labels)
    pipe.register_to_config(id2label=labels)
    return pipe


def ddpm() -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


FAMILIES: dict[str, Callable[[], Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_2": stable_diffusion_2,
    "stable_diffusion_xl": stable_diffusion_xl,
    "pixart_sigma": pixart_sigma,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
CLASSES: dict[str, Callable[[], Any]] = {"dit": dit, "ddpm": ddpm}
"""Those without text."""
FLOWS = ("stable_diffusion_3", "flux", "qwen_image", "z_image")


def save(folder: Path, family: str) -> Path:
    """The pipeline folder, written by stock diffusers; every weight is random and no answer is zero."""
    torch.manual_seed(0)
    pipe = (FAMILIES | CLASSES)[family]()
    core = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad():
        for parameter in core.parameters():  # some outputs start at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
