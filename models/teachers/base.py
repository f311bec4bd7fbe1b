"""What the rest of the project knows of a checkpoint beside its denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self, overload

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError
from models.process import Process
from models.student import OneStepStudent
from models.trigflow import TrigFlowView

EXAMPLE = "a photo of a red apple on a wooden table"
"""Prompt of a folder that brings none."""


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

    def to(self, device: torch.device | str, /) -> Self:
        """The same with its frozen networks on ``device``."""
        ...

    def parts(self) -> list[nn.Module]:
        """Its frozen networks."""
        ...

    def save(self, folder: Path, network: nn.Module, card: str, /) -> None:
        """Write ``network`` as a folder that stock diffusers loads, with ``card`` as its README.md."""
        ...


class Texts:
    """Conditions of known prompts alone, for those whose text encoders are gone. ``get`` has them by their numbers."""

    def __init__(self, prompts: Sequence[str], get: Callable[[list[int]], Condition]):
        self.number, self.get = {prompt: i for i, prompt in enumerate(prompts)}, get

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """(B,) with their null; ValueError for a prompt that is not among them."""
        if unknown := [prompt for prompt in prompts if prompt not in self.number]:
            raise ValueError(f"the text encoders are gone, and no embedding is kept of the prompt '{unknown[0]}'")
        return self.get([self.number[prompt] for prompt in prompts])


class StepTimes(Sequence[float]):
    """Step times of a student of 1 to ``len`` steps: ``times[:n]`` are those of n steps, falling, ``times[0]`` the
    first of any number.

    Stock schedulers spread the steps of each number anew: the times of n steps need not begin those of n + 1. ``rows``
    has the times of one step, of two, and so on.
    """

    def __init__(self, rows: Sequence[Sequence[float]]):
        self.rows = tuple(tuple(map(float, row)) for row in rows)
        if not self.rows or [len(row) for row in self.rows] != list(range(1, len(self.rows) + 1)):
            raise ValueError(f"step times of 1, 2, ... steps, not {self.rows}")

    @classmethod
    def read(cls, times: Sequence[float] | Sequence[Sequence[float]]) -> "StepTimes":
        """As studio.json has them: rows, or one row whose first n are those of n steps."""
        if isinstance(times[0], Sequence):
            return cls(times)  # type: ignore[arg-type]
        return cls([times[:count] for count in range(1, len(times) + 1)])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...

    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        if isinstance(index, int):
            return self.rows[-1][index]
        if index.start is not None or index.step is not None:
            raise ValueError("times[:n] alone: the times of n steps")
        count = len(range(*index.indices(len(self))))
        return self.rows[count - 1] if count else ()


def later_times(times: Sequence[float], steps: int) -> tuple[float, ...]:
    """The second to last of ``steps`` step times; UserError if there are fewer."""
    if steps > len(times):
        raise UserError(f"method.student_steps: {steps}, but this student has times for {len(times)}")
    return tuple(times[:steps])[1:]


class NetworkSpec(ABC):
    """What :class:`Spec` says, and how a student of such a network begins.

    shape:  (C, H, W) of x0
    """

    shape: tuple[int, int, int]

    @property
    @abstractmethod
    def student(self) -> bool: ...

    @property
    @abstractmethod
    def picture(self) -> tuple[int, int, int]: ...

    @property
    @abstractmethod
    def summary(self) -> str: ...

    @property
    @abstractmethod
    def usage(self) -> str: ...

    @abstractmethod
    def encode(self, pictures: Tensor, /) -> Tensor: ...

    @abstractmethod
    def decode(self, x0: Tensor, /) -> Tensor: ...

    @abstractmethod
    def preview(self, count: int, /) -> Condition: ...

    @abstractmethod
    def to(self, device: torch.device | str, /) -> Self: ...

    @abstractmethod
    def save(self, folder: Path, network: nn.Module, card: str, /) -> None: ...

    def parts(self) -> list[nn.Module]:
        return []

    @abstractmethod
    def beginning(self, process: Process) -> tuple[float, bool]:
        """A student's time of its first step, and whether it sees unit noise there; ValueError for a teacher."""

    def one_step(self, denoiser: Denoiser) -> OneStepStudent:
        """The student whose network is in ``denoiser``, in the process that its step times are of."""
        time, unit = self.beginning(denoiser.process)
        return OneStepStudent(denoiser, time, unit_noise=unit)

    @abstractmethod
    def begun(self, process: Process, sigma_init: float) -> Self:
        """That of a student of distribution matching, which starts at noise level ``sigma_init`` if it may choose."""

    @abstractmethod
    def begun_flow(self, view: TrigFlowView, guidance: float) -> Self:
        """That of a student which was trained as ``view``, asked for ``guidance`` unless told otherwise."""


class ClassSpec(NetworkSpec):
    """Of a network that is asked for classes; one without a condition is asked for its only class.

    student_of_class:  with several students, the number of each class's own; None for one
    class_names:   in the order of their ids
    """

    num_classes: int
    class_names: list[str]
    student_of_class: list[int] | None = None

    def later(self, steps: int) -> tuple[float, ...]:
        """Times of a student's second to last of ``steps`` steps; UserError where it makes one alone."""
        if steps > 1:
            raise UserError(f"method.student_steps: {steps}, but students of this teacher make one step")
        return ()


class TextSpec(NetworkSpec):
    """Of a network that is asked for prompts.

    shape:       (C, H, W) of the latents
    times:       a student's step times in its own process: ``times[:n]``, falling, are those of n steps. None for a
                 teacher
    guidance:    scale that a student is asked for unless told otherwise
    examples:    prompts of sample grids
    control:     (n, 1, H, W) lines of the examples, for a network with a control branch
    guidable:    whether there is an unconditional answer, hence classifier-free guidance
    unguided:    by which fact there is none
    tellable:    whether a student of it can be told a guidance scale
    texts:       the prompts that it still knows when its text encoders are gone; None: they are there
    """

    times: Sequence[float] | None
    guidance: float
    examples: tuple[str, ...]
    control: Tensor | None = None
    guidable: bool = True
    unguided: str = ""
    tellable: bool = False
    texts: Texts | None = None

    @property
    def student(self) -> bool:
        return self.times is not None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its frozen networks are, and its conditions."""

    @abstractmethod
    def text(self, prompts: Sequence[str], guidance: float | None = None) -> Condition:
        """Conditions (B,) of prompts, with their null; ``guidance`` for networks that are told the scale."""

    @abstractmethod
    def without_encoders(self, texts: Texts, pictures: bool) -> Self:
        """The same without its text encoders, which ``texts`` stand in for, and, if ``pictures``, without the
        autoencoder's encoder: their memory is free once nobody holds this one. ``save`` reads them again."""

    def later(self, steps: int) -> tuple[float, ...]:
        """Times of a student's second to last of ``steps`` steps; UserError if it has fewer."""
        return later_times(self.times or (), steps)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of ``prompt`` that the tokenizer does not know; most spell out every word."""
        return []
