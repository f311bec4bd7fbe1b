"""Score a student against its teacher, or a folder of pictures: distances to real pictures, speed, and a report.

    python -m eval.fid --student runs/my_run --num-images 4000
    python -m eval.fid --images PICTURES --protocol clean --weights WEIGHTS --reference REAL --output report

Protocols are named (eval/protocols.py). Only those of the published Inception are called FID; the embedded ones need no
download, and do not compare with papers. ``torchrun`` or ``accelerate launch`` splits the pictures over processes.
"""

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval import report as reports
from eval.features import extract, file_digest, weights_digest
from eval.generate import Sampler, images, painted
from eval.machine import environment, home_of, place_of, refuse_unread, share
from eval.nearest import LOOKED_AT, Training, TrainingFolder, nearest
from eval.pictures import batches, picture_files
from eval.protocols import ProtocolName
from eval.reference import Floor
from eval.scoring import MIN_IMAGES, Score, cautions, gathered, judge_of, measured, protocol, score
from eval.students import load_student, student_folder, teacher_of
from eval.teacher_scores import TeacherScores
from models import teachers
from models.condition import Condition
from models.errors import UserError, run_command
from models.seeds import Draws
from models.teachers.base import ClassSpec


@dataclass(frozen=True)
class Options:
    """Score a distilled student and its teacher, and write report.html and report.json."""

    student: Path | None = None
    """A run folder, or an exported student (model_index.json beside its network)."""
    images: Path | None = None
    """A folder of pictures to score as they are, in the student's place. What counts is clean-fid's listing;
    neither EXIF's orientation nor alpha is applied, as in the published protocols."""
    num_images: int = 4000
    """Pictures to generate for each score. More than 10 per feature dimension, and 4,000, are worth trusting."""
    protocol: ProtocolName = "fd_fmnist_cnn"
    """fd_fmnist_cnn: a small Fashion-MNIST classifier. fd_effnet_lite0_64: EfficientNet-Lite0 at 64 pixels. The others
    need --weights and --reference; eval/protocols.py says what each of them does."""
    weights: Path | None = None
    """Weights of the protocol's network: Inception's file, or a folder of DINOv2 or CLIP."""
    reference: Path | None = None
    """Real pictures: a folder, a file of `python -m eval.reference`, EDM's or ADM's .npz, EDM2's .pkl."""
    best_of: int = 1
    """Report the least of this many runs, as EDM's papers do; seeds follow one another."""
    teacher: str | None = None
    """Folder of the teacher, or embedded:NAME; default is what the run's config.yaml says under teacher.path."""
    teacher_steps: int = 18
    """Heun steps of the teacher; it makes 2 x steps - 1 network calls for a picture."""
    seed: int = 0
    """Picture i has the noise of seed + i."""
    batch: int = 250
    """Pictures at a time; does not change the result."""
    output: Path | None = None
    """Folder for the report; default is report/ in the folder of --student."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""
    remeasure_teacher: bool = False
    """Measure the teacher now even if scores.json, its own or in report/NAME, has this protocol."""
    curve: tuple[int, ...] = ()
    """More numbers of Heun steps of the teacher, for the curve of distance over network calls."""
    training: Path | None = None
    """Folder of training pictures of the student's size, to look for copies among 10,000 of them."""


