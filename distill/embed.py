"""Put a finished run among the models that come with the project, with weights in float16 to keep the clone small.

python -m distill.embed runs/solids/teacher solids        # from then on embedded:solids
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def main(options: Options) -> None:
    source = options.run / "student"
    if not (source / "model_index.json").is_file():
        raise UserError(f"{options.run} has no exported network: {source / 'model_index.json'} is missing")
    if not options.name.isidentifier():
        raise UserError(f"name: '{options.name}' may have letters, digits and underscores only")
    folder = PRETRAINED / options.name
    with replace_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        for part in HALVED:
            for path in (temporary / part).glob("*.safetensors"):
                halve(path)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    load(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
    print(f"embedded:{options.name}, {size:.1f} MB; complete its README.md with what was measured")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
