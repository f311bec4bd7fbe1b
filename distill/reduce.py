"""What processes tell each other, for methods that know nothing of accelerate."""

from typing import Any

import torch
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a detached tensor over all processes; itself when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in any process, which all learn alike; no wait for the device when there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)


def of_all_processes(value: Any) -> list[Any]:
    """``value`` of each process, in their order; tensors in it are on the CPU."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
