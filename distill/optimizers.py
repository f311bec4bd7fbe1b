"""Optimizers, and their learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from distill.settings import Optimizer
from models.errors import UserError


def new_optimizer(network: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW over what is trained of ``network``, fused, or with moments in 8 bits; UserError without bitsandbytes."""
    betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not settings.eight_bit:
        return torch.optim.AdamW(parameters, settings.lr, betas, settings.eps, weight_decay=decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("eight_bit needs the library bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(parameters, settings.lr, betas, settings.eps, decay)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to ``settings.final`` times the peak at the last of ``steps``."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    progress = max(0.0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    decay = settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * warmup * decay


def take_step(optimizer: Any, settings: Optimizer, lr: float, bad: Tensor) -> None:
    """A step of accelerate's ``optimizer`` at ``lr``, none where ``bad`` is 1; gradients are gone afterwards."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not settings.eight_bit:
        optimizer.optimizer.found_inf = bad  # the fused kernel skips the step where this is 1
    if not settings.eight_bit or not bool(bad):  # bitsandbytes' reads no such flag, and waits for the device
        optimizer.step()
    optimizer.zero_grad()
