"""What a checkpoint says is used, or known to be harmless, or named in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import UserError
from models.seeds import Draws
from models.teachers import keys, load
from models.teachers.base import TextSpec
from models.teachers.pipeline import PipelineSpec
from models.teachers.schedule import process_of
from models.teachers.single_file import unscaled
from tests import families
from tests.test_sources import original_keys

PROMPTS = ["a red cube", "a sphere"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def every_note() -> None:
    keys.note.cache_clear()


def saved(folder: Path, pipe: Any) -> Path:
    """With weights that are far from zero everywhere."""
    torch.manual_seed(1)
    core = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def asked(path: Path, config: Path | None = None, t: float = 999.0) -> tuple[Tensor, Tensor, PipelineSpec]:
    """Noise, x0 at ``t``, and the spec."""
    denoiser, spec = load(path, 16, 32, config)
    assert isinstance(spec, PipelineSpec)
    z = Draws([0, 1]).normal(*spec.shape)
    with torch.no_grad():
        return z, denoiser.denoise(z, torch.full((2,), t), spec.text(PROMPTS)), spec


def changed(folder: Path, file: str, **values: Any) -> None:
    """Keys of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("keys") / "base", "stable_diffusion")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------- autoencoders


MEAN_STD = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion"])
def test_latents_are_scaled_as_the_stock_pipeline_scales_them(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SDXL's reads the VAE's mean and deviation, Stable Diffusion's does not: that is said."""
    pipe = families.FAMILIES[family]()
    pipe.vae.register_to_config(scaling_factor=0.5, **MEAN_STD)
    _, _, spec = asked(saved(tmp_path / "teacher", pipe))
    latents = Draws([3]).normal(*spec.shape)
    pipe.set_progress_bar_config(disable=True)
    scaled = latents / 0.5
    if family == "stable_diffusion_xl":
        mean, std = (torch.tensor(MEAN_STD[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        scaled = latents * std / 0.5 + mean
    with torch.no_grad():
        torch.testing.assert_close(spec.decode(latents), pipe.vae.decode(scaled).sample)
        pictures = Draws([4]).normal(3, 16, 16).clamp(-1, 1)
        mode = pipe.vae.encode(pictures).latent_dist.mode()
        expected = (mode - mean) * 0.5 / std if family == "stable_diffusion_xl" else 0.5 * mode
        torch.testing.assert_close(spec.encode(pictures), expected)
    assert ("latents_mean is not read" in capsys.readouterr().err) == (family == "stable_diffusion")


def test_a_shift_that_stock_does_not_read_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = asked(copy)[2]
    changed(copy, "vae/config.json", shift_factor=0.3)
    after, z = asked(copy)[2], torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(before.decode(z), after.decode(z))
    assert "shift_factor is not read" in capsys.readouterr().err
    changed(copy, "vae/config.json", latents_mean=[0.0, 0.0, 0.0, 1.0])
    with pytest.raises(UserError, match="go together"):
        load(copy)


def test_tiny_autoencoders_encode_and_decode_and_others_are_refused(tmp_path: Path) -> None:
    pipe = families.stable_diffusion()
    tiny: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae: Any = diffusers.AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    pipe.register_modules(vae=vae)
    _, _, spec = asked(saved(tmp_path / "tiny", pipe))
    pictures = Draws([0]).normal(3, 16, 16)
    with torch.no_grad():
        z = spec.encode(pictures)
        torch.testing.assert_close(z, vae.encode(pictures).latents)
        torch.testing.assert_close(spec.decode(z), vae.decode(z).sample)
    pipe.register_modules(vae=diffusers.VQModel(latent_channels=4, norm_num_groups=4, block_out_channels=(8,)))
    with pytest.raises(UserError, match=r"VQModel; .* are read"):
        load(saved(tmp_path / "vq", pipe))


# ---------------------------------------------------------------------------------------------------- what is asked of


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_unet_that_is_told_the_scale_is_told_it(family: str, tmp_path: Path) -> None:
    """As stock tells it at the scale of its call; it is distilled, whatever its folder is called."""
    pipe = families.FAMILIES[family]()
    more = {"cross_attention_dim": 32 if family == "stable_diffusion" else 64, "time_cond_proj_dim": 33}
    if family == "stable_diffusion_xl":
        more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        more |= {"projection_class_embeddings_input_dim": 80}
    scheduler = diffusers.LCMScheduler(**families.SD_NOISE)
    pipe.register_modules(unet=families.unet(**more), scheduler=scheduler)
    folder = saved(tmp_path / "teacher", pipe)
    z, x0, spec = asked(folder)
    assert not spec.guidable and spec.family.call == {"guidance_scale": 7.5}
    stock = type(pipe).from_pretrained(folder, **({"safety_checker": None} if family == "stable_diffusion" else {}))
    stock.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 1}
    want = stock(prompt=PROMPTS, latents=z, **size, **spec.family.call).images
    torch.testing.assert_close(x0, want, rtol=1e-4, atol=1e-4)
    denoiser, _ = load(folder, 16)
    other = spec.text(PROMPTS, 3.0)
    with torch.no_grad():
        assert float((denoiser.denoise(z, torch.full((2,), 999.0), other) - x0).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "in_channels 9, but latents have 4"),
        ({"out_channels": 8}, "out_channels 8"),
        ({"num_class_embeds": 5}, "num_class_embeds 5"),
        ({"cross_attention_dim": 64}, "text is 64 wide, that of the folder's text encoders 32"),
    ],
)
def test_networks_that_ask_for_more_than_prompts_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pipe = families.stable_diffusion()
    pipe.register_modules(unet=families.unet(**{"cross_attention_dim": 32} | change))
    pipe.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(tmp_path / "teacher")
    assert "\n" not in str(caught.value)


def test_a_refiner_is_no_base(tmp_path: Path) -> None:
    pipe = families.stable_diffusion_xl()
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipe.register_modules(unet=families.unet(cross_attention_dim=64, projection_class_embeddings_input_dim=72, **sizes))
    pipe.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="a refiner"):
        load(tmp_path / "teacher")


