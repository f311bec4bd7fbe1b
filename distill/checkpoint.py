"""Checkpoints that are atomic, complete and named by network.

``checkpoints/step-N/{student,critic,discriminator}/{model.safetensors, optimizer.pt}``, the moving average in
``step-N/student/ema.safetensors``, everything else (step, data position, log sums, ratio averages) in
``step-N/state.pt``.
Frozen networks are never written. ``.pt`` files hold tensors and plain containers and are read with ``weights_only``.
"""

import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from models.errors import UserError
from models.folders import replace_folder


def list_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, ascending."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def newest(folder: Path, network: str) -> dict[str, torch.Tensor] | None:
    """Weights of one network in the newest checkpoint of a run; None if there are none."""
    steps = list_steps(folder)
    path = folder / f"step-{steps[-1]}" / network / "model.safetensors" if steps else None
    return load_file(path) if path and path.is_file() else None


def save(
    folder: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    ema: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write ``folder/step-N`` through a temporary folder, then remove all but the ``keep`` newest."""
    with replace_folder(folder / f"step-{step}") as temporary:
        for name, network in networks.items():
            (temporary / name).mkdir()
            tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
            save_file(tensors, temporary / name / "model.safetensors")
            torch.save(optimizers[name].state_dict(), temporary / name / "optimizer.pt")
        save_file(ema, temporary / "student" / "ema.safetensors")
        torch.save(state, temporary / "state.pt")
    for old in list_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")


def load(
    folder: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load ``folder/step-N`` into networks and optimizers; returns the moving average and the rest of the state.

    UserError if it is damaged or of other networks; nothing on disk is changed.
    """
    path = folder / f"step-{step}"
    if device.type == "cpu":
        device = torch.device("cpu")  # processes that share a CPU are on cpu:0, cpu:1, ..., which no file knows
    try:
        for name, network in networks.items():
            network.load_state_dict(load_file(path / name / "model.safetensors", str(device)))
            saved = torch.load(path / name / "optimizer.pt", map_location=device, weights_only=True)
            optimizers[name].load_state_dict(saved)
        ema = load_file(path / "student" / "ema.safetensors", str(device))
        return ema, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        older = [s for s in list_steps(folder) if s < step]
        advice = f"delete it to resume from step-{older[-1]}" if older else "delete it to start afresh"
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint {path} is damaged or of another configuration ({reason}): {advice}") from error
