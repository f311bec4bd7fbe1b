"""``train.mixed_precision: auto``: bf16 where the machine computes in it, else none.

A CPU without instructions for bf16 imitates it: there a transformer's training step takes ten times as long.
"""

import platform

import torch
from accelerate.utils import AutocastKwargs

from distill.settings import Config

AUTOCAST = AutocastKwargs(cache_enabled=False)
"""Weights are cast at each use. Kept casts would be those of a network's first run within a turn: where that run needs
no gradients (a student's earlier steps), the sharded weights of later runs would get none."""


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether ``device`` multiplies bf16 matrices in hardware, and what it was told by."""
    if device.type == "cuda":
        found = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, f"{torch.cuda.get_device_name(device)} has {'' if found else 'no '}bf16"
    if device.type != "cpu":
        return False, f"bf16 on {device.type} is not known to be fast"
    # oneDNN knows what it was restricted to (ONEDNN_MAX_CPU_ISA), but takes AVX512 without bf16 for enough.
    allowed = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return allowed, f"oneDNN {'has' if allowed else 'has no'} bf16 for this CPU"
    found = allowed and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return found, f"this CPU has {'' if found else 'no '}AVX512-bf16 or AMX"


def resolved(config: Config, device: torch.device, before: str | None = None) -> tuple[Config, str]:
    """``config`` with a precision in the place of ``auto``, and why; ``before`` is that of the run that is resumed."""
    if config.train.mixed_precision != "auto":
        return config, "as set"
    if before in ("no", "bf16"):
        chosen, reason = before, "as this run was started"
    else:
        found, reason = native_bf16(device)
        chosen = "bf16" if found else "no"
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": chosen})}), reason
