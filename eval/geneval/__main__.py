"""GenEval: do pictures show what their prompts ask for?

    python -m eval.geneval --student runs/solids/sprint --steps 1 2 4 --teacher embedded:solids
    python -m eval.geneval --images FOLDER --detector MASK2FORMER --output OUTPUT
    python -m eval.geneval --student SANA_SPRINT --detector MASK2FORMER --output OUTPUT

The first scores on the solids world, whose pictures are known to the last pixel: prompts in GenEval's six forms, some
of them never trained on; the detector's own accuracy on true renders is the score's ceiling, and the Fréchet distance
of as many true renders its floor; both are measured beside. A second detector judges too, once `python -m
distill.workshop.detector --second` has made it. With --detector it is GenEval itself on photographs: the
553 published prompts, Mask2Former (`python -m eval.geneval.mask2former` converts mmdet's checkpoint), CLIP's colours.
Folders of pictures are judged one by one and resumed; `torchrun` or `accelerate launch` splits them over processes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval import report as reports
from eval.features import extract, file_digest
from eval.frechet import frechet_distance
from eval.geneval import coco, folder, judge
from eval.geneval.coco_judge import CocoJudge
from eval.geneval.folder import Paints, scores, standard_error
from eval.geneval.prompts import HELD_OUT, true_renders
from eval.geneval.solids import OPTIONS, SECOND, SolidsDetector, SolidsFeatures, colour_of
from eval.machine import environment, home_of, place_of, refuse_unread, share
from eval.reference import load_reference
from eval.sheet import sheet
from eval.text_to_image import Painter, painter
from models.errors import UserError, run_command
from models.folders import replace_text
from models.pictures import raw
from models.scene.captions import EVALUATION, TASKS, Metadata, held_out, prompts


@dataclass(frozen=True)
class Options:
    """Do pictures show what their prompts ask for?"""

    images: Path | None = None
    """Pictures in GenEval's layout to judge, NNNNN/metadata.jsonl and NNNNN/samples/*.png, in the place of a model."""
    detector: Path | None = None
    """Mask2Former for GenEval's own prompts, in transformers' format; default: the solids world's detector."""
    clip: str = "ViT-L-14-quickgelu:openai"
    """CLIP for colours beside --detector: MODEL:WEIGHTS of open_clip, or a folder with open_clip_config.json."""
    each: int = 4
    """Pictures of each of GenEval's prompts."""
    student: Path | None = None
    """A run folder, an exported student, or embedded:NAME."""
    teacher: str | None = None
    """Folder of a teacher, or embedded:NAME."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Steps of the student, one score each."""
    teacher_steps: tuple[int, ...] = (20,)
    """Heun steps of the teacher, one score each."""
    teacher_guidance: float = 3.0
    """Classifier-free guidance of the teacher; Sana's own is 4.5."""
    guidance: float | None = None
    """Scale that the student is told; default: its own."""
    num_images: int = 600
    """Prompts, a picture each, the six tasks in turn."""
    seen: int = 0
    """So many more prompts of the tasks whose own are held out of training, of those that training has: scored apart,
    to tell understanding from memory."""
    seed: int = 0
    """Picture i has the noise of seed + i."""
    batch: int = 100
    """Pictures at a time; does not change the result."""
    output: Path | None = None
    """Folder for geneval.json, a JSONL file of each sampler and a grid; default: geneval/ in that of --student,
    or in report/NAME of an embedded one."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


@dataclass(frozen=True)
class Result:
    """Scores of one sampler. ``records`` have a line for each picture; ``pictures`` are (n, 3, H, W) uint8."""

    name: str
    scores: dict[str, Any]
    records: list[dict[str, Any]]
    pictures: Tensor


def judge_pictures(
    name: str,
    batches: Iterator[tuple[Sequence[Metadata], Tensor]],
    detector: SolidsDetector,
    features: SolidsFeatures,
    second: SolidsDetector | None = None,
) -> Result:
    """Shares of right pictures by task with standard errors, and their distance from true renders.

    Under ``second`` are the scores by another judge, if there is one.
    """
    records: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    pictures: list[Tensor] = []
    for asked, images in batches:
        for wanted, found in zip(asked, detector(images), strict=True):
            correct, reason = judge(found, wanted, OPTIONS, colour_of)
            seen = [{"class": d.label, "color": d.colour, "box": d.box, "score": round(d.score, 4)} for d in found]
            record = {"index": len(records), "tag": wanted["tag"], "prompt": wanted["prompt"], "correct": correct}
            records.append(record | {"reason": reason, "found": seen})
        for wanted, found in zip(asked, second(images) if second else (), strict=bool(second)):
            others.append({"tag": wanted["tag"], "correct": judge(found, wanted, OPTIONS, colour_of)[0]})
        pictures.append(images)
    unseen = [r["correct"] for r in records if r["prompt"] in held_out()]
    made = torch.cat(pictures)
    fd = frechet_distance(extract(features, made.split(250)), load_reference(features.name).statistics)
    found = scores(records) | {"fd_solids": fd} | ({"second": scores(others)} if others else {})
    if unseen:
        found |= {"unseen_prompts": sum(unseen) / len(unseen), "unseen_error": standard_error(unseen)}
    return Result(name, found, records, made)


def batches(paint: Paints, asked: Sequence[Metadata], seed: int, batch: int, name: str) -> Iterator[Any]:
    """The prompts in parts, each with its pictures."""
    for first in tqdm(range(0, len(asked), batch), desc=name, unit="batch"):
        part = asked[first : first + batch]
        yield part, paint([m["prompt"] for m in part], range(seed + first, seed + first + len(part)))


COLUMNS = 12


def grid(results: Sequence[Result], columns: int = COLUMNS) -> Image.Image:
    """A row of the first pictures for each result, over their prompts: chosen by number, not by beauty."""
    asked = [record["prompt"].removeprefix("a photo of ") for record in results[0].records[:columns]]
    return sheet({result.name: result.pictures[:columns] for result in results}, asked)


def as_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of scores by sampler: mean, image distance, and the six tasks, in per cent."""
    lines = [f"{'':<24}{'score':>13}{'unseen':>8}{'seen':>8}{'fd_solids':>11}" + "".join(f"{t:>15}" for t in TASKS)]
    for name, s in results.items():
        share = f"{100 * s['score']:.1f} ± {100 * s['error']:.1f}"
        tasks = "".join(f"{100 * s['tasks'].get(t, float('nan')):>15.1f}" for t in TASKS)
        unseen, seen = (f"{100 * s[f'{n}_prompts']:.1f}" if f"{n}_prompts" in s else "-" for n in ("unseen", "seen"))
        distance = f"{s['fd_solids']:.3f}" if "fd_solids" in s else "-"
        lines.append(f"{name:<24}{share:>13}{unseen:>8}{seen:>8}{distance:>11}{tasks}")
        if "second" in s:
            other = s["second"]
            share = f"{100 * other['score']:.1f} ± {100 * other['error']:.1f}"
            tasks = "".join(f"{100 * other['tasks'].get(t, float('nan')):>15.1f}" for t in TASKS)
            lines.append(f"{'  by the second judge':<24}{share:>13}{'':>27}{tasks}")
    return "\n".join(lines)


