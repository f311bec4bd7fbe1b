"""Score a student against its teacher, or a folder of pictures: distances to real pictures, speed, and a report.

    python -m eval.fid --student runs/my_run --num-images 4000
    python -m eval.fid --images PICTURES --protocol clean --weights WEIGHTS --reference REAL --output report

Protocols are named (eval/protocols.py). Only those of the published Inception are called FID; the embedded ones need no
download, and do not compare with papers. ``torchrun`` or ``accelerate launch`` splits the pictures over processes.
"""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval import report as reports
from eval.features import (
    QUANTISATIONS,
    Extractor,
    Protocol,
    extract,
    file_digest,
    load_extractor,
    network_folder,
    weights_digest,
)
from eval.frechet import frechet_distance, frechet_spread
from eval.generate import Sampler, images, painted
from eval.inception import Inception
from eval.machine import environment, home_of, place_of, refuse_unread, share
from eval.metrics import gaussian_mmd, inception_score, kernel_distance, neighbours
from eval.nearest import LOOKED_AT, Training, TrainingFolder, nearest
from eval.pictures import batches, picture_files
from eval.protocols import INCEPTION, ProtocolName, quantisation_of
from eval.reference import Floor, Reference, load_reference, open_reference
from models import teachers
from models.condition import Condition
from models.errors import UserError, run_command
from models.folders import replace_text
from models.multi_student import MultiStudent
from models.seeds import Draws
from models.teachers.base import ClassSpec
from models.yaml_text import read_yaml

MIN_IMAGES = 10
RESAMPLED = 256
"""Dimensions up to which a Fréchet distance is cheap enough to be resampled."""
TRUSTED_IMAGES = 4000


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


@dataclass(frozen=True)
class Score:
    """One generator's distances. ``fd`` against the whole reference, the others against some of its features.

    What a reference without features, or a network that is no Inception, cannot tell is None. ``runs`` are the
    distances of all runs where ``fd`` is the least of several.
    """

    sampler: str
    nfe: int
    fd: float
    kid: float | None
    kid_std: float | None
    kid_subsets: int
    kid_subset_size: int
    protocol_digest: str
    measured: str
    """UTC date and time."""
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    real_features: int | None = None
    """Pictures of the reference that the kernel distance, precision, recall, density and coverage compare with."""
    runs: list[float] | None = None
    fd_spread: float | None = None
    """Standard deviation over bootstrap resamples of the pictures, for networks of few dimensions."""
    seconds_generating: float | None = None
    seconds_scoring: float | None = None


# ----------------------------------------------------------------------------------------------------- folders


def student_folder(path: Path) -> Path:
    """The exported student that ``path`` is or has; UserError if there is none."""
    if not path.is_dir():
        raise UserError(f"--student: there is no folder {path}")
    for folder in (path, path / "student"):
        if (folder / "model_index.json").is_file() and network_folder(folder).is_dir():
            return folder
    if (path / "config.yaml").is_file():
        raise UserError(
            f"--student: the run {path} has no exported student yet: {path / 'student'} has no model_index.json"
        )
    raise UserError(f"--student: {path} is neither a run nor an exported student (model_index.json beside its network)")


