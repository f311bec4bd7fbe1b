"""Checkpoints that are atomic, complete and named by network.

``checkpoints/step-N/{student,critic,discriminator}/{model.safetensors, optimizer.pt}``, the moving average in
``step-N/student/ema.safetensors``, everything else (step, data position, log sums, ratio averages) in
``step-N/state.pt``. Sharded networks have a file of each process instead, ``model-00000-of-00002.safetensors``; any
number of processes reads them.

Frozen networks are never written. ``.pt`` files hold tensors and plain containers and are read with ``weights_only``.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from models.errors import UserError
from models.folders import partial_folder, replace_folder


def list_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, ascending."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def newest(folder: Path, network: str) -> dict[str, Tensor] | None:
    """Weights of one network in the newest checkpoint of a run; None if there are none."""
    steps = list_steps(folder)
    path = folder / f"step-{steps[-1]}" / network / "model" if steps else None
    return _read(path) if path and path.parent.is_dir() else None


# -------------------------------------------------------------------------------------------- tensors of a network


def _write(stem: Path, tensors: Mapping[str, Tensor], rank: int, world: int) -> None:
    """Whole tensors by the first process, parts of the divided ones by each."""
    parts = {name: value.to_local() for name, value in tensors.items() if isinstance(value, DTensor)}
    whole = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)} if rank == 0 else {}
    if parts or rank == 0:
        name = f"{stem.name}-{rank:05d}-of-{world:05d}" if parts else stem.name
        contents = {key: value.detach().contiguous() for key, value in (parts | whole).items()}
        save_file(contents, stem.with_name(f"{name}.safetensors"))


def _files(stem: Path, suffix: str) -> list[Path]:
    """The files of all processes, in order; ValueError if some are missing."""
    files = sorted(stem.parent.glob(f"{stem.name}-*-of-*{suffix}"))
    if files and len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError(f"{stem}: {len(files)} files of {files[0].stem.rpartition('-')[2]}")
    return files


def _read(stem: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Whole tensors, whatever the number of processes that wrote them."""
    files = _files(stem, ".safetensors")
    if not files:
        return load_file(stem.with_name(f"{stem.name}.safetensors"), device)
    parts: dict[str, list[Tensor]] = {}
    for path in files:
        with safe_open(path, "pt", device) as file:
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}


def _like(value: Tensor, own: Tensor) -> Tensor:
    """``value`` divided over the processes as ``own`` is."""
    if isinstance(own, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def _load_network(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = network.state_dict()
    network.load_state_dict({name: _like(v, own[name]) if name in own else v for name, v in tensors.items()})


# -------------------------------------------------------------------------------------------- states of optimizers


def _moments(optimizer: Optimizer, state: dict[str, Any], change: Callable[[Any, Tensor], Any]) -> dict[str, Any]:
    """An optimizer's state with ``change(value, parameter)`` of all that has a parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {key: value if key == "step" else change(value, parameters[index]) for key, value in inner.items()}
        for index, inner in state["state"].items()
    }
    return state | {"state": states}


def _read_optimizer(stem: Path, optimizer: Optimizer, device: torch.device) -> dict[str, Any]:
    read = lambda path: torch.load(path, map_location=device, weights_only=True)
    files = _files(stem, ".pt")
    if not files:
        state = read(stem.with_name(f"{stem.name}.pt"))
    else:
        states = [read(path) for path in files]
        joined = {
            index: {
                key: value if key == "step" else torch.cat([other["state"][index][key] for other in states])
                for key, value in inner.items()
            }
            for index, inner in states[0]["state"].items()
        }
        state = states[0] | {"state": joined}
    return _moments(optimizer, state, lambda value, own: _like(value, own) if isinstance(value, Tensor) else value)


# ------------------------------------------------------------------------------------------------------ checkpoints


def save(
    folder: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    ema: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write ``folder/step-N`` through a temporary folder, then remove all but the ``keep`` newest; first of all, what a
    killed run left half written.

    All processes call it, on one file system; those behind the first write their parts of sharded networks alone.
    """
    path = folder / f"step-{step}"
    wait = torch.distributed.barrier if world > 1 else lambda: None
    for leftover in folder.glob(".step-*") if rank == 0 else ():
        shutil.rmtree(leftover, ignore_errors=True)
    with replace_folder(path) if rank == 0 else nullcontext(partial_folder(path)) as temporary:
        for name in networks if rank == 0 else ():
            (temporary / name).mkdir()
        wait()
        for name, network in networks.items():
            _write(temporary / name / "model", network.state_dict(), rank, world)
            local = lambda value, _own: value.to_local() if isinstance(value, DTensor) else value
            moments = _moments(optimizers[name], optimizers[name].state_dict(), local)
            divided = any(isinstance(parameter, DTensor) for parameter in network.parameters())
            if divided:
                torch.save(moments, temporary / name / f"optimizer-{rank:05d}-of-{world:05d}.pt")
            elif rank == 0:
                torch.save(moments, temporary / name / "optimizer.pt")
        _write(temporary / "student" / "ema", ema, rank, world)
        if rank == 0:
            torch.save(state, temporary / "state.pt")
        wait()
    wait()
    if rank == 0:
        for old in list_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")


def load(
    folder: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load ``folder/step-N`` into networks and optimizers; returns the moving average and the rest of the state.

    UserError if it is damaged or of other networks; nothing on disk is changed.
    """
    path = folder / f"step-{step}"
    if device.type == "cpu":
        device = torch.device("cpu")  # processes that share a CPU are on cpu:0, cpu:1, ..., which no file knows
    try:
        for name, network in networks.items():
            _load_network(network, _read(path / name / "model", str(device)))
            optimizers[name].load_state_dict(_read_optimizer(path / name / "optimizer", optimizers[name], device))
        own = dict(networks["student"].named_parameters())
        ema = {name: _like(v, own[name]) for name, v in _read(path / "student" / "ema", str(device)).items()}
        return ema, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        older = [s for s in list_steps(folder) if s < step]
        advice = f"delete it to resume from step-{older[-1]}" if older else "delete it to start afresh"
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint {path} is damaged or of another configuration ({reason}): {advice}") from error
