"""Put a finished run among the models that come with the project, with weights in float16 to keep the clone small.

python -m distill.workshop.embed runs/solids/teacher solids        # from then on embedded:solids
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.features import file_digest
from models.errors import UserError, run_command
from models.folders import replace_folder
from models.teachers import PRETRAINED, load

HALVED = ("transformer", "vae", "controlnet", "unet")
"""Parts whose weights are loaded in float32 whatever their file has; stock pipelines keep a text encoder's own."""


@dataclass(frozen=True)
class Options:
    """Copy a run's exported network into models/pretrained."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    name: tyro.conf.Positional[str]
    """What it is called behind embedded:."""


def halve(path: Path) -> None:
    """Rewrite a .safetensors file with its float32 tensors in float16; UserError if one does not fit into that."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, value in tensors.items():
        if value.dtype == torch.float32:
            tensors[name] = value.half()
            if not bool(tensors[name].isfinite().all()):
                raise UserError(f"{path}: {name} does not fit into float16")
    save_file(tensors, path, metadata)


def keep_linked(folder: Path) -> None:
    """Turn links of other embedded models to files of ``folder`` into copies, before ``folder`` is replaced."""
    for link in [path for path in PRETRAINED.rglob("*.safetensors") if path.is_symlink()]:
        if link.resolve().is_relative_to(folder.resolve()):
            content = link.read_bytes()
            link.unlink()
            link.write_bytes(content)


def link_shared(folder: Path) -> list[Path]:
    """Replace weights that another embedded model has too by links to its files, and return those that were.

    A teacher, its student and its sketch student share autoencoder and text encoder, and the clone holds them once.
    """
    others = [path for path in PRETRAINED.rglob("*.safetensors") if not path.is_relative_to(folder)]
    known = {(path.stat().st_size, file_digest(path)): path for path in others if not path.is_symlink()}
    linked = []
    for path in folder.rglob("*.safetensors"):
        if same := known.get((path.stat().st_size, file_digest(path))):
            path.unlink()
            path.symlink_to(os.path.relpath(same, path.parent))
            linked.append(path)
    return linked


def main(options: Options) -> None:
    source = options.run / "student"
    if not (source / "model_index.json").is_file():
        raise UserError(f"{options.run} has no exported network: {source / 'model_index.json'} is missing")
    if not options.name.isidentifier():
        raise UserError(f"name: '{options.name}' may have letters, digits and underscores only")
    folder = PRETRAINED / options.name
    keep_linked(folder)
    with replace_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        for part in HALVED:
            for path in (temporary / part).glob("*.safetensors"):
                halve(path)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    link_shared(folder)
    load(folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6
    print(f"embedded:{options.name}, {size:.1f} MB; complete its README.md with what was measured")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