def teacher_of(run: Path) -> str | None:
    """``teacher.path`` in the run's config.yaml; None without such a file."""
    config = run / "config.yaml"
    if not config.is_file():
        return None
    try:
        settings = read_yaml(config.read_text())
        return str(settings["teacher"]["path"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config} names no teacher under teacher.path: give it with --teacher") from error


def load_student(folder: Path, device: torch.device) -> tuple[Sampler, ClassSpec]:
    """The student in ``folder``, or its several students, and the spec; UserError if unreadable or a teacher."""
    try:
        denoiser, spec = teachers.load_class_conditional(folder)
    except (UserError, RuntimeError) as error:
        reason = " ".join(str(error).removeprefix(f"teacher {folder}: ").split())[:300]
        raise UserError(f"student {folder} cannot be read: {reason}") from error
    if not spec.student:
        raise UserError(f"{folder} is a teacher, not an exported student: it has no time of a first step")
    spec = spec.to(device)
    if spec.student_of_class is None:
        return Sampler.student(spec.one_step(denoiser.to(device)).eval()), spec
    several = MultiStudent(folder, device=device)
    return Sampler(f"{len(several)} students, 1 step", 1, lambda z, cond, _noise: several.generate(z, cond)), spec


# ------------------------------------------------------------------------------------------------------ scores


def protocol(
    extractor: Extractor,
    reference: Reference,
    n: int,
    seed: int | None,
    num_classes: int | None,
    name: ProtocolName = "fd_fmnist_cnn",
) -> Protocol:
    """What the scores of n pictures mean: from ``seed`` on, or of a folder with ``seed`` None."""
    stated = reference.statistics.provenance.get("weights_sha256")
    if stated is None and isinstance(extractor, Inception):
        stated = extractor.sha256  # other projects' files, which open_reference takes for the published weights alone
    if stated != extractor.sha256:
        raise UserError(
            f"the reference {reference.name}.npz was made with other weights of {extractor.name}: "
            "run `python -m distill.references`, or `python -m eval.reference` for your own"
        )
    if reference.statistics.provenance.get("resize", extractor.resize) != extractor.resize:
        raise UserError(
            f"the reference {reference.name} was resized otherwise: {reference.statistics.provenance['resize']}; "
            f"{name} does {extractor.resize}"
        )
    return Protocol(
        extractor=extractor.name,
        weights_sha256=extractor.sha256,
        resize=extractor.resize,
        quantisation="as saved" if seed is None else QUANTISATIONS[quantisation_of(name)].words,
        reference=str(reference.statistics.provenance["data"]),
        reference_size=reference.size,
        reference_sha256=reference.sha256,
        images=n,
        seeds="a folder" if seed is None else f"{seed} .. {seed + n - 1}",
        classes="a folder" if num_classes is None else f"picture i has class i mod {num_classes}",
    )


def measured(
    name: str, nfe: int, features: Tensor, extractor: Extractor, reference: Reference, rules: Protocol
) -> Score:
    """All that the features (n, d) of one generator's pictures tell."""
    some, kid = reference.features, None
    around: dict[str, Any] = {}
    if min(len(some), len(features)) >= MIN_IMAGES:
        kid = kernel_distance(features, some)
        around = asdict(neighbours(some, features))
    if extractor.name == "cmmd":
        distance = gaussian_mmd(features, some)
    else:
        whole = len(some) == reference.size and len(some) <= some.shape[1]  # then no covariance need be formed
        distance = frechet_distance(features, some if whole else reference.statistics)
    inception = (None, None)
    if isinstance(extractor, Inception):
        inception = inception_score(extractor.logits(features), min(10, len(features)))
    return Score(
        sampler=name,
        nfe=nfe,
        fd=distance,
        kid=kid.mean if kid else None,
        kid_std=kid.std if kid else None,
        kid_subsets=kid.subsets if kid else 0,
        kid_subset_size=kid.subset_size if kid else 0,
        real_features=len(some) if kid else None,
        protocol_digest=rules.digest(),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        inception_score=inception[0],
        inception_score_std=inception[1],
        fd_spread=frechet_spread(features, reference.statistics) if features.shape[1] <= RESAMPLED else None,
        **around,
    )


def gathered(features: Tensor, world: int) -> Tensor:
    """Features of all processes in the pictures' order; process r of w has those of the pictures r, r + w, ..."""
    if world == 1:
        return features
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=features.device.type == "cpu")
    parts: list[Tensor] = gather_object([features])
    whole = features.new_zeros(sum(len(part) for part in parts), features.shape[1])
    for index, part in enumerate(parts):
        whole[index::world] = part
    return whole


