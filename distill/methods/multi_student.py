"""Multi-student distillation (MSD, arXiv 2410.23274): a plan of ordinary runs, one for each student and stage.

The students share nothing but the teacher and the regression pairs, so they may be trained on K machines. Each has its
own critic and discriminator, and sees the conditions and the real pictures of its own classes alone.
"""

from pathlib import Path

from torch import Tensor

from distill.settings import Config, MultiStudent, ScoreMatching
from models.errors import UserError
from models.multi_student import partition


def student_of_class(settings: MultiStudent, embeddings: Tensor) -> list[int]:
    """Which student each class belongs to; ``embeddings`` (N, D) are the teacher's of the N classes."""
    count = len(embeddings)
    if settings.students > count:
        raise UserError(f"method.students: {settings.students} students for {count} classes")
    if settings.only is not None and settings.only >= settings.students:
        raise UserError(f"method.only: there are students 0 to {settings.students - 1}")
    return partition(settings.partition, embeddings, settings.students).tolist()


def classes_of(student: int, owner: list[int]) -> list[int]:
    """The classes that ``owner``, the student of each class, gives to one student."""
    return [index for index, number in enumerate(owner) if number == student]


def folder(config: Config, student: int) -> Path:
    """Where the runs of one student lie."""
    return config.output / f"student-{student}"


def runs(config: Config, settings: MultiStudent, student: int, classes: list[int]) -> list[Config]:
    """One student's runs, in order. Each starts from the one before; regression pairs are those of all classes."""
    plan: list[Config] = []
    done, share = 0, 0.0
    for stage in settings.stages:
        share += stage.share
        steps, done = round(share * config.train.steps) - done, round(share * config.train.steps)
        method = stage.method
        if plan and isinstance(method, ScoreMatching):
            raise UserError(f"method.stages: {stage.name} is score_matching, which can only come first")
        if plan and not isinstance(method, ScoreMatching):
            method = method.model_copy(update={"start": plan[-1].output})
        changes = {
            "output": folder(config, student) / stage.name,
            "method": method,
            "classes": classes,
            "student": stage.student or config.student,
            "critic": stage.critic or config.critic,
            "train": config.train.model_copy(update={"steps": steps, "seed": config.train.seed + student}),
            "evaluation": config.evaluation.model_copy(update={"num_images": 0}),
            "push_to_hub": None,
        }
        plan.append(config.model_copy(update=changes))
    return plan


def check(config: Config, settings: MultiStudent) -> None:
    """UserError where the settings contradict each other."""
    names = [stage.name for stage in settings.stages]
    if len(set(names)) < len(names):
        raise UserError(f"method.stages: two stages have one name: {names}")
    if isinstance(settings.stages[-1].method, ScoreMatching):
        raise UserError("method.stages: the last one is score_matching, which makes no one-step student")
    if config.classes is not None:
        raise UserError("classes: multi_student divides all classes itself; remove the key")
    if abs(sum(stage.share for stage in settings.stages) - 1) > 1e-6:
        raise UserError(f"method.stages: the shares {[stage.share for stage in settings.stages]} do not make 1")
    if config.lora is not None and len(settings.stages) > 1:
        raise UserError("lora: a stage hands on whole networks, not adapters: give one stage, or remove lora")
    if short := [stage.name for stage in settings.stages if stage.share * config.train.steps < 1]:
        raise UserError(f"train.steps: of {config.train.steps} steps none is left for the stage {short[0]}")
    if own := [stage.name for stage in settings.stages[1:] if getattr(stage.method, "start", None)]:
        raise UserError(f"method.stages: {own[0]} starts from the stage before it; remove its start")
