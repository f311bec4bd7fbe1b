"""Find a few-step student's step times by greedy search on a metric (SANA-Sprint, arXiv 2503.09641, Table 7).

    python -m eval.timesteps --student runs/solids/sprint

The best time of the first step, then with it the best of the second, and so on: the first n of the times found serve n
steps. They are written into the student's studio.json, since SCMScheduler's configuration has no place for them, and
into the example of its model card.

Judged on the solids world, by prompts of another seed than the evaluation's and without those kept back for it. The
small tasks have so few captions that theirs recur.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from eval.features import extract
from eval.frechet import frechet_distance
from eval.geneval import judge
from eval.geneval.solids import OPTIONS, SIDE, SolidsDetector, SolidsFeatures, colour_of
from eval.reference import load_reference
from eval.text_to_image import Painter, painter
from models.errors import UserError, run_command
from models.folders import replace_text
from models.scene.captions import EVALUATION, held_out, prompts
from models.teachers.sana import SanaSpec
from models.trigflow import TrigFlowView

Metric = Callable[[Sequence[float]], float]

FIRST_RATIOS = (20.0, 40.0, 80.0, 200.0, math.inf)
"""sigma / alpha of the first step's candidates; infinite: the last time that the network knows."""
SPACING = 0.1
"""Radians between the candidates of later steps."""


@dataclass(frozen=True)
class Options:
    """Search the step times of a student of the solids world."""

    student: Path
    """A run folder, or an exported student."""
    steps: int = 4
    """Steps to find times for."""
    num_images: int = 240
    """Pictures that each candidate is judged on, the same prompts and noise for all."""
    seed: int = 1
    """Seed of the prompts and of the noise; not the evaluation's."""
    metric: str = "score"
    """score: share of right pictures, equal ones ordered by distance; fd_solids: distance from true renders."""
    batch: int = 120
    """Pictures at a time."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


@dataclass(frozen=True)
class Trial:
    """One candidate: times of all its steps, and what the metric said (higher is better)."""

    times: tuple[float, ...]
    value: float


def search(metric: Metric, steps: int, first: Sequence[float], last: float = 0.1) -> tuple[list[float], list[Trial]]:
    """Times of ``steps`` steps that raise ``metric``, and every trial.

    ``first`` are candidates of the first step; those of later ones lie :data:`SPACING` apart between ``last`` and the
    step before, and half as far apart around the best of them.
    """
    found: list[float] = []
    trials: list[Trial] = []
    known: dict[tuple[float, ...], float] = {}

    def best(candidates: Sequence[float]) -> float:
        for time in candidates:
            times = (*found, time)
            if times not in known:
                known[times] = metric(times)
                trials.append(Trial(times, known[times]))
        return max(candidates, key=lambda time: known[(*found, time)])

    found.append(best(first))
    while len(found) < steps:
        highest = found[-1] - SPACING / 2
        count = math.floor((highest - last) / SPACING + 1e-9) + 1
        if count < 1:
            raise UserError(f"--steps: there is no room for step {len(found) + 1} below time {found[-1]:.3f}")
        coarse = [last + SPACING * i for i in range(count)]
        centre = best(coarse)
        near = [t for t in (centre - SPACING / 2, centre, centre + SPACING / 2) if last <= t < found[-1]]
        found.append(best(near))
    return found, trials


def solids_metric(student: Painter, options: Options) -> Metric:
    """Share of right pictures minus a thousandth of the distance, or minus the distance."""
    if options.metric not in ("score", "fd_solids"):
        raise UserError(f"--metric: '{options.metric}' is none of score, fd_solids")
    if options.seed == EVALUATION:
        raise UserError(f"--seed: {EVALUATION} is the evaluation's own; choose another")
    asked = prompts(options.seed, options.num_images, held_out())
    detector, features = SolidsDetector(device=student.spec.device), SolidsFeatures(device=student.spec.device)
    reference = load_reference(features.name).statistics
    base = (1 << 32) * options.seed

    def metric(times: Sequence[float]) -> float:
        sampler, right, made = student.with_times(times), 0, []
        for start in range(0, len(asked), options.batch):
            part = asked[start : start + options.batch]
            images = sampler([m["prompt"] for m in part], range(base + start, base + start + len(part)))
            for found, wanted in zip(detector(images), part, strict=True):
                right += judge(found, wanted, OPTIONS, colour_of)[0]
            made.append(images)
        distance = frechet_distance(extract(features, made), reference)
        value = right / len(asked) - 1e-3 * distance if options.metric == "score" else -distance
        print(f"{', '.join(f'{t:.4f}' for t in times):<36} score {right / len(asked):.3f}  fd_solids {distance:.3f}")
        return value

    return metric


def write_times(folder: Path, student: Painter, times: Sequence[float]) -> None:
    """Into studio.json and, where the model card holds this student's example, into that."""
    studio = json.loads((folder / "studio.json").read_text())
    assert isinstance(student.spec, SanaSpec)
    card, spec = folder / "README.md", replace(student.spec, times=tuple(times))
    if card.is_file():
        replace_text(card, card.read_text().replace(student.spec.usage, spec.usage))
    replace_text(folder / "studio.json", json.dumps(studio | {"times": list(times)}, indent=2) + "\n")


def main(options: Options) -> None:
    if min(options.steps, options.batch) < 1 or options.num_images < 12:
        raise UserError(
            f"--steps ({options.steps}) and --batch ({options.batch}) must be at least 1, --num-images "
            f"({options.num_images}) 12"
        )
    if not options.student.is_dir():
        raise UserError(f"--student: {options.student} is no folder to write step times into")
    student = painter(options.student, 1, device=options.device)
    if not student.spec.student:
        raise UserError(f"--student: {options.student} is a teacher, which has no step times")
    if not isinstance(student.spec, SanaSpec):
        raise UserError(f"--student: {options.student} has the step times of its stock scheduler")
    if student.spec.picture[0] != 3 or student.spec.picture[1] % SIDE:
        raise UserError(f"--student: {options.student} makes {student.spec.picture}, not pictures of the solids world")
    sigma_data = student.spec.sigma_data
    latest = TrigFlowView(student.denoiser, sigma_data, sigma_data).process.t_max
    first = sorted({min(math.atan(ratio / sigma_data), latest) for ratio in FIRST_RATIOS})
    times, trials = search(solids_metric(student, options), options.steps, first)
    run = options.student / "student"
    folder = run if (run / "model_index.json").is_file() else options.student
    write_times(folder, student, times)
    print(f"{len(trials)} candidates; times {', '.join(f'{t:.4f}' for t in times)} written to {folder / 'studio.json'}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
