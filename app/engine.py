"""The models behind the page: loaded when they are first asked, a few at a time, one picture after another."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from app.ask import Ask, shown, text
from app.library import Library, inside
from app.networks import Extras, Facts, Made, Model, draws_of, load
from eval.features import quantize
from models import teachers
from models.errors import UserError

EMBEDDED = ("embedded:solids_sprint", "embedded:solids_control", "embedded:solids", "embedded:fashion_mnist")


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
