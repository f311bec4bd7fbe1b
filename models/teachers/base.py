"""What the rest of the project knows of a checkpoint beside its denoiser."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.condition import Condition


class Spec(Protocol):
    """How a checkpoint is asked, how its x0 becomes pictures, and how its like is saved.

    shape:    (C, H, W) of x0: pixels, or latents of an autoencoder
    picture:  (C, H, W) of a picture
    student:  whether it is a one-step student rather than a denoiser
    summary:  what it makes, for its model card
    usage:    Python that makes a picture with stock diffusers, for its model card
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def picture(self) -> tuple[int, int, int]: ...

    @property
    def student(self) -> bool: ...

    @property
    def summary(self) -> str: ...

    @property
    def usage(self) -> str: ...

    def encode(self, pictures: Tensor, /) -> Tensor:
        """Pictures (B, *picture) in [-1, 1] to x0 (B, *shape)."""
        ...

    def decode(self, x0: Tensor, /) -> Tensor:
        """x0 to pictures, not clamped."""
        ...

    def preview(self, count: int, /) -> Condition:
        """Conditions of a sample grid, (count,), the same ones at every call."""
        ...

    def to(self, device: torch.device | str, /) -> "Spec":
        """The same with its frozen networks on ``device``."""
        ...

    def save(self, folder: Path, network: nn.Module, card: str, /) -> None:
        """Write ``network`` as a folder that stock diffusers loads, with ``card`` as its README.md."""
        ...
