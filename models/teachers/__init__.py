"""Teachers: one file per family; :func:`load` finds the family of a folder."""

import json
from pathlib import Path

import diffusers
from safetensors import SafetensorError

from models.denoiser import Denoiser
from models.errors import UserError
from models.teachers import embedded, pipeline, sana
from models.teachers.base import ClassSpec, TextSpec
from models.teachers.flux import Flux
from models.teachers.pipeline import PipelineNetwork
from models.teachers.pixart import PixArt
from models.teachers.qwen_image import QwenImage
from models.teachers.sd3 import StableDiffusion3
from models.teachers.stable_diffusion import StableDiffusion, StableDiffusionXL
from models.teachers.z_image import ZImage

PRETRAINED = Path(__file__).parent.parent / "pretrained"


def resolve(path: str | Path) -> Path:
    """The folder that ``path`` means; ``embedded:NAME`` is one that comes with the project."""
    if not str(path).startswith("embedded:"):
        return Path(path)
    name = str(path).removeprefix("embedded:")
    known = sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())
    if name not in known:
        raise UserError(f"teacher {path}: no embedded teacher '{name}'; there are {known}")
    return PRETRAINED / name


def load_class_conditional(path: str | Path) -> tuple[Denoiser, ClassSpec]:
    """As :func:`load`, of a folder that is asked for classes; UserError if it is another."""
    denoiser, spec = load(path)
    if isinstance(spec, TextSpec):
        raise UserError(f"{path} is asked for prompts, not for classes")
    return denoiser, spec


def load(
    path: str | Path, size: int | None = None, tokens: int | None = None, config: Path | None = None
) -> tuple[Denoiser, ClassSpec | TextSpec]:
    """The denoiser at ``path`` in float32, and what its folder says of it. UserError if there is none.

    ``size`` (pixels) and ``tokens`` of a prompt are a diffusers family's own unless told otherwise.
    """
    folder = resolve(path)
    if folder.suffix == ".pkl":
        raise UserError(f"teacher {path}: a pickle; convert it: python -m models.teachers.edm {path} FOLDER")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher {path}: {folder} has no model_index.json; give a pipeline folder of diffusers")
    try:
        name = json.loads((folder / "model_index.json").read_text())["_class_name"]
        if name in ("SanaPipeline", "SanaSprintPipeline"):
            return sana.load(folder)
        if isinstance(name, list):  # a pipeline of its own
            return embedded.load(folder)
        return pipeline.load(folder, getattr(diffusers, name, None), _family(name), size, tokens)
    except (OSError, KeyError, TypeError, ValueError, json.JSONDecodeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher {path}: {folder} cannot be read: {reason}") from error


def _family(name: str) -> type[PipelineNetwork]:
    """Of a stock pipeline class."""
    match name:
        case "StableDiffusionPipeline":
            return StableDiffusion
        case "StableDiffusionXLPipeline":
            return StableDiffusionXL
        case "PixArtAlphaPipeline" | "PixArtSigmaPipeline":
            return PixArt
        case "StableDiffusion3Pipeline":
            return StableDiffusion3
        case "FluxPipeline":
            return Flux
        case "QwenImagePipeline":
            return QwenImage
        case "ZImagePipeline":
            return ZImage
        case _:
            raise UserError(f"teacher: pipelines of the class {name} are not known; {', '.join(KNOWN)} are")


KNOWN = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Flux", "QwenImage",
         "ZImage", "Sana", "SanaSprint")  # fmt: skip
