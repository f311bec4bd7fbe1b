"""What every evaluator's command asks of the machine: its device, its share of the work, and where reports go."""

import os
import platform
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import diffusers
import torch

from models.errors import UserError
from models.teachers import PRETRAINED


def share() -> tuple[int, int]:
    """This process and the number of them, as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def place_of(device: torch.device | str | None) -> torch.device:
    """The device of that name; None: cuda if there is one, else cpu. Of several processes each has a GPU of its own.

    UserError for a device that is not here.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device} is not available here: leave --device out, or give cpu") from error
    return place


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": f"{device} ({hardware})",
        "threads": torch.get_num_threads(),
    }


def home_of(model: str | Path) -> Path:
    """Where reports of a model go: its own folder, or report/NAME for one that came with the project."""
    name = str(model)
    if name.startswith("embedded:"):
        return Path("report") / name.removeprefix("embedded:")
    folder = Path(model).resolve()
    return Path("report") / folder.name if folder.parent == PRETRAINED.resolve() else Path(model)


def refuse_unread(options: Any, names: Iterable[str], where: str) -> None:
    """UserError for the first of ``names`` that was set, since ``where`` nothing reads it."""
    defaults = {field.name: field.default for field in fields(options) if field.default is not MISSING}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')}: {where} it says nothing; leave it out")