# -------------------------------------------------------------------------------------------------------- noise process


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": 2.0}
TABLE = {"_class_name": "DDIMScheduler", **families.SD_NOISE, "num_train_timesteps": 1000}


def test_every_word_of_a_scheduler_is_heeded(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bent = [process_of(FLOW | {"max_shift": 2.0, "time_shift_type": kind}, 9)[0] for kind in ("linear", "exponential")]
    assert [process.shift for process in bent] == pytest.approx([2.0, 7.38905609893065])  # type: ignore[attr-defined]
    for config, message in (
        (FLOW | {"num_train_timesteps": 500}, "num_train_timesteps 500"),
        (TABLE | {"beta_schedule": "quadratic"}, "beta_schedule quadratic"),
        (TABLE | {"rescale_betas_zero_snr": True}, "predicts noise"),
        (TABLE | {"prediction_type": "score"}, "prediction_type score"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            process_of(config, 9)
        assert "\n" not in str(caught.value)
    changed(copy, "scheduler/scheduler_config.json", set_alpha_to_zero="often", timestep_spacing="leading")
    load(copy)
    assert capsys.readouterr().err.count("set_alpha_to_zero often is not read") == 1
    changed(copy, "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    changed(copy, "scheduler/scheduler_config.json", timestep_type="continuous", _class_name="EulerDiscreteScheduler")
    with pytest.raises(UserError, match="timestep_type continuous"):
        load(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_schedule": "custom"}, "custom is not"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas, but num_train_timesteps 1000"),
    ],
)
def test_tables_that_nobody_knows_are_one_line(values: dict[str, Any], message: str, copy: Path) -> None:
    changed(copy, "scheduler/scheduler_config.json", **values)
    with pytest.raises(UserError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model_index.json", "vae"),
        ("unet/config.json", "sample_size"),
        ("vae/config.json", "scaling_factor"),
        ("scheduler/scheduler_config.json", "prediction_type"),
        ("text_encoder/config.json", "hidden_act"),
    ],
)
def test_a_key_is_given_once(file: str, key: str, copy: Path) -> None:
    """JSON's readers keep the last one without a word."""
    text = (copy / file).read_text().rstrip().removesuffix("}").rstrip()
    (copy / file).write_text(text + f', "{key}": null, "{key}": null}}')
    with pytest.raises(UserError, match=f"{file} cannot be read: the key '{key}' is given twice"):
        load(copy)


# -------------------------------------------------------------------------------------------------------------- weights


def test_weights_and_keys_without_a_place_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(copy / UNET)
    save_file(state | {"conv_in.extra": torch.zeros(2)}, copy / UNET, {"format": "pt"})
    changed(copy, "unet/config.json", use_new_trick=True, use_old_trick=False)
    changed(copy, "model_index.json", is_special=True)
    load(copy)
    said = capsys.readouterr().err
    for word in ("conv_in.extra", "use_new_trick True", "is_special True"):
        assert word in said
    assert "use_old_trick" not in said
    save_file({k: v for k, v in state.items() if k != "conv_in.bias"}, copy / UNET, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its own config, as conv_in\.bias"):
        load(copy)
    save_file(state | {"conv_in.weight_scale": torch.ones(1)}, copy / UNET, {"format": "pt"})
    with pytest.raises(UserError, match="scales of quantized weights"):
        load(copy)
    changed(copy, "text_encoder/config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="quantization_config"):
        load(copy)


def test_parts_and_sides_that_are_missing_are_told_with_what_to_do(tmp_path: Path) -> None:
    pipe = families.stable_diffusion_3()
    pipe.transformer.register_to_config(sample_size=[8, 12])
    pipe.save_pretrained(tmp_path / "sides")
    with pytest.raises(UserError, match=r"sample_size \[8, 12\].*write 12 there, and give teacher.size"):
        load(tmp_path / "sides", 16)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "no_t5")
    with pytest.raises(UserError, match=r"has no text_encoder_3, .*copy text_encoder_3 and tokenizer_3 from"):
        load(tmp_path / "no_t5")
    wide = families.stable_diffusion()
    wide.unet.register_to_config(sample_size=[8, 12])
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"teacher.size: missing; sample_size \[8, 12\].*as 16"):
        load(tmp_path / "wide")
    assert load(tmp_path / "wide", 16)[1].shape == (4, 8, 8)


# --------------------------------------------------------------------------------------------------------- single files


def single(base: Path) -> dict[str, Tensor]:
    return original_keys(load_file(base / UNET))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "conv_in.weight is (8, 9, 3, 3), not (8, 4, 3, 3)"),
        ({"cross_attention_dim": 64}, "name in teacher.config a folder of the same architecture"),
        ({"time_cond_proj_dim": 16}, "time_embedding.cond_proj.weight"),
    ],
)
@pytest.mark.parametrize("original", [False, True])
def test_files_of_other_networks_are_one_line(
    change: dict[str, Any], message: str, original: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {k: v.contiguous() for k, v in families.unet(**{"cross_attention_dim": 32} | change).state_dict().items()}
    told = "time_cond_proj_dim" in change
    state = original_keys(state) if original and not told else state
    save_file(state, tmp_path / "f.safetensors")
    if told:  # a weight more than the folder's network has
        with pytest.raises(UserError, match=f"{re.escape(message)} has no place"):
            load(tmp_path / "f.safetensors", 16, 32, base)
        return
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(tmp_path / "f.safetensors", 16, 32, base)
    assert "\n" not in str(caught.value)


def test_what_a_file_says_and_nobody_reads_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = single(base) | {"model.diffusion_model.input_blocks.0.0.gate": torch.zeros(3), "model_ema.x": torch.ones(1)}
    state["alphas_cumprod"] = torch.linspace(0.99, 0.01, 1000)
    state["cond_stage_model.model.strange"] = torch.zeros(1)
    save_file(state, tmp_path / "f.safetensors")
    assert torch.equal(asked(tmp_path / "f.safetensors", base)[1], asked(base)[1])
    said = capsys.readouterr().err
    assert "input_blocks.0.0.gate" in said and "alphas_cumprod is not that of" in said and "model_ema" not in said
    assert "its text encoder (cond_stage_model.model.strange, ...) is not read" in said
    whole = single(base)
    whole.pop("model.diffusion_model.out.2.bias")
    save_file(whole, tmp_path / "lacking.safetensors")
    with pytest.raises(UserError, match="is no UNet2DConditionModel"):
        load(tmp_path / "lacking.safetensors", 16, 32, base)


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "lora_te_x.lora_up.weight"),
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight",),
        ("diffusion_model.proj_in.lokr_w1",),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_adapters_are_no_network_and_are_not_left_out(
    names: tuple[str, ...], alone: bool, base: Path, copy: Path, tmp_path: Path
) -> None:
    adapter = {name: torch.ones(2, 2) for name in names}
    save_file(({} if alone else load_file(base / UNET)) | adapter, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=r"f.safetensors: .*an adapter .* merge it into"):
        load(tmp_path / "f.safetensors", 16, 32, base)
    save_file(load_file(base / UNET) | adapter, copy / UNET, {"format": "pt"})
    with pytest.raises(UserError, match=r"unet: .*an adapter"):
        load(copy)


