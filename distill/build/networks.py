"""Networks at step 0: adapters, copies, weights of an earlier run."""

import copy
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from distill import checkpoint
from distill.settings import Config, LoRA
from models.adapters import Adapted, checkpointed
from models.denoiser import CoreNetwork, Denoiser
from models.errors import UserError
from models.teachers import base
from models.teachers.base import TextSpec


def with_checkpointing(networks: dict[str, nn.Module]) -> None:
    """Make networks that come from diffusers recompute their activations; UserError if none can."""
    modules = [module for network in networks.values() for module in network.modules()]
    found = [module for module in modules if isinstance(module, CoreNetwork)]
    for network in found:
        if isinstance(network, Adapted):
            checkpointed(network.network)
        else:
            network.core.enable_gradient_checkpointing()
    if not found:
        raise UserError("train.gradient_checkpointing: no network of this run can recompute its activations")


def adapted(lora: LoRA, denoiser: Denoiser, name: str) -> Denoiser:
    """``denoiser`` with an adapter of its own on the same frozen network."""
    network = Adapted(denoiser.network, name, lora.rank, lora.alpha, lora.targets)
    return Denoiser(network, denoiser.process, denoiser.prediction, denoiser.sigma_data)


def trainable(config: Config, teacher: Denoiser, name: str) -> Denoiser:
    """What starts as the teacher: a copy of it, or an adapter on it."""
    return copy.deepcopy(teacher) if config.lora is None else adapted(config.lora, teacher, name)


def check_kind(path: Path | None, own: base.Spec, spec: base.Spec) -> None:
    """UserError if a student to start from makes other pictures than the teacher, or is asked for more."""
    if type(own) is not type(spec) or own.shape != spec.shape:
        raise UserError(f"method.start: {path} makes other pictures than the teacher")
    if isinstance(own, TextSpec) and isinstance(spec, TextSpec) and own.control is not None and spec.control is None:
        raise UserError(
            f"method.start: {path} follows lines by a control branch, the teacher has none: name in teacher.path one "
            "with a branch, or start at a student without"
        )


def load_weights(network: nn.Module, run: Path, name: str) -> None:
    """Those of the newest checkpoint of ``run``, if it has any of that name; UserError if they do not fit or are
    damaged."""
    try:
        if weights := checkpoint.newest(run / "checkpoints", name):
            network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"method.start: the {name} in {run} is of another teacher's architecture") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"method.start: the newest checkpoint of {run} is damaged ({error}): delete it") from error
