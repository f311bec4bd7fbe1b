"""Pictures from prompts: a text-to-image teacher or student as one callable, with its parts apart for measuring.

python -m eval.text_to_image embedded:solids_sprint "a photo of a red cube" --steps 1 --seeds 0 1 2 3
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from eval.features import quantize, weights_digest
from eval.machine import place_of
from models import teachers
from models.condition import Condition
from models.controlnet import NOTHING, edges
from models.denoiser import Denoiser, Guided
from models.errors import BadSample, UserError, run_command
from models.pictures import decode
from models.seeds import Draws
from models.student import heun
from models.teachers.base import TextSpec


@dataclass(frozen=True)
class Painter:
    """A network with a number of steps: prompts and seeds to pictures.

    ``guidance`` is the teacher's classifier-free guidance, or the scale that a student is told. Picture i depends on
    its prompt and seed alone, not on the batch.
    """

    denoiser: Denoiser
    spec: TextSpec
    steps: int
    guidance: float
    times: tuple[float, ...] | None = None
    to_uint8: Callable[[Tensor], Tensor] = quantize
    folder: Path | None = None

    @property
    def name(self) -> str:
        return f"{'student' if self.spec.student else 'teacher'}, {self.steps} step{'s' if self.steps > 1 else ''}"

    @property
    def identity(self) -> dict[str, Any]:
        """What a picture depends on beside its prompt and seed."""
        return {
            "weights_sha256": self.folder and weights_digest(self.folder),
            "steps": self.steps,
            "times": list((self.times or self.spec.times or ())[: self.steps]),
            "guidance": self.guidance,
            "bytes": self.to_uint8.__name__,
        }

    @property
    def nfe(self) -> int:
        """Network calls for a picture; with guidance each call has twice the rows."""
        return self.steps if self.spec.student else 2 * self.steps - 1

    def embed(self, prompts: Sequence[str], lines: Tensor | None = None) -> Condition:
        """Prompts to the network's conditions, by the text encoder, with ``lines`` (B, 1, H, W) for one that follows
        them; None is an empty canvas."""
        cond = self.spec.text(prompts, self.guidance if self.spec.student else None)
        if lines is None and self.spec.control is not None:
            lines = torch.full((len(prompts), 1, *self.spec.picture[1:]), NOTHING)
        return cond if lines is None else self.redrawn(cond, lines)

    def redrawn(self, cond: Condition, lines: Tensor) -> Condition:
        """``cond`` with other lines (B, 1, H, W); UserError for a network that follows none."""
        if self.spec.control is None:
            raise UserError(f"{self.name}: it has no control branch, so it follows no lines")
        return replace(cond, control=lines.to(self.spec.device))

    @torch.no_grad()
    def latents(self, cond: Condition, draws: Draws) -> Tensor:
        """Conditions (B) to latents (B, C, h, w)."""
        z = draws.normal(*self.spec.shape)
        if not self.spec.student:
            if self.guidance != 1 and not self.spec.guidable:
                raise UserError(
                    f"guidance: {self.guidance:g}, but this teacher is distilled ({self.spec.unguided}): give 1"
                )
            return heun(Guided(self.denoiser, self.guidance), z, cond, self.steps)
        times = self.times or self.spec.times
        assert times is not None
        if len(times) < self.steps:
            raise UserError(f"steps: this student has times for 1 to {len(times)} steps, not {self.steps}")
        student = self.spec.one_step(self.denoiser)
        student.t_init = times[0]
        return student.generate(z, cond, times[: self.steps][1:], lambda: draws.normal(*self.spec.shape))

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], lines: Tensor | None = None) -> Tensor:
        """uint8 pictures (B, 3, H, W) on the CPU; UserError where they are not finite."""
        pictures = self.spec.decode(self.latents(self.embed(prompts, lines), Draws(seeds, self.spec.device)))
        if not bool(pictures.isfinite().all()):
            raise UserError(f"{self.name}: some pictures are not finite: damaged weights, or a training that diverged")
        return self.to_uint8(pictures).cpu()

    def with_times(self, times: Sequence[float]) -> "Painter":
        """The same student in ``len(times)`` steps at these TrigFlow times."""
        return replace(self, times=tuple(times), steps=len(times))


def painter(
    path: str | Path, steps: int, guidance: float | None = None, device: torch.device | str | None = "cpu"
) -> Painter:
    """The student or teacher in ``path``: a folder, a run folder, or embedded:NAME.

    ``guidance`` None is the student's own default, or 1 for a teacher; ``device`` None is cuda if there is one.
    UserError if it is not asked for prompts.
    """
    run = Path(path) / "student"
    folder = run if (run / "model_index.json").is_file() else teachers.resolve(str(path))
    denoiser, spec = teachers.load(folder)
    if not isinstance(spec, TextSpec):
        raise UserError(f"{path} is asked for classes, not for prompts")
    if steps < 1:
        raise UserError(f"steps: {steps} must be at least 1")
    scale = guidance if guidance is not None else spec.guidance if spec.student else 1.0
    place = place_of(device)
    return Painter(denoiser.to(place), spec.to(place), steps, scale, folder=folder)


@dataclass(frozen=True)
class Options:
    """Write a row of pictures of one prompt, one for each seed."""

    model: tyro.conf.Positional[str]
    """A run folder, an exported student or teacher, or embedded:NAME."""
    prompt: tyro.conf.Positional[str]
    """What the pictures should show."""
    steps: int = 1
    """Steps; a teacher wants 20."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Seeds of the noise, a picture each."""
    guidance: float | None = None
    """Guidance scale; default: a student's own, none for a teacher."""
    lines: Path | None = None
    """Picture whose edges a student with a control branch follows, of any size."""
    output: Path = Path("pictures.png")
    """PNG file."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def read_lines(path: Path, side: int) -> Tensor:
    """Edges (1, 1, side, side) of a picture file; UserError if it is none."""
    try:
        picture = ImageOps.fit(decode(path, "it"), (side, side), Image.Resampling.LANCZOS)
    except BadSample as error:
        raise UserError(f"--lines: {path} cannot be read as a picture: {error}") from error
    return edges(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1)


def main(options: Options) -> None:
    if not options.seeds or min(options.seeds) < 0:
        raise UserError("--seeds: give at least one, none below 0")
    if options.output.suffix not in Image.registered_extensions():
        raise UserError(f"--output: {options.output} is no name of a picture file: end it in .png")
    made = painter(options.model, options.steps, options.guidance, options.device)
    if unknown := made.spec.unknown_words(options.prompt):
        print(f"warning: words that this model does not know: {', '.join(unknown)}", file=sys.stderr)
    lines = None
    if options.lines is not None:
        lines = read_lines(options.lines, made.spec.picture[1]).expand(len(options.seeds), -1, -1, -1)
    pictures = made([options.prompt] * len(options.seeds), options.seeds, lines)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(list(pictures), 2).permute(1, 2, 0).numpy()).save(options.output)
    print(f"{made.name}: {options.output}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
