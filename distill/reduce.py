"""Sums over processes, for methods that know nothing of accelerate."""

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
