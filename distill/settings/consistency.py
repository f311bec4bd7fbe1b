"""Continuous-time consistency with an adversarial term."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from distill.noise_levels import LogNormal, NoiseLevels
from distill.schema import Schema


class LADD(Schema):
    """Latent adversarial distillation (arXiv 2403.12015) as in SANA-Sprint. Needs pictures."""

    weight: float = Field(default=0.5, ge=0)
    """Weight of the hinge term in the student's loss; tied to consistency's tangent_norm l2. 0: no discriminator."""
    warmup_steps: int = Field(default=0, ge=0)
    """Student steps in which the weight rises from 0: the discriminator learns first."""
    taps: list[str] = Field(min_length=1)
    """Blocks of the frozen teacher whose outputs the heads see."""
    width: int | None = Field(default=None, gt=0)
    """Channels of a head; null: those of its feature."""
    noise_levels: NoiseLevels = LogNormal(mean=-0.6, std=1.0)
    """Noise levels at which real pictures and samples are compared."""
    max_time_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of samples that are made from pure noise; the others from noised pictures."""
    misaligned_pairs: bool = True
    """Real pictures with another sample's text count as fakes."""
    reuse_samples: bool = True
    """The discriminator's turn judges the student turn's samples; false: new ones."""


class Consistency(Schema):
    """Continuous-time consistency (sCM, arXiv 2410.11081) on a teacher of any kind, with LADD: SANA-Sprint.

    Noise levels are in the paper's terms, ``t = atan(e^tau / sigma_data)``, tau ~ N(mean, std^2).
    """

    kind: Literal["consistency"] = "consistency"
    start: Path | None = None
    """Run folder or exported student to start from; null: the teacher's weights. It takes over a teacher's control."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the consistency term; 0 leaves LADD alone."""
    ladd: LADD | None = None
    """The adversarial term; null: consistency alone."""
    target: Literal["distillation", "training"] = "distillation"
    """distillation: along the teacher's flow; training: along the straight path of each picture and its noise."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the scaled data."""
    scale_data: bool = True
    """Data of unit deviation (latents) are multiplied by sigma_data (SANA); false: they have sigma_data themselves."""
    noise_levels: NoiseLevels = LogNormal(mean=0.2, std=1.6)
    """Noise levels of the consistency term, and of LADD's samples that start from noised pictures."""
    tangent: Literal["jvp", "central", "backward"] = "jvp"
    """jvp: exact; else a finite difference along the same direction, for networks without a forward derivative."""
    tangent_step: float = Field(default=0.02, gt=0, lt=0.5)
    """Step of the finite difference, in radians; bf16 wants 0.05 to 0.1."""
    tangent_float32: bool = True
    """Take the derivative in float32 whatever train.mixed_precision says; false: in that precision."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Student steps until the tangent is whole (H / 2 of the paper, which counts both networks' steps)."""
    tangent_norm: Literal["l2", "rms", "none"] = "l2"
    """Norm that tangents are divided by: SANA-Sprint's l2, FastGen's rms."""
    tangent_constant: float = Field(default=0.1, gt=0)
    """c in g / (|g| + c)."""
    prior_weight: bool = True
    """Weight 1 / (sigma_data tan t)."""
    adaptive_weight: bool = False
    """Learn a weight nu(t), bounded below. At larger learning rates it keeps the training noisy."""
    guidance: list[float] = Field(default=[4.0, 4.5, 5.0], min_length=1)
    """Scales of the teacher's guidance, one drawn per sample and told to the student; [1]: none."""
    bins: int = Field(default=10, gt=0)
    """Bins over noise levels for diagnostics."""

    @model_validator(mode="after")
    def _has_a_term(self) -> "Consistency":
        if self.weight == 0 and (self.ladd is None or self.ladd.weight == 0):
            raise ValueError("both weights are 0: nothing would be trained")
        return self
