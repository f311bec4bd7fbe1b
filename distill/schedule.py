"""The learning-rate schedule, a pure function of the step."""

import math

from distill.settings import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to ``settings.final`` times the peak at the last of ``steps``."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    progress = max(0.0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    decay = settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * warmup * decay
