"""Pipeline folders on disk: safetensors alone, nothing from a network."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from models.errors import UserError
from models.teachers import keys
from models.teachers.single_file import SingleFile

SCHEDULER = "scheduler/scheduler_config.json"
FROM_FILES: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32, "local_files_only": True}


def opened(folder: Path, pipeline: Any, part: str, weights: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The stock pipeline in ``folder``, frozen, in float32 and evaluation mode, and what studio.json says of it.

    ``weights`` is a single file of the network ``part``, which the folder gives all the rest to that it does not hold.
    UserError if a part lacks weights, or says what nobody reads and would change the answers.
    """
    index = keys.read(folder / "model_index.json")
    keys.check_index(index, pipeline, folder)
    more = dict(FROM_FILES)
    if "safety_checker" in index:
        more |= {"safety_checker": None, "requires_safety_checker": False}
    single = None if weights is None else SingleFile(weights, folder)
    for name, value in index.items():
        if isinstance(value, list) and name not in more and value[0] is not None:
            loaded = None if single is None else single.part(name, model_class(value), required=name == part)
            loaded = loaded or read_part(folder, name, value)
            more |= {} if loaded is None else {name: loaded}
    keys.read(folder / SCHEDULER)
    pipe: Any = pipeline.from_pretrained(folder, **more)
    if single is not None:
        pipe.register_modules(scheduler=single.scheduler(pipe.scheduler))
        single.name_rest()
    keys.check_scheduler(dict(pipe.scheduler.config), folder / SCHEDULER)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    studio = folder / "studio.json"
    return pipe, keys.read(studio) if studio.is_file() else {}


def model_class(value: list[str]) -> type[nn.Module] | None:
    """The class of a part of model_index.json that has weights: of diffusers or transformers."""
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(value[0]), value[1], None)
    return kind if isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel) else None


def read_part(folder: Path, name: str, value: list[str]) -> Any:
    """One with weights, which are all there; None for another."""
    kind: Any = model_class(value)
    if kind is None or name == "image_encoder":
        return None
    where = folder / name
    own = issubclass(kind, ModelMixin)
    config = keys.config_of(folder, name)
    keys.check_whole(config, where / "config.json")
    if own:
        keys.check_model(config, kind, where / "config.json")
    options = FROM_FILES if own else {"dtype" if k == "torch_dtype" else k: v for k, v in FROM_FILES.items()}
    try:
        loaded, info = kind.from_pretrained(where, output_loading_info=True, **options)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"teacher: {where} is no {value[1]}: {' '.join(str(error).split())[:200]}") from error
    keys.check_weights(info, where)
    return loaded
