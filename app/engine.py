"""The models behind the page: loaded when they are first asked, a few at a time, one picture after another."""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.ask import Ask, shown, text
from app.library import Library, inside
from eval.features import quantize
from eval.generate import Sampler
from eval.text_to_image import Painter
from models import teachers
from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError
from models.multi_student import MultiStudent
from models.seeds import Draws
from models.teachers.base import ClassSpec, TextSpec

EMBEDDED = ("embedded:solids_sprint", "embedded:solids_control", "embedded:solids", "embedded:fashion_mnist")
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


class Engine:
    """Models by name: the embedded ones, ``students`` that were named, and those of the library's runs.

    At most ``max_models`` are in memory; the one that was used longest ago goes first. One call runs at a time.
    UserError for a student that is not there, and for settings that a model does not take.
    """

    def __init__(
        self,
        library: Library,
        students: Sequence[str] = (),
        max_models: int = 3,
        device: str = "cpu",
        embedded_: bool = True,
    ):
        self.library, self.max_models, self.device = library, max_models, device
        self._named: dict[str, Path] = {}
        for student in students:
            folder = Path(student) / "student"
            folder = folder if (folder / "model_index.json").is_file() else teachers.resolve(student)
            if not (folder / "model_index.json").is_file():
                raise UserError(
                    f"--student: {student} is no run with a student, no exported student and no embedded:NAME"
                )
            name = student if student.startswith("embedded:") else Path(student).resolve().name
            while name in self._named:
                name += "'"
            self._named[name] = folder
        if embedded_:
            self._named |= {name: teachers.resolve(name) for name in EMBEDDED if name not in self._named}
        self._loaded: OrderedDict[str, tuple[int, Model]] = OrderedDict()
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Students that were named first, then the embedded models, then the runs'."""
        return list(self._folders())

    def _folders(self) -> dict[str, Path]:
        runs = {name: run / "student" for name, run in self.library.runs().items()}
        return self._named | {
            n: f for n, f in runs.items() if (f / "model_index.json").is_file() and n not in self._named
        }

    def folder(self, name: str) -> Path:
        folder = self._folders().get(name)
        if folder is None:
            raise UserError(f"model: there is no model '{shown(name)}' here: it was removed, or never was one")
        return folder

    def drawing(self) -> list[str]:
        """Names of the models that follow lines."""
        return [name for name, folder in self._folders().items() if (folder / "controlnet").is_dir()]

    def several(self) -> list[str]:
        """Names of the folders of several students."""
        return [name for name, folder in self._folders().items() if (folder / "student_1").is_dir()]

    def loaded(self) -> list[str]:
        return list(self._loaded)

    def facts(self, name: str) -> Facts:
        with self._lock:
            return self._get(name).facts

    def _get(self, name: str) -> Model:
        """Loaded, and again where the folder was written anew."""
        folder = self.folder(text("model", name))
        try:
            written = (folder / "model_index.json").stat().st_mtime_ns
        except OSError as error:
            raise UserError(f"model: '{shown(name)}' was removed") from error
        known = self._loaded.pop(name, None)
        if known is None or known[0] != written:
            known = None  # before the next is loaded
            while len(self._loaded) >= self.max_models:
                self._loaded.popitem(last=False)
            known = written, load(folder, self.device)
        self._loaded[name] = known
        return known[1]

    @torch.no_grad()
    def make(
        self,
        ask: Ask,
        words: Sequence[str] | None = None,
        lines: Tensor | None = None,
        strength: float = 1.0,
        only: int | None = None,
    ) -> Made:
        """``ask.count`` pictures of ``ask.prompt``, or of ``words``, one each; by student ``only`` of several.

        UserError for an empty prompt, steps the model does not make, classes it does not know, or damaged weights.
        """
        with self._lock:
            model = self._get(ask.model)
            facts = model.facts
            if not ask.prompt and words is None:
                raise UserError(
                    "prompt: it is empty" + (f"; one of {', '.join(facts.classes)}" if facts.classes else "")
                )
            if ask.steps > facts.most_steps:
                most = f"1 to {facts.most_steps} steps" if facts.most_steps > 1 else "one step"
                raise UserError(
                    f"steps: this {'student' if facts.student else 'teacher'} makes {most}, not {ask.steps}"
                )
            if lines is not None and facts.side is None:
                raise UserError(f"model: {ask.model} has no control branch, so it follows no lines")
            asked = [ask.prompt] * ask.count if words is None else list(words)
            ask = replace(ask, count=len(asked))
            start = time.perf_counter()
            pictures = model.sample(ask, asked, draws_of(ask, self.device), Extras(lines, strength, only))
            if not bool(pictures.isfinite().all()):
                raise UserError(f"model: {ask.model} makes pictures that are not finite: its weights are damaged")
            done = quantize(pictures).cpu()
            seconds = time.perf_counter() - start
            return Made(done, seconds, model.unknown(" ".join(dict.fromkeys(asked))), model.owners(asked, only))

    def card(self, name: str) -> str | None:
        """The text of a model's card."""
        folder = self.folder(name)
        path = inside(folder.resolve(), "README.md")
        return None if path is None else path.read_text(errors="replace")[:20_000]
