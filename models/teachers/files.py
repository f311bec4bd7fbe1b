"""Pipeline folders and single files on disk: safetensors alone, nothing from a network."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors.torch import load_file
from torch import nn

from models.errors import UserError

FROM_FILES: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32, "local_files_only": True}


def opened(folder: Path, pipeline: Any, part: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The stock pipeline in ``folder``, frozen, in float32 and evaluation mode, and what studio.json says of it.

    ``weights`` is a single file of the network ``part``, which the folder gives all the rest to.
    """
    index = json.loads((folder / "model_index.json").read_text())
    more = dict(FROM_FILES)
    if "safety_checker" in index:
        more |= {"safety_checker": None, "requires_safety_checker": False}
    if weights is not None:
        more[part] = single_file(weights, folder, part)
    pipe: Any = pipeline.from_pretrained(folder, **more)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    studio = folder / "studio.json"
    return pipe, json.loads(studio.read_text()) if studio.is_file() else {}


def single_file(weights: Path, folder: Path, part: str) -> Any:
    """The network in a .safetensors file, in diffusers' or in the original keys, built as ``folder/part`` says.

    UserError if diffusers does not know its class's original keys, or if the file is of another network.
    """
    if not weights.is_file():
        raise UserError(f"teacher.path: there is no file {weights}")
    name = json.loads((folder / part / "config.json").read_text())["_class_name"]
    kind = getattr(diffusers, name)
    network, state = kind.from_config(kind.load_config(folder / part)), load_file(weights)
    if state.keys() == network.state_dict().keys():
        network.load_state_dict({key: value.float() for key, value in state.items()})
        return network
    if not issubclass(kind, FromOriginalModelMixin):
        raise UserError(f"teacher.path: {weights} has other keys than {name}, whose original ones are not known")
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    try:
        return kind.from_single_file(str(weights), config=str(folder), subfolder=part, **options)
    except (SingleFileComponentError, KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher.path: {weights} is no {name} of {folder}/{part}: {reason}") from error
