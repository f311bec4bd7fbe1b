"""Checkpoints in one .safetensors file: a network alone, or a whole pipeline as the web's collections have it.

Every weight is used, known to be harmless, or named; so is what the file says of its noise process (marks such as
``v_pred``), and scaled float8 weights are unscaled.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, is_clip_model_in_single_file
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, T5EncoderModel

from models.errors import UserError
from models.teachers.keys import SCALES, check_model, check_no_adapters, config_of, name_weights, note

AUTOENCODER = ("first_stage_model.", "vae.")
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.", "text_encoder_2.", "te.")
HARMLESS = (
    "model_ema.", "betas", "alphas_cumprod_prev", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "logvar",
    "lvlb_weights", "denoiser.sigmas", "model_sampling.", "global_step",
)  # fmt: skip
"""Begins of keys that follow from the others, or are an average that stock loaders leave out too."""
MARKS = ("v_pred", "ztsnr", "alphas_cumprod")
CONTINUOUS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
CLIP_L = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.")
T5 = "text_encoders.t5xxl.transformer."


def text_prefixes(name: str, kind: type) -> tuple[str, ...]:
    """Before the keys of the text encoder ``name`` in transformers' own names."""
    if issubclass(kind, T5EncoderModel):
        return (T5,)
    return CLIP_L if name == "text_encoder" else ("text_encoders.clip_g.transformer.",)


class SingleFile:
    """The file ``path``, whose parts are built as ``folder`` says. UserError if it cannot be read."""

    def __init__(self, path: Path, folder: Path):
        if not path.is_file():
            raise UserError(f"teacher.path: there is no file {path}")
        self.path, self.folder = path, folder
        with safe_open(path, "pt") as file:
            self.about: dict[str, str] = file.metadata() or {}
        state = unscaled(load_file(path), path)
        check_no_adapters(path, state)
        if found := [key for key in CONTINUOUS if key in state]:
            raise UserError(f"teacher.path: {path}: {found[0]}: networks of continuous noise levels are not read")
        self.marks = {key: state.pop(key) for key in MARKS if key in state}
        state = {
            key: value for key, value in state.items() if not (key.startswith(HARMLESS) or key.endswith("scaled_fp8"))
        }
        self.text = {key: value for key, value in state.items() if key.startswith(TEXT)}
        self.vae = {key: value for key, value in state.items() if key.startswith(AUTOENCODER)}
        self.network = {key: value for key, value in state.items() if key not in self.text | self.vae}

    def part(self, name: str, kind: Any, required: bool = False) -> nn.Module | None:
        """The part ``name`` of the pipeline; None if the file does not hold it.

        ``required``: it is the network. UserError if the file's is another, or lacks weights.
        """
        if kind is None:
            return None
        if required:
            return self._converted(name, kind, self.network)
        if name == "vae" and self.vae:
            loaded, self.vae = self._converted(name, kind, self.vae), {}
            return loaded
        return self._text_encoder(name, kind) if self.text and name.startswith("text_encoder") else None

    def _converted(self, name: str, kind: Any, state: dict[str, Tensor]) -> nn.Module:
        """In diffusers' or in the original keys."""
        config = config_of(self.folder, name)
        check_model(config, kind, self.folder / name / "config.json")
        network = kind.from_config(config)
        wanted = network.state_dict()
        renamed = state
        where = f"teacher.path: {self.path} is no {kind.__name__} of {self.folder / name}"
        if not wanted.keys() <= state.keys():
            names = [one for one in SINGLE_FILE_LOADABLE_CLASSES if one == kind.__name__]
            if not names or not issubclass(kind, FromOriginalModelMixin):
                raise UserError(
                    f"teacher.path: {self.path} has other keys than {kind.__name__}, whose original ones are not known"
                )
            convert = SINGLE_FILE_LOADABLE_CLASSES[names[0]]["checkpoint_mapping_fn"]
            try:
                renamed = convert(config=dict(network.config), checkpoint=dict(state))
            except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, TypeError, StopIteration) as error:
                raise UserError(f"{where}: {type(error).__name__} {' '.join(str(error).split())[:150]}") from error
        lacking = [key for key in wanted if key not in renamed]
        other = [key for key in wanted if key in renamed and renamed[key].shape != wanted[key].shape]
        if lacking:
            raise UserError(f"{where}: it lacks {len(lacking)} of {len(wanted)} weights, as {lacking[0]}")
        if other:
            raise UserError(
                f"{where}: {other[0]} is {tuple(renamed[other[0]].shape)}, not {tuple(wanted[other[0]].shape)}: name "
                "in teacher.config a folder of the same architecture"
            )
        name_weights(self.path, unread(state, {key: renamed[key] for key in wanted}))
        network.load_state_dict({key: renamed[key].float() for key in wanted})
        return network

    def _text_encoder(self, name: str, kind: Any) -> nn.Module | None:
        """A CLIP or T5 of the file's own; None for others."""
        if not issubclass(kind, CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel):
            return None
        held = [prefix for prefix in text_prefixes(name, kind) if any(key.startswith(prefix) for key in self.text)]
        try:
            if held:
                return self._named(name, kind, held[0])
            if not is_clip_model_in_single_file(kind, self.text):
                return None
            options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
            model: Any = create_diffusers_clip_model_from_ldm(
                kind, checkpoint=dict(self.text), subfolder=name, config=str(self.folder), **options
            )
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"teacher.path: {self.path}: its text encoder is not that of {self.folder / name}: {reason}"
            ) from error
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(f"teacher.path: {self.path}: its text encoder lacks weights of {self.folder / name}")
        prefix = "cond_stage_model.model." if name == "text_encoder" else "conditioner.embedders.1.model."
        self.text = {key: value for key, value in self.text.items() if not key.startswith(prefix)}
        return model

    def _named(self, name: str, kind: Any, prefix: str) -> PreTrainedModel:
        """One in transformers' keys behind a prefix."""
        model = kind(kind.config_class.from_pretrained(self.folder / name))
        wanted = model.state_dict()
        mine = {key.removeprefix(prefix): value for key, value in self.text.items() if key.startswith(prefix)}
        inner = any(key.startswith("text_model.") for key in wanted)
        state = {
            ("text_model." * (inner and not k.startswith("text_projection")) + k.removeprefix("text_model.")): v
            for k, v in mine.items()
        }
        state = {key: value.float() for key, value in state.items() if not key.endswith("position_ids")}
        if "text_projection.weight" in wanted and "text_projection.weight" not in state:
            state["text_projection.weight"] = torch.eye(len(wanted["text_projection.weight"]))
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = {"encoder.embed_tokens.weight"} if "shared.weight" in state else set()
        if missing := [key for key in missing if key not in tied and not key.endswith("position_ids")]:
            raise ValueError(f"it lacks {len(missing)} weights, as {missing[0]}")
        name_weights(self.path, [prefix + key for key in unexpected])
        self.text = {key: value for key, value in self.text.items() if not key.startswith(prefix)}
        return model

    def scheduler(self, own: Any) -> Any:
        """The folder's scheduler ``own`` with what the file says of its noise process. UserError if they contradict."""
        config = dict(own.config)
        said: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in self.marks else {}
        kind = {"v": "v_prediction", "epsilon": "epsilon"}.get(self.about.get("modelspec.prediction_type", ""))
        if kind is not None and said.get("prediction_type", kind) != kind:
            raise UserError(
                f"teacher.path: {self.path} is marked v_pred, and its modelspec.prediction_type says {kind}"
            )
        said |= ({} if kind is None else {"prediction_type": kind}) | (
            {"rescale_betas_zero_snr": True} if "ztsnr" in self.marks else {}
        )
        changed = {key: value for key, value in said.items() if config.get(key, False) != value}
        if changed and "beta_schedule" not in config:
            raise UserError(
                f"teacher.path: {self.path} is marked {', '.join(changed)}, but the scheduler of {self.folder} is a "
                "flow's: name in teacher.config a folder of the same kind"
            )
        if changed:
            note(f"{self.path}: its own marks, {changed}, take the place of what {self.folder}/scheduler says")
            kept = all(key in config for key in changed)
            own = (type(own) if kept else DDIMScheduler).from_config(config | changed)
        if "alphas_cumprod" in self.marks and "beta_schedule" in config and "ztsnr" not in said:
            table, mine = own.alphas_cumprod, self.marks["alphas_cumprod"].float()
            if table.shape != mine.shape or not torch.allclose(table, mine, rtol=1e-2, atol=1e-5):
                note(f"{self.path}: its alphas_cumprod is not that of {self.folder}/scheduler, which is followed")
        return own

    def name_rest(self) -> None:
        """Parts that the pipeline has no place for, or whose form is not known."""
        for what, state in (("text encoder", self.text), ("autoencoder", self.vae)):
            if state:
                note(f"{self.path}: its {what} ({next(iter(state))}, ...) is not read: that of {self.folder} is used")


