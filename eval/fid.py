"""Score a student against its teacher: Fréchet and kernel distance, speed, and a report.

    python -m eval.fid --student runs/my_run --num-images 4000

The distances are called by their extractor's name, never FID: they do not compare with numbers from Inception.
"""

import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
import yaml
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from eval import report as reports
from eval.features import QUANTISATION, Extractor, ExtractorName, Protocol, extract, file_digest, load_extractor
from eval.frechet import frechet_distance
from eval.generate import Sampler, images
from eval.metrics import kernel_distance
from eval.reference import Reference, load_reference
from models import teachers
from models.condition import Condition
from models.errors import UserError, run_command
from models.multi_student import MultiStudent
from models.seeds import Draws
from models.student import OneStepStudent
from models.teachers import embedded

MIN_IMAGES = 10
TRUSTED_IMAGES = 4000


@dataclass(frozen=True)
class Options:
    """Score a distilled student and its teacher, and write report.html and report.json."""

    student: Path
    """A run folder, or an exported student (model_index.json and unet/)."""
    num_images: int = 4000
    """Pictures to generate for each score. More than 10 per feature dimension, and 4,000, are worth trusting."""
    extractor: ExtractorName = "fd_fmnist_cnn"
    """fd_fmnist_cnn: a small Fashion-MNIST classifier. fd_effnet_lite0_64: EfficientNet-Lite0 at 64 pixels."""
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
    """Measure the teacher now even if its scores.json has this protocol."""


@dataclass(frozen=True)
class Score:
    """One generator's distances. ``fd`` against the whole reference, ``kid`` against some of its features."""

    sampler: str
    nfe: int
    fd: float
    kid: float
    kid_std: float
    kid_subsets: int
    kid_subset_size: int
    protocol_digest: str
    measured: str
    """UTC date and time."""


# ----------------------------------------------------------------------------------------------------- folders


def student_folder(path: Path) -> Path:
    """The exported student that ``path`` is or has; UserError if there is none."""
    if not path.is_dir():
        raise UserError(f"--student: there is no folder {path}")
    for folder in (path, path / "student"):
        if (folder / "model_index.json").is_file() and (folder / "unet").is_dir():
            return folder
    if (path / "config.yaml").is_file():
        raise UserError(
            f"--student: the run {path} has no exported student yet: {path / 'student'} has no model_index.json"
        )
    raise UserError(f"--student: {path} is neither a run nor an exported student (model_index.json and unet/)")


