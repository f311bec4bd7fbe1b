"""Random numbers that depend on what they are for, not on who draws them.

Row i of a batch has its own generator, so picture i is the same whatever the batch size, the number of processes or
the device, and a training step can be repeated from its number alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """One seed in 0 .. 2^63 - 1 from several non-negative numbers (SplitMix64 finaliser over each in turn)."""
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 + part) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Draws:
    """Noise for a batch: one generator a row, seeded by ``seeds``; drawn on the CPU, returned on ``device``."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators]).to(self.device)

    def uniform(self) -> Tensor:
        """(B,) float32 in [0, 1)."""
        return torch.stack([torch.rand((), generator=g) for g in self._generators]).to(self.device)