def unread(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Keys of ``before`` that are nowhere in ``after``, which holds the same numbers under other names and shapes."""
    if sum(value.numel() for value in before.values()) == sum(value.numel() for value in after.values()):
        return []
    kept = {value.untyped_storage().data_ptr() for value in after.values()}
    return [key for key, value in before.items() if value.untyped_storage().data_ptr() not in kept]


def unscaled(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Float8 weights times their scales, of a tensor or of each row; float32 then. UserError for other scales."""
    out = dict(state)
    for key, weight in state.items():
        stem, _, last = key.rpartition(".")
        if last != "weight" or weight.element_size() > 1:
            continue
        scales = [f"{stem}.{end}" for end in ("scale_weight", "weight_scale") if f"{stem}.{end}" in state]
        others = [f"{stem}.{end}" for end in SCALES if f"{stem}.{end}" in state and f"{stem}.{end}" not in scales]
        if not weight.is_floating_point() or others or len(scales) > 1:
            raise UserError(
                f"teacher.path: {path}: {key} is quantized ({weight.dtype}{', ' + others[0] if others else ''}) in a "
                "way that is not read: give the whole weights, or float8 with a scale of each tensor or row"
            )
        whole = weight.float()
        if scales:
            scale = out.pop(scales[0]).float()
            if scale.numel() not in (1, len(weight)) or (scale.numel() > 1 and scale.shape[0] != len(weight)):
                raise UserError(
                    f"teacher.path: {path}: {scales[0]} is {tuple(scale.shape)}: scales of blocks are not read"
                )
            whole = whole * scale.reshape(-1, *[1] * (weight.ndim - 1)) if weight.ndim else whole * scale
        out[key] = whole
        for end in ("scale_input", "input_scale", "comfy_quant"):  # of activations, and the form's name
            out.pop(f"{stem}.{end}", None)
    return out
