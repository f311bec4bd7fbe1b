"""Batches, and the protocols of what supplies them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from models.condition import Condition
from models.controlnet import edges, roughened
from models.errors import UserError
from models.seeds import Draws, mix
from models.teachers.base import ClassSpec, Spec, TextSpec

ROUGH = 0x11E5
"""Sets the random numbers of lines apart from those of a turn."""
TOLD = 0x701D
"""And those of the choice between several captions."""


@dataclass(frozen=True)
class Batch:
    """``images`` (B, C, H, W) in [-1, 1], or the x0 they are encoded to, and their conditions or captions.

    ``encoded``: they are x0 and embedded conditions, and nothing is left to be done. ``choices``: all captions of each
    picture, where one is to be told at random; ``captions`` then has one of them.
    """

    images: Tensor
    cond: Condition
    captions: tuple[str, ...] = ()
    encoded: bool = False
    choices: tuple[tuple[str, ...], ...] = ()

    def checked(self, spec: Spec) -> "Batch":
        """Itself; UserError if there is a class that ``spec`` does not know. For batches on the CPU."""
        if isinstance(spec, ClassSpec) and self.cond.class_ids is not None:
            last = int(self.cond.class_ids.max())
            if last >= spec.num_classes:
                raise UserError(f"data: a picture of class {last}, but the network knows 0 to {spec.num_classes - 1}")
        return self

    def to(self, device: torch.device) -> "Batch":
        return replace(self, images=self.images.to(device, non_blocking=True), cond=self.cond.to(device))

    def through(self, spec: Spec, seeds: Sequence[int]) -> "Batch":
        """As the teacher sees it: pictures encoded, captions embedded, and, if it follows them, lines as a hand draws
        them; which hand, and which of several captions, ``seeds`` (one a picture) say."""
        if self.encoded:
            return self
        told = self.captions
        if self.choices:
            told = tuple(c[mix(seed, TOLD) % len(c)] for c, seed in zip(self.choices, seeds, strict=True))
        cond = spec.text(told) if isinstance(spec, TextSpec) else self.cond
        if isinstance(spec, TextSpec) and spec.control is not None:
            draws = Draws([mix(seed, ROUGH) for seed in seeds], self.images.device)
            cond = replace(cond, control=roughened(edges(self.images), draws))
        return Batch(spec.encode(self.images), cond, encoded=True)


class Pictures(Protocol):
    """A set of pictures that can be indexed. ``shape`` is (C, H, W); ``class_names`` in the order of their ids.

    ``labels`` (N,) are the class ids of all.
    """

    shape: tuple[int, int, int]
    class_names: list[str]

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def get(self, indices: list[int]) -> Batch: ...


class Stream(Protocol):
    """An endless supply of batches whose position can be saved."""

    def next(self) -> Batch: ...

    def resize(self, size: int) -> None:
        """Batches of ``size`` from now on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a process of this place in a run of as many was."""
        ...

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Go on where all processes of a run were, whose number may have been another."""
        ...


class Subset:
    """The pictures of some classes; names and ids stay."""

    def __init__(self, pictures: Pictures, classes: list[int]):
        self.pictures, self.shape, self.class_names = pictures, pictures.shape, pictures.class_names
        self.indices = torch.isin(pictures.labels, torch.tensor(classes)).nonzero().squeeze(1)
        if len(self.indices) == 0:
            raise UserError(f"classes: no picture is of {classes}; there are classes 0 to {len(self.class_names) - 1}")

    @property
    def labels(self) -> Tensor:
        return self.pictures.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, indices: list[int]) -> Batch:
        return self.pictures.get(self.indices[indices].tolist())
