"""The rule for what a checkpoint says: every key of its configs and weights is used, or known to be harmless, or named
in one line. What would change the answers and is not read is a UserError."""

import inspect
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel

from models.errors import UserError
from models.json_text import read_json

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""Keys of a table of noise levels."""
FLOW = (
    "shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "time_shift_type", "sigma_data",
)  # fmt: skip
"""Keys of a flow's process, and of the grid that bends with it."""
SAMPLING = frozenset({
    "algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector",
    "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "original_inference_steps", "predict_x0", "predictor_order", "rho", "sample_max_value",
    "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min", "sigma_schedule", "skip_prk_steps", "solver_order",
    "solver_p", "solver_type", "steps_offset", "stochastic_sampling", "thresholding", "timestep_scaling",
    "timestep_spacing", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
    "variance_type", "clip_denoised", "sample_range", "max_timesteps", "intermediate_timesteps",
})  # fmt: skip
"""Keys of a scheduler's own way down its noise levels: this project has samplers of its own."""
INDEX = frozenset({
    "requires_safety_checker", "safety_checker", "feature_extractor", "image_encoder", "add_watermarker",
    "force_zeros_for_empty_prompt", "id2label", "is_distilled",
})  # fmt: skip
"""Keys of model_index.json beside the pipeline's parts that are used or change no picture."""


@cache
def note(line: str) -> None:
    """One line on stderr, once in a process."""
    print(f"note: {line}", file=sys.stderr)


def read(path: Path) -> dict[str, Any]:
    """A config; UserError if it is no JSON object, or gives a key twice."""
    try:
        values = read_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"teacher: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"teacher: {path} is no JSON object")
    return values


def config_of(folder: Path, part: str) -> dict[str, Any]:
    """The part's config.json."""
    return read(folder / part / "config.json")


def check_index(index: dict[str, Any], pipeline: Any, folder: Path) -> None:
    """Name what model_index.json says and the stock class ``pipeline`` has no place for. UserError if a part that it
    needs is missing."""
    parameters = inspect.signature(pipeline.__init__).parameters
    known, present = INDEX | set(parameters), {key for key, value in index.items() if value and value != [None, None]}
    optional = {"self", "kwargs", *pipeline._optional_components}
    needed = [key for key, value in parameters.items() if value.default is value.empty and key not in optional]
    if missing := [key for key in needed if key not in present]:
        raise UserError(
            f"teacher: {folder} has no {missing[0]}, which {pipeline.__name__} needs: copy {' and '.join(missing)} "
            "from a folder that has it, with its line of model_index.json"
        )
    name_others(folder / "model_index.json", index, known)


def check_scheduler(config: dict[str, Any], where: Path) -> None:
    """UserError for a noise process that is none of those read here."""
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"teacher: {where}: timestep_type {config['timestep_type']}: networks of continuous noise levels (CosXL, "
            "EDM-trained SDXL) are not read; those of a table of noise levels or of a flow are"
        )
    if config.get("invert_sigmas"):
        raise UserError(f"teacher: {where}: invert_sigmas: flows whose time runs the other way are not read")
    if config.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        raise UserError(f"teacher: {where}: time_shift_type {config['time_shift_type']} is not exponential or linear")
    name_others(where, config, {*SCHEDULE, *FLOW, *SAMPLING, "prediction_type", "timestep_type", "invert_sigmas"})


def check_whole(config: dict[str, Any], where: Path) -> None:
    """UserError for quantized weights."""
    if config.get("quantization_config"):
        raise UserError(f"teacher: {where}: quantization_config: quantized weights are not read: give the whole ones")


def check_model(config: dict[str, Any], kind: type, where: Path) -> None:
    """Name what a config says and diffusers' class ``kind`` has no place for. UserError for sides that it has not."""
    sides = config.get("sample_size")
    if isinstance(sides, list) and not issubclass(kind, UNet2DConditionModel | UNet2DModel):
        raise UserError(
            f"teacher: {where}: sample_size {sides}: {kind.__name__} takes one number, the side of its latents: write "
            f"{max(sides)} there, and give teacher.size for pictures of another side"
        )
    name_others(where, config, set(inspect.signature(kind.__init__).parameters))


def check_asked(config: dict[str, Any], absent: Iterable[str], where: str) -> None:
    """UserError if a network asks for more than its pipeline gives it: ``absent`` are keys that must say nothing."""
    for key in absent:
        if config.get(key):
            raise UserError(
                f"teacher: {where}: {key} {config[key]}: the network asks for more than noise, time and prompt, which "
                "its pipeline does not give it: choose a text-to-image checkpoint"
            )


def check_weights(info: dict[str, Any], where: Path) -> None:
    """Of a part that was loaded with its report ``info``. UserError if it lacks weights: they would be random."""
    if missing := sorted(info.get("missing_keys") or ()):
        raise UserError(f"teacher: {where} lacks {len(missing)} weights of its own config, as {missing[0]}: damaged?")
    if mismatched := list(info.get("mismatched_keys") or ()):
        raise UserError(f"teacher: {where} has weights of other shapes than its config says, as {mismatched[0]}")
    name_weights(where, info.get("unexpected_keys") or ())


SCALES = ("scale", "scale_weight", "weight_scale", "weight_scale_2", "weight_scale_inv", "absmax", "quant_map")
"""Ends of keys without which the weights beside them mean nothing."""
ASKS = ("cond_proj.", "guidance_in.", "guidance_embedder.", "add_embedding.", "label_emb.")
"""Parts of keys of a network that is told more than one without them."""


ADAPTERS = (".lora_", "lora_unet_", "lora_transformer_", ".hada_w", ".lokr_w", ".oft_", "dora_scale")
"""Parts of keys of weights that are added to others."""


def check_no_adapters(where: Path, keys: Iterable[str]) -> None:
    """UserError for weights that change others, which would then be read without them."""
    if found := [key for key in keys if any(part in key for part in ADAPTERS)]:
        raise UserError(
            f"teacher: {where}: {found[0]}: an adapter (LoRA and its like), which is not read: merge it into the "
            "network that it was trained on, and give that"
        )


def name_weights(where: Path, unread: Collection[str]) -> None:
    """Name weights that no network has a place for. UserError for those without which the others mean something else:
    the scales of quantized ones, adapters, and what a network that is told more has."""
    keys = sorted(unread)
    check_no_adapters(where, keys)
    if scales := [key for key in keys if key.rpartition(".")[2] in SCALES]:
        raise UserError(
            f"teacher: {where}: {scales[0]}: scales of quantized weights that are not read; give the whole ones"
        )
    if told := [key for key in keys if any(part in key for part in ASKS)]:
        raise UserError(
            f"teacher: {where}: {told[0]} has no place in the network that its config describes: the weights are of "
            "one that is told more (guidance, sizes): give the config that belongs to them"
        )
    if keys:
        note(f"{where}: {len(keys)} weights are not read, as {', '.join(keys[:3])}: its network has no place for them")


def name_others(where: Path, config: dict[str, Any], known: Collection[str]) -> None:
    """Name keys that say something and are not ``known``."""
    for key, value in config.items():
        if value and key not in known and not key.startswith("_"):
            note(f"{where}: {key} {str(value)[:60]} is not read")
