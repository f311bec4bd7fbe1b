"""Prompts of the solids world with the pictures that answer them: what students are scored with."""

from collections.abc import Sequence

from torch import Tensor

from eval.features import quantize
from models.scene.captions import Metadata
from models.scene.solids import render, sample_scene

HELD_OUT = 1 << 40
"""First seed of the scenes that nothing is trained on; training counts from 0."""


def true_renders(asked: Sequence[Metadata], seed: int = HELD_OUT, size: int = 64) -> Tensor:
    """uint8 (B, 3, size, size): scenes of these prompts, picture i from ``seed + i``."""
    return quantize(render([sample_scene(seed + i, wanted) for i, wanted in enumerate(asked)], size).images)