def teacher_of(run: Path) -> str | None:
    """``teacher.path`` in the run's config.yaml; None without such a file."""
    config = run / "config.yaml"
    if not config.is_file():
        return None
    try:
        settings = yaml.safe_load(config.read_text())
        return str(settings["teacher"]["path"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config} names no teacher under teacher.path: give it with --teacher") from error


def load_student(folder: Path, device: torch.device) -> tuple[Sampler, embedded.Spec]:
    """The student in ``folder``, or its several students, and the spec; UserError if unreadable or a teacher."""
    try:
        denoiser, spec = embedded.load(folder)
    except (KeyError, OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"student {folder} cannot be read: {type(error).__name__} {reason}") from error
    if spec.sigma_init is None:
        raise UserError(f"{folder} is a teacher, not an exported student: its model_index.json has no sigma_init")
    if spec.student_of_class is None:
        return Sampler.student(OneStepStudent(denoiser.to(device), spec.sigma_init).eval()), spec
    several = MultiStudent(folder, device=device)
    return Sampler(f"{len(several)} students, 1 step", 1, lambda z, cond, _noise: several.generate(z, cond)), spec


def weights_digest(folder: Path) -> str:
    """SHA-256 of the U-Net's weights in ``folder``; of several students, that of all digests in their order."""
    digests = []
    for place in [folder, *sorted(folder.glob("student_[0-9]*"), key=lambda path: (len(path.name), path.name))]:
        files = sorted((place / "unet").glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{place / 'unet'} should hold one .safetensors file, not {len(files)}")
        digests.append(file_digest(files[0]))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ scores


def protocol(extractor: Extractor, reference: Reference, n: int, seed: int, num_classes: int) -> Protocol:
    """What the scores of n pictures from ``seed`` mean."""
    if reference.statistics.provenance.get("weights_sha256") != extractor.sha256:
        raise UserError(
            f"the reference {reference.name}.npz was made with other weights of {extractor.name}: "
            "run `python -m distill.references`"
        )
    return Protocol(
        extractor=extractor.name,
        weights_sha256=extractor.sha256,
        resize=extractor.resize,
        quantisation=QUANTISATION,
        reference=str(reference.statistics.provenance["data"]),
        reference_size=reference.statistics.n,
        reference_sha256=reference.sha256,
        images=n,
        seeds=f"{seed} .. {seed + n - 1}",
        classes=f"picture i has class i mod {num_classes}",
    )


def score(
    sampler: Sampler,
    extractor: Extractor,
    reference: Reference,
    spec: embedded.Spec,
    n: int,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Score:
    """Generate n pictures and measure them against ``reference``."""
    shape, description = (spec.channels, spec.size, spec.size), sampler.name if progress else None
    made = images(sampler, n, shape, spec.num_classes, batch, seed, device=device, description=description)
    features = extract(extractor, made)
    kernel = kernel_distance(features, reference.features)
    return Score(
        sampler=sampler.name,
        nfe=sampler.nfe,
        fd=frechet_distance(features, reference.statistics),
        kid=kernel.mean,
        kid_std=kernel.std,
        kid_subsets=kernel.subsets,
        kid_subset_size=kernel.subset_size,
        protocol_digest=protocol(extractor, reference, n, seed, spec.num_classes).digest(),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class TeacherScores:
    """Scores of one teacher in ``scores.json`` beside its weights, by protocol, weights and sampler."""

    def __init__(self, folder: Path, weights_sha256: str):
        self.path, self.weights = folder / "scores.json", weights_sha256

    def _key(self, sampler: Sampler, digest: str) -> str:
        return f"{digest} {self.weights} {sampler.name}"

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def get(self, sampler: Sampler, digest: str) -> Score | None:
        """The stored score, or None; an entry that is not whole counts as none."""
        try:
            return Score(**self._read()[self._key(sampler, digest)])
        except (KeyError, TypeError):
            return None

    def put(self, sampler: Sampler, digest: str, value: Score) -> None:
        """Store a score; a folder that cannot be written to is no error."""
        stored = self._read() | {self._key(sampler, digest): asdict(value)}
        temporary = self.path.with_name(f"scores.{os.getpid()}.partial")
        try:
            temporary.write_text(json.dumps(stored, indent=2) + "\n")
            temporary.replace(self.path)
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
def speed(samplers: list[Sampler], spec: embedded.Spec, batch: int, device: torch.device) -> dict[str, Any]:
    """Pictures per second of each sampler at one batch size, one after the other in this process; median of 3 or 7."""
    z = Draws(range(batch), device).normal(spec.channels, spec.size, spec.size)
    cond = Condition(class_ids=torch.arange(batch, device=device) % spec.num_classes)
    rates = {}
    for sampler in tqdm(samplers, desc="speed", unit="sampler"):
        call = lambda sampler=sampler: sampler.function(z, cond, lambda: z)
        if sampler.nfe < 10:
            call()
        rates[sampler.name] = batch / _seconds(call, 7 if sampler.nfe < 10 else 3, device)
    return {"batch": batch, "images_per_second": rates}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": f"{device} ({hardware})",
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------------------------------- evaluate


def cautions(n: int, dim: int, name: str) -> list[str]:
    """Warnings that belong beside the scores of n pictures."""
    found = []
    if n < 10 * dim:
        found.append(
            f"{n:,} pictures are fewer than 10 per dimension of {name} ({dim}): the distances are biased upwards."
        )
    if n < TRUSTED_IMAGES:
        found.append(
            f"{n:,} pictures are fewer than {TRUSTED_IMAGES:,}: compare with the floor, not with other papers."
        )
    return found


def evaluate(
    student: Path,
    teacher: Path | None,
    n: int = 4000,
    *,
    extractor: ExtractorName = "fd_fmnist_cnn",
    teacher_steps: int = 18,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str | None = None,
    remeasure_teacher: bool = False,
    grid: Path | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Score the exported student in folder ``student`` and the teacher in ``teacher`` with n pictures each.

    ``teacher`` is a folder (``models.teachers.resolve`` turns embedded:NAME into one), or None for none.
    Returns what report.json holds: protocol, provenance, cautions, scores (each with its floor), speed (None unless
    ``timed``). With ``grid`` the pictures of both on the same noise are saved there. UserError for n below 10 and
    folders that do not fit.
    """
    if n < MIN_IMAGES:
        raise UserError(f"num_images: {n} is too few for a distance: give at least {MIN_IMAGES}, better 4000")
    if teacher_steps < 1 or batch < 1 or seed < 0:
        raise UserError(
            f"teacher_steps ({teacher_steps}) and batch ({batch}) must be at least 1, seed ({seed}) at least 0"
        )
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device} is not available here: leave --device out, or give cpu") from error
    one_step, spec = load_student(student, place)
    judge, reference = load_extractor(extractor, place), load_reference(extractor)
    rules = protocol(judge, reference, n, seed, spec.num_classes)

    sources: list[tuple[Sampler, TeacherScores | None]] = [(one_step, None)]
    provenance: dict[str, Any] = {"student": str(student), "student_weights_sha256": weights_digest(student)}
    if teacher is not None:
        teacher_denoiser, teacher_spec = teachers.load(teacher)
        differing = [f for f in ("channels", "size", "num_classes") if getattr(spec, f) != getattr(teacher_spec, f)]
        if differing:
            raise UserError(f"student {student} and teacher {teacher} differ in {', '.join(differing)}")
        teacher_denoiser.to(place)
        digest = weights_digest(teacher)
        provenance |= {"teacher": str(teacher), "teacher_weights_sha256": digest}
        cache = TeacherScores(teacher, digest)
        sources += [(Sampler.teacher(teacher_denoiser, s), cache) for s in sorted({teacher_steps, 1}, reverse=True)]
    provenance |= environment(place) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}

    floor = reference.floor(n)
    rows = []
    for sampler, cache in sources:
        known = cache.get(sampler, rules.digest()) if cache and not remeasure_teacher else None
        value = known or score(sampler, judge, reference, spec, n, seed, batch, place)
        if cache and not known:
            cache.put(sampler, rules.digest(), value)
        source = f"read from {cache.path}" if known and cache else "measured now"
        rows.append(asdict(value) | {"floor": floor.value, "floor_basis": floor.basis, "source": source})
    samplers = [sampler for sampler, _ in sources]
    if grid is not None:
        pictures = reports.picture_grid(samplers[:2], spec, seed, place)
        grid.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures).save(grid)
    return {
        "protocol": asdict(rules) | {"digest": rules.digest()},
        "provenance": provenance,
        "cautions": cautions(n, judge.dim, judge.name),
        "scores": rows,
        "speed": speed(samplers, spec, min(batch, 100), place) if timed else None,
        "class_names": spec.class_names,
    }


def main(options: Options) -> None:
    """Score, print a table, write the report."""
    student = student_folder(options.student)
    named = options.teacher or teacher_of(options.student)
    if named is None:
        print("warning: no teacher to compare with; name it with --teacher", file=sys.stderr)
    folder = options.output or options.student / "report"
    result = evaluate(
        student,
        teachers.resolve(named) if named else None,
        options.num_images,
        extractor=options.extractor,
        teacher_steps=options.teacher_steps,
        seed=options.seed,
        batch=options.batch,
        device=options.device,
        remeasure_teacher=options.remeasure_teacher,
        grid=folder / "grid.png",
    )
    reports.write(result, folder, options.student)
    print(reports.as_text(result))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
