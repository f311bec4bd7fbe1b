"""One run: its data, teacher, method and loop."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from distill.schema import Schema
from distill.settings.consistency import Consistency
from distill.settings.data import Data
from distill.settings.matching import MatchingMethod
from distill.settings.multi_student import MultiStudent
from distill.settings.pretrain import Autoencoder, Pretrain, ScoreMatching
from distill.settings.scene import SceneDistillation
from distill.settings.train import Evaluation, Optimizer, Train
from models.lora_targets import TARGETS


class Teacher(Schema):
    """The pretrained model."""

    path: str
    """Folder of a teacher, hub id org/name, single .safetensors file of the network, or embedded:NAME."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    size: int | None = Field(default=None, gt=0)
    """Side of its pictures in pixels, for diffusers' families; null: the checkpoint's own."""
    tokens: int | None = Field(default=None, gt=0)
    """Tokens of a prompt, for encoders of any length; null: as the family's pipeline."""
    config: str | None = None
    """Pipeline folder or hub id with all the rest, where `path` is a single .safetensors file of the network."""
    distilled: bool | None = None
    """Whether it is distilled, and knows no guidance; null: as its scheduler, its configs and its card say."""
    offload: bool = False
    """Keep text encoders and autoencoder on the CPU."""
    cache: Path | None = None
    """Folder for the float32 embeddings of all prompts, encoded once, after which the text encoders are dropped; null:
    they are encoded as they are needed."""


class LoRA(Schema):
    """Three in one (arXiv 2106.09685): student and critic are adapters on the frozen teacher."""

    rank: int = Field(default=64, gt=0)
    """Rank of the adapters."""
    alpha: int | None = Field(default=None, gt=0)
    """Scale times rank; null: the rank, which is a scale of 1."""
    targets: list[str] = Field(default=list(TARGETS), min_length=1)
    """Ends of the names of adapted layers."""


Method = Annotated[
    Autoencoder | Pretrain | ScoreMatching | MatchingMethod | Consistency | MultiStudent | SceneDistillation,
    Field(discriminator="kind"),
]


class Config(Schema):
    """One run."""

    output: Path
    """Run folder. Running again with the same folder resumes."""
    data: Data
    """What it learns from."""
    teacher: Teacher | None = None
    """The teacher; none for `pretrain`."""
    method: Method
    """How it learns."""
    lora: LoRA | None = None
    """Train adapters on the teacher in the place of copies of it; null: full fine-tuning."""
    classes: list[int] | None = Field(default=None, min_length=1)
    """Only these classes: of the conditions and of the real pictures, not of regression pairs; null: all."""
    student: Optimizer
    """Optimizer of the student."""
    critic: Optimizer | None = None
    """Optimizer of the critic and the discriminator; null: the student's."""
    train: Train
    """The loop."""
    evaluation: Evaluation = Evaluation()
    """Scoring at the end."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Model repository, org/name, that the exported student is uploaded to at the end; null: none."""
