"""Teachers: one file per family; :func:`load` finds the family of a folder."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from models.denoiser import Denoiser
from models.errors import UserError
from models.teachers import class_pipeline, embedded, keys, pipeline, sana
from models.teachers.base import ClassSpec, TextSpec
from models.teachers.class_pipeline import ClassNetwork
from models.teachers.ddpm import DDPM
from models.teachers.dit import DiT
from models.teachers.flux import Flux
from models.teachers.pipeline import PipelineNetwork
from models.teachers.pixart import PixArt
from models.teachers.qwen_image import QwenImage
from models.teachers.sd3 import StableDiffusion3
from models.teachers.stable_diffusion import StableDiffusion, StableDiffusionXL
from models.teachers.z_image import ZImage

PRETRAINED = Path(__file__).parent.parent / "pretrained"


def is_hub_id(path: str | Path) -> bool:
    """Whether ``path`` is ``org/name`` on a model hub: it looks like one, and there is no such folder."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path))) and not Path(path).parent.is_dir()


def resolve(path: str | Path) -> Path:
    """The folder that ``path`` means; ``embedded:NAME`` is one that comes with the project, ``org/name`` is on the hub.

    UserError if there is no such one.
    """
    if not str(path).startswith("embedded:"):
        return downloaded(str(path)) if is_hub_id(path) else Path(path)
    name = str(path).removeprefix("embedded:")
    known = sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())
    if name not in known:
        raise UserError(f"teacher {path}: no embedded teacher '{name}'; there are {known}")
    return PRETRAINED / name


def downloaded(name: str) -> Path:
    """The pipeline ``name`` of the hub, from its cache where it is there; safetensors alone, and no code of its own."""
    try:
        folder = diffusers.DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"teacher {name}: no such folder, and it cannot be had from the hub ({reason}): check the name and the "
            f"network, or `hf download {name} --local-dir FOLDER` elsewhere and give the folder"
        ) from error
    with suppress(OSError, ValueError):  # its licence, for the student's card
        hf_hub_download(name, "README.md")
    return Path(folder)


def load_class_conditional(path: str | Path) -> tuple[Denoiser, ClassSpec]:
    """As :func:`load`, of a folder that is asked for classes; UserError if it is another."""
    denoiser, spec = load(path)
    if isinstance(spec, TextSpec):
        raise UserError(f"{path} is asked for prompts, not for classes")
    return denoiser, spec


def _parts(path: str | Path, config: str | Path | None) -> tuple[Path, Path | None]:
    """The pipeline folder, and the file of the network where that is one by itself."""
    weights = None
    if str(path).endswith((".pkl", ".ckpt", ".pt", ".pth", ".bin")):
        raise UserError(f"teacher {path}: a pickle; convert EDM's: python -m models.teachers.edm {path} FOLDER")
    if str(path).endswith(".safetensors"):
        if config is None:
            raise UserError(f"teacher.config: missing; {path} is the network alone: name a folder for the rest")
        weights, path = Path(path), config
    elif config is not None:
        raise UserError(f"teacher.config: only for a single .safetensors file, which {path} is not")
    folder = resolve(path)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher {path}: {folder} has no model_index.json; give a pipeline folder of diffusers")
    return folder, weights


def _pipeline_class(folder: Path) -> Any:
    """A stock pipeline's name, or a list for a pipeline of its own."""
    return keys.read(folder / "model_index.json")["_class_name"]


def class_names(path: str | Path, config: str | Path | None = None) -> list[str] | None:
    """The class names that :func:`load` would give, without loading a network; None for a teacher of prompts."""
    folder, _ = _parts(path, config)
    try:
        name = _pipeline_class(folder)
        if isinstance(name, list):
            return embedded.read_spec(folder).class_names
        if name in ("SanaPipeline", "SanaSprintPipeline"):
            return None
        family = _family(name)
        return class_pipeline.names(folder, family) if issubclass(family, ClassNetwork) else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, folder, error) from error


def _unreadable(path: str | Path, folder: Path, error: Exception) -> UserError:
    return UserError(f"teacher {path}: {folder} cannot be read: {' '.join(str(error).split())[:200]}")


def load(
    path: str | Path, size: int | None = None, tokens: int | None = None, config: str | Path | None = None
) -> tuple[Denoiser, ClassSpec | TextSpec]:
    """The denoiser at ``path`` in float32, and what its folder says of it. UserError if there is none.

    ``path`` is a folder, an embedded teacher, a hub id, or a single .safetensors file of the network with ``config``,
    the pipeline folder (or hub id) that has everything else. ``size`` (pixels) and ``tokens`` of a prompt are a
    diffusers family's own unless told otherwise.
    """
    folder, weights = _parts(path, config)
    try:
        name = _pipeline_class(folder)
        if name in ("SanaPipeline", "SanaSprintPipeline"):
            return sana.load(folder, weights)
        if isinstance(name, list):  # a pipeline of its own
            if weights is not None:
                raise UserError(f"teacher.config: {folder} is no stock pipeline, whose network a file could replace")
            return embedded.load(folder)
        family, kind = _family(name), getattr(diffusers, name)
        if issubclass(family, ClassNetwork):
            return class_pipeline.load(folder, kind, family, size, weights)
        return pipeline.load(folder, kind, family, size, tokens, weights)
    except (OSError, KeyError, TypeError, ValueError, NotImplementedError, SafetensorError) as error:
        raise _unreadable(path, folder, error) from error


def _family(name: str) -> type[PipelineNetwork] | type[ClassNetwork]:
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
        case "DiTPipeline":
            return DiT
        case "DDPMPipeline":
            return DDPM
        case _:
            raise UserError(f"teacher: pipelines of the class {name} are not known; {', '.join(KNOWN)} are")


KNOWN = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "PixArtAlpha", "PixArtSigma", "Flux", "QwenImage",
         "ZImage", "Sana", "SanaSprint", "DiT", "DDPM")  # fmt: skip