def painters(options: Options) -> dict[str, Painter]:
    """The teacher in every number of steps, then the student, by name."""
    found: dict[str, Painter] = {}
    if options.teacher is not None:
        for steps in options.teacher_steps:
            made = painter(options.teacher, steps, options.teacher_guidance, options.device)
            found[made.name] = made
    if options.student is not None:
        for steps in options.steps:
            made = painter(options.student, steps, options.guidance, options.device)
            found[made.name] = made
    return found


def evaluate(options: Options, paints: Mapping[str, Painter], place: torch.device) -> list[Result]:
    """On the solids world: true renders first, then every sampler on the same prompts and noise."""
    if options.num_images < len(TASKS):
        raise UserError(
            f"--num-images: {options.num_images} is too few: give at least one for each of {len(TASKS)} tasks"
        )
    asked = prompts(EVALUATION, options.num_images)
    second = SolidsDetector(device=place, second=True) if SECOND.is_file() else None
    by = SolidsDetector(device=place), SolidsFeatures(device=place), second
    size = max(paint.spec.picture[1] for paint in paints.values())
    first = lambda names, seeds: true_renders(asked[seeds[0] : seeds[0] + len(seeds)], HELD_OUT + seeds[0], size)
    results = [judge_pictures("true renders", batches(first, asked, 0, options.batch, "true renders"), *by)]
    twins = seen_prompts(options.seen)
    for name, paint in paints.items():
        result = judge_pictures(name, batches(paint, asked, options.seed, options.batch, name), *by)
        if twins:
            made = batches(paint, twins, options.seed + len(asked), options.batch, f"{name}, seen")
            right = [record["correct"] for record in judge_pictures(name, made, *by[:2]).records]
            result.scores.update(seen_prompts=sum(right) / len(right), seen_error=standard_error(right))
        results.append(result)
    return results


def seen_prompts(count: int) -> list[Metadata]:
    """Captions of the tasks whose evaluation prompts are held out, that are not held out themselves."""
    tasks = {m["tag"] for m in prompts(EVALUATION, 600) if m["prompt"] in held_out()}
    share = len(TASKS) / max(1, len(tasks))
    drawn = prompts(EVALUATION + 1, math.ceil(share * count) + len(TASKS), held_out()) if count else []
    return [m for m in drawn if m["tag"] in tasks][:count]