def scaled(state: dict[str, Tensor], mark: str, rows: bool) -> dict[str, Tensor]:
    """Weights in float8 with a scale of each tensor, or of each row."""
    out: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        if not key.endswith(".weight") or value.ndim < 2:
            out[key] = value.contiguous()
            continue
        largest = value.abs().flatten(1).amax(1) if rows else value.abs().max().reshape(1)
        scale = (largest / 448).reshape(-1, *[1] * (value.ndim - 1))
        out[key] = (value / scale).to(torch.float8_e4m3fn).contiguous()
        out[key.removesuffix("weight") + mark] = scale.flatten() if not rows else scale.flatten(1).contiguous()
    return out


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("mark", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_unscaled(mark: str, rows: bool, base: Path, tmp_path: Path) -> None:
    save_file(scaled(single(base), mark, rows), tmp_path / "f.safetensors")
    want, got = asked(base, t=500.0)[1], asked(tmp_path / "f.safetensors", base, t=500.0)[1]
    assert float((got - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(1)},
        {"a.weight": torch.zeros(4, 4, dtype=torch.uint8), "a.absmax": torch.ones(4)},
        {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)},
        {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.ones(2, 2)},
    ],
)
def test_other_quantized_weights_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"a.weight"):
        unscaled(state, Path("f.safetensors"))


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        (["v_pred"], None, "v"),
        (["v_pred", "ztsnr"], None, "v"),
        ([], {"modelspec.prediction_type": "v"}, "v"),
        ([], {"modelspec.prediction_type": "epsilon"}, "eps"),
        (["ztsnr"], None, "predicts noise"),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "is marked v_pred"),
        (["edm_mean"], None, "continuous"),
    ],
)
def test_marks_of_a_file_are_heeded(
    marks: list[str], metadata: dict[str, str] | None, expected: str, base: Path, tmp_path: Path
) -> None:
    save_file(single(base) | {key: torch.zeros(1) for key in marks}, tmp_path / "f.safetensors", metadata)
    if expected not in ("v", "eps"):
        with pytest.raises(UserError, match=expected):
            load(tmp_path / "f.safetensors", 16, 32, base)
        return
    denoiser, spec = load(tmp_path / "f.safetensors", 16, 32, base)
    assert denoiser.prediction == expected
    last = float(denoiser.process.alpha(torch.tensor([denoiser.process.t_max])))
    assert (last < 1e-3) == ("ztsnr" in marks)
    assert isinstance(spec, TextSpec)


