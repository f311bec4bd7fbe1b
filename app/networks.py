"""Loaded folders behind one face, whatever they are asked for and however many steps they make."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.ask import Ask, shown
from eval.generate import Sampler
from eval.text_to_image import Painter
from models import teachers
from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError
from models.multi_student import MultiStudent
from models.seeds import Draws
from models.teachers.base import ClassSpec, TextSpec

TEACHER_STEPS = 20
MOST_TEACHER_STEPS = 50


class Walk(Draws):
    """Noise on the way from some seeds to others: ``cos(a) first + sin(a) second`` at ``a = t pi / 2``.

    Of independent normal numbers this is standard normal at every ``t`` in [0, 1].
    """

    def __init__(self, seeds: Sequence[int], others: Sequence[int], t: float, device: torch.device | str = "cpu"):
        super().__init__(seeds, device)
        self._others, self._angle = Draws(others, device), t * math.pi / 2

    def normal(self, *shape: int) -> Tensor:
        first, second = super().normal(*shape), self._others.normal(*shape)
        return math.cos(self._angle) * first + math.sin(self._angle) * second


def draws_of(ask: Ask, device: torch.device | str = "cpu") -> Draws:
    seeds = range(ask.seed, ask.seed + ask.count)
    if ask.walk == 0:
        return Draws(seeds, device)
    return Walk(seeds, range(ask.other_seed, ask.other_seed + ask.count), ask.walk, device)


@dataclass(frozen=True)
class Facts:
    """What the page has to know of a model.

    classes:    in the order of their ids; empty where prompts are asked
    most_steps: at most this many, ``steps`` unless told otherwise
    guidance:   the scale unless told otherwise; None where there is none
    side:       height of a canvas of lines; None where none are followed
    owners:     with several students, the number of each class's own
    """

    student: bool
    classes: tuple[str, ...]
    steps: int
    most_steps: int
    guidance: float | None
    side: int | None
    examples: tuple[str, ...]
    owners: tuple[int, ...] | None
    summary: str


@dataclass(frozen=True)
class Made:
    """An answer: pictures uint8 (B, C, H, W), the seconds the model took, words it does not know, who made each."""

    pictures: Tensor
    seconds: float
    unknown: tuple[str, ...] = ()
    owners: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Extras:
    """What only some models take: lines (1, 1, H, W) to follow with a strength, and one student of several."""

    lines: Tensor | None = None
    strength: float = 1.0
    only: int | None = None


class Model(ABC):
    """A loaded folder."""

    facts: Facts

    @abstractmethod
    def sample(self, ask: Ask, words: Sequence[str], draws: Draws, extras: "Extras") -> Tensor:
        """x0 decoded to pictures (B, C, H, W), one for each of ``words``."""

    def unknown(self, _words: str) -> tuple[str, ...]:
        return ()

    def owners(self, _words: Sequence[str], _only: int | None) -> tuple[int, ...] | None:
        """Who of several students answers each of ``words``."""
        return None


class TextModel(Model):
    """A text-to-image teacher or student, perhaps with a control branch."""

    def __init__(self, denoiser: Denoiser, spec: TextSpec, device: str):
        self.painter = Painter(denoiser.to(device), spec.to(device), 1, spec.guidance)
        self.facts = Facts(
            student=spec.student,
            classes=(),
            steps=1 if spec.student else TEACHER_STEPS,
            most_steps=MOST_TEACHER_STEPS if spec.times is None else len(spec.times),
            guidance=spec.guidance if (spec.tellable if spec.student else spec.guidable) else None,
            side=None if spec.control is None else spec.picture[1],
            examples=tuple(spec.examples),
            owners=None,
            summary=spec.summary,
        )

    def sample(self, ask: Ask, words: Sequence[str], draws: Draws, extras: Extras) -> Tensor:
        lines = extras.lines
        if ask.guidance is None or self.facts.guidance is None:
            scale = self.painter.spec.guidance if self.facts.student or self.facts.guidance is not None else 1.0
        else:
            scale = ask.guidance
        painter = Painter(self.painter.denoiser, self.painter.spec, ask.steps, scale)
        cond = painter.embed(words, None if lines is None else lines.expand(len(words), -1, -1, -1))
        if self.facts.side is None:
            return painter.spec.decode(painter.latents(cond, draws))
        network: Any = painter.denoiser.network
        network.control_strength = extras.strength
        return painter.spec.decode(painter.latents(cond, draws))

    def unknown(self, words: str) -> tuple[str, ...]:
        return tuple(self.painter.spec.unknown_words(words))


class ClassModel(Model):
    """A class-conditional teacher, student, or folder of several students."""

    def __init__(self, folder: Path, denoiser: Denoiser, spec: ClassSpec, device: str):
        self.device, self.spec = device, spec
        self.denoiser, self.several = denoiser.to(device), None
        if spec.student_of_class is not None:
            self.several = MultiStudent(folder, device=device)
        self.facts = Facts(
            student=spec.student,
            classes=tuple(spec.class_names),
            steps=1 if spec.student else TEACHER_STEPS,
            most_steps=_most_steps(spec) if spec.student else MOST_TEACHER_STEPS,
            guidance=None,
            side=None,
            examples=tuple(spec.class_names),
            owners=None if spec.student_of_class is None else tuple(spec.student_of_class),
            summary=spec.summary,
        )

    def _ids(self, words: Sequence[str]) -> list[int]:
        known = {name.lower(): index for index, name in enumerate(self.facts.classes)}
        missing = [word for word in words if word.lower() not in known]
        if missing:
            raise UserError(
                f"prompt: this model knows classes, and '{shown(missing[0])}' is none: {', '.join(self.facts.classes)}"
            )
        return [known[word.lower()] for word in words]

    def sample(self, ask: Ask, words: Sequence[str], draws: Draws, extras: Extras) -> Tensor:
        cond = Condition(class_ids=torch.tensor(self._ids(words), device=self.device))
        z, noise = draws.normal(*self.spec.shape), lambda: draws.normal(*self.spec.shape)
        return self.spec.decode(self._sampler(ask.steps, extras.only).function(z, cond, noise))

    def _sampler(self, steps: int, only: int | None) -> Sampler:
        if self.several is not None:
            several = self.several
            if only is not None:
                return Sampler.student(several.student(only))
            return Sampler("several", 1, lambda z, cond, _noise: several.generate(z, cond))
        if not self.spec.student:
            return Sampler.teacher(self.denoiser, steps)
        return Sampler.student(self.spec.one_step(self.denoiser), self.spec.later(steps))

    def owners(self, words: Sequence[str], only: int | None) -> tuple[int, ...] | None:
        if self.facts.owners is None:
            return None
        if only is not None:
            return (only,) * len(words)
        return tuple(self.facts.owners[i] for i in self._ids(words))


def _most_steps(spec: ClassSpec) -> int:
    """How many of four steps a student has times for."""
    for steps in (4, 3, 2):
        with suppress(UserError):
            spec.later(steps)
            return steps
    return 1


def load(folder: Path, device: str) -> Model:
    """The one place that tells the kinds of folders apart. UserError if it cannot be read."""
    try:
        denoiser, spec = teachers.load(folder)
        if isinstance(spec, ClassSpec):
            return ClassModel(folder, denoiser, spec, device)
        return TextModel(denoiser, spec, device)
    except (RuntimeError, IndexError, AttributeError) as error:  # what damaged weights and settings raise
        raise UserError(f"model: {folder.name} cannot be read: {shown(error)}") from error