def _seconds(call: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    """Median duration of ``call`` in seconds."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


@torch.no_grad()
def speed(samplers: list[Sampler], spec: ClassSpec, batch: int, device: torch.device) -> dict[str, Any]:
    """Pictures per second of each sampler at one batch size, one after the other in this process; median of 3 or 7."""
    z = Draws(range(batch), device).normal(*spec.shape)
    cond = Condition(class_ids=torch.arange(batch, device=device) % spec.num_classes)
    rates = {}
    for sampler in tqdm(samplers, desc="speed", unit="sampler"):
        call = lambda sampler=sampler: spec.decode(sampler.function(z, cond, lambda: z))
        if sampler.nfe < 10:
            call()
        rates[sampler.name] = batch / _seconds(call, 7 if sampler.nfe < 10 else 3, device)
    return {"batch": batch, "images_per_second": rates}


def evaluate(
    student: Path,
    teacher: Path | None,
    n: int = 4000,
    *,
    name: ProtocolName = "fd_fmnist_cnn",
    weights: Path | None = None,
    reference_path: Path | None = None,
    best_of: int = 1,
    curve: tuple[int, ...] = (),
    training: Training | Path | None = None,
    teacher_steps: int = 18,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str | None = None,
    remeasure_teacher: bool = False,
    grid: Path | None = None,
    timed: bool = True,
    processes: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Score the exported student in folder ``student`` and the teacher in ``teacher`` with n pictures each.

    ``teacher`` is a folder (``models.teachers.resolve`` turns embedded:NAME into one), or None for none. ``name`` is
    the protocol; other than the embedded ones need ``weights`` and ``reference_path``. Returns what report.json holds:
    protocol, provenance, cautions, scores (each with its floor), speed (None unless ``timed``). With ``grid`` the
    pictures of both on the same noise are saved there. Among ``training`` pictures the nearest to the student's are
    looked for. UserError for n below 10 and folders that do not fit.
    """
    if n < MIN_IMAGES:
        raise UserError(f"num_images: {n} is too few for a distance: give at least {MIN_IMAGES}, better 4000")
    if min(teacher_steps, batch, best_of, *curve) < 1 or seed < 0:
        raise UserError(
            f"teacher_steps ({teacher_steps}), batch ({batch}), best_of ({best_of}) and the steps of curve "
            f"({', '.join(map(str, curve)) or 'none'}) must be at least 1, seed ({seed}) at least 0"
        )
    place = place_of(device)
    one_step, spec = load_student(student, place)
    judge, reference = judge_of(name, weights, reference_path, place)
    rules = protocol(judge, reference, n, seed, spec.num_classes, name)

    sources: list[tuple[Sampler, TeacherScores | None]] = [(one_step, None)]
    provenance: dict[str, Any] = {"student": str(student), "student_weights_sha256": weights_digest(student)}
    if teacher is not None:
        teacher_denoiser, teacher_spec = teachers.load_class_conditional(teacher)
        differing = [f for f in ("shape", "num_classes") if getattr(spec, f) != getattr(teacher_spec, f)]
        if differing:
            raise UserError(f"student {student} and teacher {teacher} differ in {', '.join(differing)}")
        teacher_denoiser.to(place)
        digest = weights_digest(teacher)
        provenance |= {"teacher": str(teacher), "teacher_weights_sha256": digest}
        cache = TeacherScores(teacher, digest)
        steps = sorted({teacher_steps, 1, *curve}, key=lambda s: (s != teacher_steps, -s))
        sources += [(Sampler.teacher(teacher_denoiser, s), cache) for s in steps]
    provenance |= environment(place) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}

    rows = []
    for sampler, cache in sources:
        known = cache.get(sampler, rules.digest()) if cache and not remeasure_teacher else None
        runs = 1 if cache else best_of
        value = known or score(
            sampler, judge, reference, spec, n, seed, batch, place, name=name, best_of=runs, processes=processes
        )
        if cache and not known:
            cache.put(sampler, rules.digest(), value)
        source = f"read from {cache.source(sampler, rules.digest())}" if known and cache else "measured now"
        rows.append(row(value, reference.floor(n), source))
    samplers = [sampler for sampler, _ in sources]
    if grid is not None and processes[0] == 0:
        pictures = reports.picture_grid(samplers[:2], spec, seed, place)
        grid.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures).save(grid)
    copies = None
    if training is not None and processes[0] == 0:
        if isinstance(training, Path):
            training = TrainingFolder(training, spec.picture[0])
        rest: dict[str, Any] = {"device": place, "to_uint8": painted(spec)}
        made = images(one_step, min(n, LOOKED_AT), spec.shape, spec.num_classes, batch, seed, **rest)
        mine = torch.cat(list(made))
        found = nearest(mine, training, judge)
        copies = {"closer": found.closer, "among": found.among}
        if grid is not None:
            Image.fromarray(reports.pairs_grid(found.pairs)).save(grid.with_name("nearest.png"))
    timing = speed(samplers, spec, min(batch, 100), place) if timed and processes[0] == 0 else None
    if timing and best_of > 1:
        timing["images_per_second"][rows[0]["sampler"]] = timing["images_per_second"][one_step.name]
    return {
        "protocol": asdict(rules) | {"digest": rules.digest()},
        "provenance": provenance,
        "cautions": cautions(n, judge.dim, judge.name, name),
        "scores": rows,
        "speed": timing,
        "nearest": copies,
        "class_names": spec.class_names,
    }


