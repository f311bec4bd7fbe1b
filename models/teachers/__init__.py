"""Teachers: one file per family; :func:`load` finds the family of a folder."""

import json
from pathlib import Path

from safetensors import SafetensorError

from models.denoiser import Denoiser
from models.errors import UserError
from models.teachers import embedded, sana
from models.teachers.sana import SanaSpec

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


def load_class_conditional(path: str | Path) -> tuple[Denoiser, embedded.Spec]:
    """As :func:`load`, of a folder that is asked for classes; UserError if it is another."""
    denoiser, spec = load(path)
    if isinstance(spec, SanaSpec):
        raise UserError(f"{path} is asked for prompts, not for classes")
    return denoiser, spec


def load(path: str | Path) -> tuple[Denoiser, embedded.Spec | SanaSpec]:
    """The denoiser at ``path`` in float32, and what its folder says of it. UserError if there is none."""
    folder = resolve(path)
    if folder.suffix == ".pkl":
        raise UserError(f"teacher {path}: a pickle; convert it: python -m models.teachers.edm {path} FOLDER")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher {path}: {folder} has no model_index.json; give a folder that this project exported")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        match index["_class_name"]:
            case "SanaPipeline" | "SanaSprintPipeline":
                return sana.load(folder)
            case _:
                return embedded.load(folder)
    except (OSError, KeyError, TypeError, ValueError, json.JSONDecodeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher {path}: {folder} cannot be read: {reason}") from error