def file_name(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def write(report: Mapping[str, Any], output: Path) -> None:
    replace_text(output / "geneval.json", json.dumps(report, indent=2) + "\n")


def judge_folders(options: Options, output: Path) -> None:
    """GenEval on folders of pictures, painted first if a model is named; the process that ends last sums up."""
    (rank, world), place = share(), place_of(options.device)
    by: folder.Judge
    by = CocoJudge(options.detector, options.clip, place) if options.detector else SolidsDetector(device=place)
    asked = coco.metadata()
    folders, count, painted = {}, None, {}
    if options.images:
        folders = {"pictures": options.images}
    else:
        count = options.each * len(asked)
        for name, paints in painters(options).items():
            folders[name] = output / file_name(name) / "images"
            painted[name] = folder.paint(
                paints, asked, folders[name], options.each, options.seed, rank, world, identity=paints.identity
            )
    found: dict[str, dict[str, Any]] = {}
    every: list[folder.Picture] = []
    known: dict[str, dict[str, Any]] = {}
    for name, pictures in folders.items():
        own = output if options.images else output / file_name(name)
        known, whole = folder.judge_folder(pictures, by, own, rank, world, count)
        if len(known) < whole:
            print(
                f"{name}: {len(known)} of {whole} pictures are judged: the other processes, or the same command, go on"
            )
            return
        every = folder.pictures(pictures)
        found[name] = folder.scores(known[picture.name] for picture in every)
    report = {"name": by.name, "protocol": by.protocol, "painted": painted, "scores": found}
    report |= {"environment": environment(place)}
    write(report, output)
    name = list(folders)[-1]
    wrong = reports.failures([known[p.name] for p in every], lambda index: raw(every[index].path))
    page = reports.write_geneval(report, output, name, wrong, [])
    print(f"{by.name}\n{as_text(found)}\nby picture, with reasons: {output}\nreport: {page}")


def main(options: Options) -> None:
    if options.images is not None and (options.student or options.teacher):
        raise UserError("--images: pictures are judged as they are: leave out --student and --teacher")
    if options.images is None and options.student is None and options.teacher is None:
        raise UserError("--student: missing; name a student, a teacher, both, or --images")
    if options.batch < 1 or options.each < 1:
        raise UserError(f"--batch ({options.batch}) and --each ({options.each}) must be at least 1")
    if options.images is not None:
        named = (
            "steps",
            "teacher_steps",
            "teacher_guidance",
            "guidance",
            "seed",
            "each",
            "num_images",
            "batch",
            "seen",
        )
        refuse_unread(options, named, "beside --images")
    elif options.detector is not None:
        refuse_unread(options, ("num_images", "batch", "seen"), "beside --detector, whose prompts are GenEval's 553,")
    else:
        refuse_unread(options, ("each", "clip"), "without --detector")
    home = home_of(options.student) if options.student is not None else options.images and options.images.parent
    output = options.output or (home / "geneval" if home else Path("report/geneval"))
    if options.images is not None or options.detector is not None:
        judge_folders(options, output)
        return
    place = place_of(options.device)
    paints = painters(options)
    results = evaluate(options, paints, place)
    output.mkdir(parents=True, exist_ok=True)
    for result in results:
        lines = "".join(json.dumps(record) + "\n" for record in result.records)
        (output / f"{file_name(result.name)}.jsonl").write_text(lines)
    grid(results).save(output / "grid.png")
    report = {
        "name": SolidsDetector.name,
        "protocol": {
            "prompts": f"captions.prompts({EVALUATION}, {options.num_images})",
            "seeds": f"{options.seed} .. {options.seed + options.num_images - 1}",
            "detector_sha256": SolidsDetector().sha256,
            "second_detector_sha256": file_digest(SECOND) if SECOND.is_file() else None,
            "guidance": {name: paint.guidance for name, paint in paints.items()},
            "reference_sha256": load_reference("fd_solids").sha256,
        },
        "student": str(options.student),
        "teacher": options.teacher,
        "environment": environment(place),
        "scores": {result.name: result.scores for result in results},
    }
    write(report, output)
    print(as_text(report["scores"]))
    last = results[-1]
    wrong = reports.failures(last.records, lambda i: Image.fromarray(last.pictures[i].permute(1, 2, 0).numpy()))
    page = reports.write_geneval(report, output, last.name, wrong, [r["prompt"] for r in last.records[:COLUMNS]])
    print(f"by picture, with reasons: {output}\nreport: {page}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