def row(value: Score, floor: Floor | None, source: str) -> dict[str, Any]:
    """A line of the report."""
    known = {"floor": floor.value, "floor_basis": floor.basis} if floor else {"floor": None, "floor_basis": None}
    return asdict(value) | known | {"source": source}


def evaluate_pictures(
    folder: Path,
    name: ProtocolName,
    weights: Path | None,
    reference_path: Path | None,
    batch: int = 50,
    device: torch.device | str | None = None,
    processes: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Score a folder of pictures, as :func:`evaluate` scores a student; what report.json holds."""
    place, files = place_of(device), picture_files(folder)
    if len(files) < MIN_IMAGES:
        raise UserError(f"--images: {folder} has {len(files)} pictures, too few for a distance: at least {MIN_IMAGES}")
    judge, reference = judge_of(name, weights, reference_path, place)
    rules = protocol(judge, reference, len(files), None, None, name)
    rank, world = processes
    made = batches(files[rank::world], batch, folder.name if rank == 0 else None)
    value = measured(folder.name, 0, gathered(extract(judge, made), world), judge, reference, rules)
    digest = hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
    provenance = {"pictures": str(folder), "pictures_sha256": digest} | environment(place)
    return {
        "protocol": asdict(rules) | {"digest": rules.digest()},
        "provenance": provenance | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
        "cautions": cautions(len(files), judge.dim, judge.name, name),
        "scores": [row(value, reference.floor(len(files)), "measured now")],
        "speed": None,
        "nearest": None,
        "class_names": [],
    }


def main(options: Options) -> None:
    """Score, print a table, write the report."""
    if (options.student is None) == (options.images is None):
        raise UserError("--student or --images: give one of the two")
    if options.images is not None:
        own = ("num_images", "best_of", "teacher", "teacher_steps", "seed", "remeasure_teacher", "curve", "training")
        refuse_unread(options, own, "beside --images")
        folder = options.output or options.images.parent / f"{options.images.resolve().name}-report"
        result = evaluate_pictures(
            options.images,
            options.protocol,
            options.weights,
            options.reference,
            min(options.batch, 50),
            options.device,
            share(),
        )
    else:
        assert options.student is not None
        student = student_folder(options.student)
        named = options.teacher or teacher_of(options.student)
        if named is None:
            print("warning: no teacher to compare with; name it with --teacher", file=sys.stderr)
        home = home_of(options.student)
        folder = options.output or (home / "report" if home == options.student else home)
        result = evaluate(
            student,
            teachers.resolve(named) if named else None,
            options.num_images,
            name=options.protocol,
            weights=options.weights,
            reference_path=options.reference,
            best_of=options.best_of,
            curve=options.curve,
            training=options.training,
            teacher_steps=options.teacher_steps,
            seed=options.seed,
            batch=options.batch,
            device=options.device,
            remeasure_teacher=options.remeasure_teacher,
            grid=folder / "grid.png",
            processes=share(),
        )
    if share()[0] > 0:
        return
    reports.write(result, folder, options.student or folder)
    print(reports.as_text(result))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
