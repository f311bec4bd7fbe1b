"""Several students, each for a part of the classes."""

from typing import Annotated, Literal

from pydantic import Field

from distill.schema import Schema
from distill.settings.matching import MatchingMethod
from distill.settings.pretrain import ScoreMatching
from distill.settings.train import Optimizer

StageMethod = Annotated[ScoreMatching | MatchingMethod, Field(discriminator="kind")]


class Stage(Schema):
    """One stage of a student's training; it starts from the stage before."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of its folder, e.g. dm."""
    method: StageMethod
    """A row of the table, or score_matching."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Its share of train.steps, which are those of one student; the shares of all stages make 1."""
    student: Optimizer | None = None
    """Optimizer of the student; null: the run's."""
    critic: Optimizer | None = None
    """Optimizer of the critic; null: the run's."""


class MultiStudent(Schema):
    """Multi-student distillation (MSD, arXiv 2410.23274): a student for each part of the classes."""

    kind: Literal["multi_student"] = "multi_student"
    students: int = Field(default=4, gt=0)
    """Number of students."""
    partition: Literal["consecutive", "kmeans", "quadrants"] = "consecutive"
    """How classes are divided: by their numbers, or by the teacher's class embeddings."""
    only: int | None = Field(default=None, ge=0)
    """Train this student alone, for one machine of several; null: one after another."""
    stages: list[Stage] = Field(min_length=1)
    """What each student goes through, e.g. score_matching, a row without GAN, a row with one."""
