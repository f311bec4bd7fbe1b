"""What the rest of the project knows of a checkpoint beside its denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError
from models.process import Process
from models.student import OneStepStudent
from models.trigflow import TrigFlowView


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

    def save(self, folder: Path, network: nn.Module, card: str, /) -> None:
        """Write ``network`` as a folder that stock diffusers loads, with ``card`` as its README.md."""
        ...


class ClassSpec(ABC):
    """Of a network that is asked for classes; one without a condition is asked for its only class.

    sigma_init:    noise level that a student starts at; None for a teacher
    sigma_data:    standard deviation of x0 that the network's preconditioning assumes
    student_of_class:  with several students, the number of each class's own; None for one
    class_names:   in the order of their ids
    """

    num_classes: int
    class_names: list[str]
    sigma_data: float
    sigma_init: float | None
    student_of_class: list[int] | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def student(self) -> bool:
        return self.sigma_init is not None

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

    @abstractmethod
    def beginning(self, process: Process) -> tuple[float, bool]:
        """A student's time of its first step, and whether it sees unit noise there; ValueError for a teacher."""

    def one_step(self, denoiser: Denoiser) -> OneStepStudent:
        """The student whose network is in ``denoiser``."""
        time, unit = self.beginning(denoiser.process)
        return OneStepStudent(denoiser, time, unit_noise=unit)

    @abstractmethod
    def begun(self, process: Process, sigma_init: float) -> Self:
        """That of a student of distribution matching, which starts at noise level ``sigma_init`` if it may choose."""

    @abstractmethod
    def begun_flow(self, view: TrigFlowView, guidance: float) -> Self:
        """That of a student which was trained as ``view``."""

    def later(self, steps: int) -> tuple[float, ...]:
        """Times of a student's second to last of ``steps`` steps; UserError where it makes one alone."""
        if steps > 1:
            raise UserError(f"method.student_steps: {steps}, but students of this teacher make one step")
        return ()


class TextSpec(ABC):
    """Of a network that is asked for prompts.

    shape:       (C, H, W) of the latents
    times:       a student's step times in its own process, falling; n steps use the first n of them. None for a teacher
    guidance:    scale that a student is asked for unless told otherwise
    examples:    prompts of sample grids
    control:     (n, 1, H, W) lines of the examples, for a network with a control branch
    guidable:    whether there is an unconditional answer, hence classifier-free guidance
    tellable:    whether a student of it can be told a guidance scale
    """

    shape: tuple[int, int, int]
    times: tuple[float, ...] | None
    guidance: float
    examples: tuple[str, ...]
    control: Tensor | None = None
    guidable: bool = True
    tellable: bool = False

    @property
    def student(self) -> bool:
        return self.times is not None

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

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its frozen networks are, and its conditions."""

    @abstractmethod
    def text(self, prompts: Sequence[str], guidance: float | None = None) -> Condition:
        """Conditions (B,) of prompts, with their null; ``guidance`` for networks that are told the scale."""

    @abstractmethod
    def beginning(self, process: Process) -> tuple[float, bool]:
        """A student's time of its first step, and whether it sees unit noise there; ValueError for a teacher."""

    def one_step(self, denoiser: Denoiser) -> OneStepStudent:
        """The student whose network is in ``denoiser``, in the process that its ``times`` are of."""
        time, unit = self.beginning(denoiser.process)
        return OneStepStudent(denoiser, time, unit_noise=unit)

    @abstractmethod
    def begun(self, process: Process, sigma_init: float) -> Self:
        """That of a student of distribution matching."""

    @abstractmethod
    def begun_flow(self, view: TrigFlowView, guidance: float) -> Self:
        """That of a student which was trained as ``view`` and is asked for ``guidance`` unless told otherwise."""

    def later(self, steps: int) -> tuple[float, ...]:
        """Times of a student's second to last of ``steps`` steps; UserError if it has fewer."""
        if steps > len(self.times or ()):
            raise UserError(f"method.student_steps: {steps}, but this student has times for {len(self.times or ())}")
        return (self.times or ())[1:steps]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of ``prompt`` that the tokenizer does not know; most spell out every word."""
        return []
