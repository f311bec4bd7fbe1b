"""Score text-to-image students and their teacher on the solids world, whose pictures are known to the last pixel.

    python -m eval.geneval --student runs/solids/sprint --steps 1 2 4 --teacher embedded:solids

Prompts are in GenEval's six forms, some of them never trained on; the detector's own accuracy on true renders is the
score's ceiling, and the Fréchet distance of as many true renders its floor; both are measured beside.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval.features import extract
from eval.fid import environment
from eval.frechet import frechet_distance
from eval.geneval import judge, summarize
from eval.geneval.prompts import HELD_OUT, true_renders
from eval.geneval.solids import OPTIONS, SolidsDetector, SolidsFeatures, colour_of
from eval.reference import load_reference
from eval.text_to_image import painter
from models.errors import UserError, run_command
from models.scene.captions import EVALUATION, TASKS, Metadata, held_out, prompts

Paints = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Options:
    """Do pictures show what their prompts ask for?"""

    student: Path | None = None
    """A run folder, or an exported student."""
    teacher: str | None = None
    """Folder of a teacher, or embedded:NAME."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Steps of the student, one score each."""
    teacher_steps: tuple[int, ...] = (20,)
    """Heun steps of the teacher, one score each."""
    teacher_guidance: float = 4.5
    """Classifier-free guidance of the teacher."""
    guidance: float | None = None
    """Scale that the student is told; default: its own."""
    num_images: int = 600
    """Prompts, a picture each, the six tasks in turn."""
    seed: int = 0
    """Picture i has the noise of seed + i."""
    batch: int = 100
    """Pictures at a time; does not change the result."""
    output: Path | None = None
    """Folder for geneval.json, a JSONL file of each sampler and a grid; default: geneval/ in that of --student."""
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """Scores of one sampler. ``records`` have a line for each picture; ``pictures`` are (n, 3, H, W) uint8."""

    name: str
    scores: dict[str, Any]
    records: list[dict[str, Any]]
    pictures: Tensor


def standard_error(correct: Sequence[bool]) -> float:
    """Of a share, by the Wilson interval's half width at one sigma: not 0 when all are right."""
    n, share = len(correct), sum(correct) / len(correct)
    return (share * (1 - share) / n + 1 / (4 * n * n)) ** 0.5 / (1 + 1 / n)


def judge_pictures(
    name: str, batches: Iterator[tuple[Sequence[Metadata], Tensor]], detector: SolidsDetector, features: SolidsFeatures
) -> Result:
    """Shares of right pictures by task with standard errors, and their distance from true renders."""
    records: list[dict[str, Any]] = []
    pictures: list[Tensor] = []
    for asked, images in batches:
        for wanted, found in zip(asked, detector(images), strict=True):
            correct, reason = judge(found, wanted, OPTIONS, colour_of)
            seen = [{"class": d.label, "color": d.colour, "box": d.box, "score": round(d.score, 4)} for d in found]
            record = {"index": len(records), "tag": wanted["tag"], "prompt": wanted["prompt"], "correct": correct}
            records.append(record | {"reason": reason, "found": seen})
        pictures.append(images)
    summary = summarize(records)
    errors = {t: standard_error([r["correct"] for r in records if r["tag"] == t]) for t in summary["tasks"]}
    total = sum(error * error for error in errors.values()) ** 0.5 / len(errors)
    unseen = [r["correct"] for r in records if r["prompt"] in held_out()]
    made = torch.cat(pictures)
    fd = frechet_distance(extract(features, made.split(250)), load_reference(features.name).statistics)
    scores = summary | {"errors": errors, "error": total, "fd_solids": fd}
    if unseen:
        scores |= {"unseen_prompts": sum(unseen) / len(unseen), "unseen_error": standard_error(unseen)}
    return Result(name, scores, records, made)


def batches(paint: Paints, asked: Sequence[Metadata], seed: int, batch: int, name: str) -> Iterator[Any]:
    """The prompts in parts, each with its pictures."""
    for first in tqdm(range(0, len(asked), batch), desc=name, unit="batch"):
        part = asked[first : first + batch]
        yield part, paint([m["prompt"] for m in part], range(seed + first, seed + first + len(part)))


def grid(results: Sequence[Result], columns: int = 12) -> Image.Image:
    """A row of pictures for each result, the same prompts in each."""
    rows = [torch.cat(list(result.pictures[:columns]), 2) for result in results]
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())


def as_text(results: Sequence[Result]) -> str:
    """A table: score, image distance, and the six tasks, in per cent."""
    lines = [f"{'':<24}{'score':>13}{'unseen':>8}{'fd_solids':>11}" + "".join(f"{t:>15}" for t in TASKS)]
    for result in results:
        s = result.scores
        share = f"{100 * s['score']:.1f} ± {100 * s['error']:.1f}"
        tasks = "".join(f"{100 * s['tasks'].get(t, float('nan')):>15.1f}" for t in TASKS)
        unseen = f"{100 * s['unseen_prompts']:.1f}" if "unseen_prompts" in s else "-"
        lines.append(f"{result.name:<24}{share:>13}{unseen:>8}{s['fd_solids']:>11.3f}{tasks}")
    return "\n".join(lines)


def evaluate(options: Options) -> list[Result]:
    """True renders first, then every sampler on the same prompts and noise."""
    if options.num_images < len(TASKS):
        raise UserError(
            f"--num-images: {options.num_images} is too few: give at least one for each of {len(TASKS)} tasks"
        )
    asked = prompts(EVALUATION, options.num_images)
    detector, features = SolidsDetector(device=options.device), SolidsFeatures(device=options.device)
    paints: dict[str, Paints] = {}
    if options.teacher is not None:
        for steps in options.teacher_steps:
            made = painter(options.teacher, steps, options.teacher_guidance, options.device)
            paints[made.name] = made
    if options.student is not None:
        for steps in options.steps:
            made = painter(options.student, steps, options.guidance, options.device)
            paints[made.name] = made
    first = lambda names, seeds: true_renders(asked[seeds[0] : seeds[0] + len(seeds)], HELD_OUT + seeds[0])
    results = [
        judge_pictures("true renders", batches(first, asked, 0, options.batch, "true renders"), detector, features)
    ]
    for name, paint in paints.items():
        made = batches(paint, asked, options.seed, options.batch, name)
        results.append(judge_pictures(name, made, detector, features))
    return results


def main(options: Options) -> None:
    if options.student is None and options.teacher is None:
        raise UserError("--student: missing; name a student, a teacher or both")
    folder = options.output or (options.student / "geneval" if options.student else Path("report/geneval"))
    results = evaluate(options)
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        name = result.name.replace(", ", "_").replace(" ", "_")
        lines = "".join(json.dumps(record) + "\n" for record in result.records)
        (folder / f"{name}.jsonl").write_text(lines)
    grid(results).save(folder / "grid.png")
    report = {
        "protocol": {
            "prompts": f"captions.prompts({EVALUATION}, {options.num_images})",
            "seeds": f"{options.seed} .. {options.seed + options.num_images - 1}",
            "detector_sha256": SolidsDetector().sha256,
            "teacher_guidance": options.teacher_guidance,
            "reference_sha256": load_reference("fd_solids").sha256,
        },
        "student": str(options.student),
        "teacher": options.teacher,
        "environment": environment(torch.device(options.device)),
        "scores": {result.name: result.scores for result in results},
    }
    (folder / "geneval.json").write_text(json.dumps(report, indent=2) + "\n")
    print(as_text(results))
    print(f"by picture, with reasons: {folder}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
