"""Teachers: one file per family; :func:`load` finds the family of a folder."""

import json
from pathlib import Path

from safetensors import SafetensorError

from models.denoiser import Denoiser
from models.errors import UserError
from models.teachers import embedded

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


def load(path: str | Path) -> tuple[Denoiser, embedded.Spec]:
    """The denoiser at ``path`` in float32, and what its folder says of it. UserError if there is none."""
    folder = resolve(path)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher {path}: {folder} has no model_index.json; give a folder that this project exported")
    try:
        return embedded.load(folder)
    except (OSError, KeyError, TypeError, ValueError, json.JSONDecodeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher {path}: {folder} cannot be read: {reason}") from error