def score(
    sampler: Sampler,
    extractor: Extractor,
    reference: Reference,
    spec: ClassSpec,
    n: int,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str = "cpu",
    progress: bool = True,
    name: ProtocolName = "fd_fmnist_cnn",
    best_of: int = 1,
    processes: tuple[int, int] = (0, 1),
) -> Score:
    """Generate n pictures and measure them against ``reference``; of several runs the one with the least distance.

    ``processes`` is this process's number and how many share the pictures.
    """
    rank, world = processes
    rules = protocol(extractor, reference, n, seed, spec.num_classes, name)
    to_uint8 = painted(spec, QUANTISATIONS[quantisation_of(name)].function)
    found: list[Score] = []
    for run in range(best_of):
        first, started = seed + run * n, time.perf_counter()
        made = images(
            sampler,
            n,
            spec.shape,
            spec.num_classes,
            batch,
            first,
            rank=rank,
            world=world,
            device=device,
            description=sampler.name if progress and rank == 0 else None,
            to_uint8=to_uint8,
        )
        features = gathered(extract(extractor, made), world)
        value = measured(sampler.name, sampler.nfe, features, extractor, reference, rules)
        rest = time.perf_counter() - started - made.seconds
        found.append(replace(value, seconds_generating=round(made.seconds, 2), seconds_scoring=round(rest, 2)))
    least = min(found, key=lambda score: score.fd)
    if best_of == 1:
        return least
    return replace(least, sampler=f"{sampler.name}, best of {best_of}", runs=[score.fd for score in found])


class TeacherScores:
    """Scores of one teacher in ``scores.json`` beside its weights, by protocol, weights and sampler.

    Those of a teacher that came with the project are only read there; new ones go to report/NAME.
    """

    def __init__(self, folder: Path, weights_sha256: str):
        self.shipped, self.path = folder / "scores.json", home_of(folder) / "scores.json"
        self.weights = weights_sha256

    def _key(self, sampler: Sampler, digest: str) -> str:
        return f"{digest} {self.weights} {sampler.name}"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def get(self, sampler: Sampler, digest: str) -> Score | None:
        """The stored score, or None; an entry that is not whole counts as none."""
        try:
            return Score(**self._read(self.source(sampler, digest))[self._key(sampler, digest)])
        except (KeyError, TypeError):
            return None

    def source(self, sampler: Sampler, digest: str) -> Path:
        """The file that has the score, if any has."""
        return self.path if self._key(sampler, digest) in self._read(self.path) else self.shipped

    def put(self, sampler: Sampler, digest: str, value: Score) -> None:
        """Store a score; a folder that cannot be written to is no error."""
        stored = self._read(self.path) | {self._key(sampler, digest): asdict(value)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(stored, indent=2) + "\n")
        except OSError as error:
            print(f"warning: the teacher's scores are not kept: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- speed


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


# ---------------------------------------------------------------------------------------------------- evaluate


def cautions(n: int, dim: int, name: str, protocol_name: ProtocolName = "fd_fmnist_cnn") -> list[str]:
    """Warnings that belong beside the scores of n pictures."""
    found = []
    if protocol_name in INCEPTION and not name.startswith("fid "):
        found.append("These are not the published weights of Inception: the number is no FID.")
    if protocol_name in INCEPTION and n != INCEPTION[protocol_name].images:
        found.append(f"The papers' {protocol_name} takes {INCEPTION[protocol_name].images:,} pictures, this is {n:,}.")
    if n < 10 * dim:
        found.append(
            f"{n:,} pictures are fewer than 10 per dimension of {name} ({dim}): the distances are biased upwards."
        )
    if n < TRUSTED_IMAGES:
        found.append(
            f"{n:,} pictures are fewer than {TRUSTED_IMAGES:,}: compare with the floor, not with other papers."
        )
    return found


def judge_of(
    name: ProtocolName, weights: Path | None, reference: Path | None, device: torch.device
) -> tuple[Extractor, Reference]:
    """Network and reference of a protocol; the embedded ones bring their own."""
    extractor = load_extractor(name, device, weights)
    if reference is not None:
        opened = open_reference(reference, extractor)
        if extractor.name == "cmmd" and len(opened.features) < (opened.size or 1):
            raise UserError(f"--reference: cmmd compares with every picture, and {reference} keeps some: give a folder")
        return extractor, opened
    if name.startswith("fd_") and name != "fd_dinov2":
        return extractor, load_reference(name)
    usual = INCEPTION[name].reference if name in INCEPTION else "a folder of real pictures"
    raise UserError(f"--reference: the protocol {name} needs one; the papers compare with {usual}")


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
