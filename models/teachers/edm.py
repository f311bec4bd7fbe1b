"""NVIDIA's EDM and EDM2 checkpoints (arXiv 2206.00364, 2312.02696) as folders that this project and diffusers load.

    python -m models.teachers.edm edm-cifar10-32x32-cond-vp.pkl cifar10

Nothing of the file is executed. An unconditional network is one of a single class, as pictures without classes are. A
conditional one takes zeros for no class, as its own code does; the published ones never saw that in training, so
classifier-free guidance with them means nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from models import unpickle
from models.denoiser import Denoiser
from models.errors import UserError, run_command
from models.process import EDM
from models.teachers.edm2_networks import EDM2UNet
from models.teachers.edm_networks import DhariwalUNet, SongUNet
from models.teachers.embedded import PatchUNet, Spec
from models.unpickle import Record


def _plain(value: Any) -> Any:
    """As JSON writes it."""
    match value:
        case np.generic():
            return value.item()
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise ValueError(f"an argument is of type {type(value).__name__}")


def _inner(network: Record) -> Record:
    """The U-Net in its preconditioning."""
    match network.class_name:
        case "EDMPrecond":
            return network.modules["model"]
        case "Precond":
            return network.modules["unet"]
        case name:
            raise UserError(
                f"a {name}: only EDM's EDMPrecond and EDM2's Precond are read, not its VP, VE and iDDPM baselines"
            )


def _rebuilt(record: Record) -> SongUNet | DhariwalUNet | EDM2UNet:
    arguments = {name: _plain(value) for name, value in record.init_kwargs.items()}
    with torch.device("meta"):
        match record.class_name:
            case "SongUNet":
                unet = SongUNet(**arguments)
            case "DhariwalUNet":
                unet = DhariwalUNet(**arguments)
            case "UNet":
                unet = EDM2UNet(**arguments)
            case name:
                raise ValueError(f"a network of the unknown class {name}")
    unet.load_state_dict({name: value.float() for name, value in record.tensors().items()}, assign=True)
    return unet


def read(path: Path) -> tuple[Denoiser, Spec]:
    """The averaged network in the pickle ``path``, in float32 and evaluation mode.

    UserError if it cannot be read, asks for code, or holds another kind of network.
    """
    content = unpickle.load(path, "checkpoint")
    try:
        network = content["ema"]
        inner = _inner(network)
        arguments, sigma_data = inner.init_kwargs, float(network.state["sigma_data"])
        channels = int(arguments["img_channels" if inner.class_name == "UNet" else "in_channels"])
        if channels > 3:
            raise UserError(f"it makes latents of {channels} channels: only networks that make pictures are read")
        unet, size, labels = _rebuilt(inner), int(arguments["img_resolution"]), int(arguments.get("label_dim", 0))
    except UserError as error:
        raise UserError(f"checkpoint: {path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint: {path} is no network of EDM or EDM2: {type(error).__name__} {reason}") from error
    names = [str(label) for label in range(labels)] or ["all"]
    spec = Spec(1, len(names), channels, size, sigma_data, None, names)
    return Denoiser(PatchUNet(unet, 1, len(names)), EDM(), "edm", sigma_data).eval(), spec


@dataclass(frozen=True)
class Options:
    """Convert a checkpoint of EDM or EDM2 without running the code in it."""

    checkpoint: tyro.conf.Positional[Path]
    """The .pkl file."""
    folder: tyro.conf.Positional[Path]
    """Folder to write: safetensors, configuration and the code that diffusers needs."""


def main(options: Options) -> None:
    """Write the folder."""
    if not options.checkpoint.is_file():
        raise UserError(f"checkpoint: there is no file {options.checkpoint}")
    if options.folder.exists() and not (options.folder / "model_index.json").is_file():
        raise UserError(f"folder: {options.folder} exists and is no converted checkpoint; choose another")
    denoiser, spec = read(options.checkpoint)
    card = f"""---
library_name: diffusers
license: cc-by-nc-sa-4.0
---

# {options.folder.resolve().name}

{spec.summary}

Converted from {options.checkpoint.name}, whose licence these weights keep (NVIDIA's: CC BY-NC-SA 4.0).

```python
{spec.usage.replace("PATH", options.folder.resolve().name)}
```
"""
    spec.save(options.folder, denoiser.network, card)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    print(f"{options.folder}: {count / 1e6:,.1f} million parameters; {spec.summary}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
