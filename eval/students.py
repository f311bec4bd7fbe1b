"""Run folders and exported students of classes."""

from pathlib import Path

import torch
import yaml

from eval.features import network_folder
from eval.generate import Sampler
from models import teachers
from models.errors import UserError
from models.multi_student import MultiStudent
from models.teachers.base import ClassSpec
from models.yaml_text import read_yaml


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