def vae_keys(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An autoencoder as its authors name its weights."""
    out: dict[str, Tensor] = {}
    pairs: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"decoder\.up_blocks\.(\d+)\.resnets", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"), (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"), (r"attn_1\.to_(\w)\.", r"attn_1.\1."),
    ]  # fmt: skip
    for key, value in state.items():
        for pattern, new in pairs:
            key = re.sub(pattern, new, key)
        square = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        out[f"first_stage_model.{key}"] = (value[:, :, None, None] if square else value).contiguous()
    return out


@pytest.mark.parametrize("wrapped", ["text_model.", ""])
def test_a_whole_checkpoint_brings_its_own_text_encoder_and_autoencoder(
    wrapped: str, base: Path, copy: Path, tmp_path: Path
) -> None:
    text = {k: v for k, v in load_file(copy / "text_encoder/model.safetensors").items() if v.is_floating_point()}
    text = {k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in text.items()}
    vae = {k: 1.1 * v for k, v in load_file(copy / "vae/diffusion_pytorch_model.safetensors").items()}
    save_file(text, copy / "text_encoder/model.safetensors", {"format": "pt"})
    save_file(vae, copy / "vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    own = {f"cond_stage_model.transformer.{wrapped}{k.removeprefix('text_model.')}": v for k, v in text.items()}
    save_file(single(base) | own | vae_keys(vae, 2), tmp_path / "whole.safetensors")
    (_, x0, spec), (_, want, its) = asked(tmp_path / "whole.safetensors", base), asked(copy)
    torch.testing.assert_close(x0, want)
    assert not torch.allclose(x0, asked(base)[1], atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(spec.decode(x0), its.decode(x0))


def test_text_encoders_of_sd3_are_a_files_own(tmp_path: Path) -> None:
    """In the names of the collections: clip_l, clip_g, t5xxl; the network in diffusers' own."""
    base = families.save(tmp_path / "base", "stable_diffusion_3")
    other = shutil.copytree(base, tmp_path / "other")
    state = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    for part, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        text = load_file(other / part / "model.safetensors")
        text = {k: (1.3 * v if v.is_floating_point() else v) for k, v in text.items()}
        if prefix == "clip_l":  # which has no projection of its own there
            text["text_projection.weight"] = torch.eye(len(text["text_projection.weight"]))
        save_file(text, other / part / "model.safetensors", {"format": "pt"})
        kept = {
            k: v
            for k, v in text.items()
            if v.is_floating_point() and (prefix, k) != ("clip_l", "text_projection.weight")
        }
        state |= {f"text_encoders.{prefix}.transformer.{key}": value for key, value in kept.items()}
    save_file(state, tmp_path / "whole.safetensors")
    (_, x0, _), (_, want, _) = asked(tmp_path / "whole.safetensors", base, 0.5), asked(other, t=0.5)
    torch.testing.assert_close(x0, want)
    assert not torch.allclose(x0, asked(base, t=0.5)[1], atol=1e-4)
