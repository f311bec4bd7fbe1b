"""The methods of the distribution-matching family."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from distill.divergences import DIVERGENCES
from distill.noise_levels import LogNormal, LogUniform, NoiseLevels
from distill.schema import Schema

if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[*DIVERGENCES, "alpha"]


class GAN(Schema):
    """The adversarial term and the density ratio's discriminator. Needs pictures."""

    weight: float = Field(default=3e-2, ge=0)
    """Weight of softplus(-logit) in the student's loss; 0 trains the discriminator for the ratio only."""
    taps: list[str] = Field(default=["unet.mid_block"], min_length=1)
    """Blocks of the frozen teacher whose outputs the heads see."""
    width: int = Field(default=64, gt=0)
    """Channels of a head."""
    r1_weight: float = Field(default=0.0, ge=0)
    """Weight of the approximate R1 penalty (APT, arXiv 2501.08316)."""
    r1_scale: float = Field(default=0.1, gt=0)
    """Perturbation of the noised picture, relative to its standard deviation."""


class Regression(Schema):
    """DMD's regression on pairs of noise and the teacher's own picture."""

    path: Path
    """File made by `python -m distill.pairs`."""
    weight: float = Field(default=0.25, gt=0)
    """Weight of the mean squared error in the student's loss."""
    every: int = Field(default=4, gt=0)
    """One pair for this many samples of the batch."""


class Matching(Schema):
    """What the methods of the distribution-matching family share."""

    start: Path | None = None
    """Run folder or exported student to start from, a run's critic included; null: the teacher's weights."""
    sigma_init: float = Field(default=2.5, gt=0)
    """Noise level sigma / alpha of the student's input."""
    clip_samples: bool = False
    """The student's samples are pictures in [-1, 1]: clip them before they are judged. Not for latents."""
    student_steps: int = Field(default=1, ge=1, le=4)
    """Steps that the student serves: each sample is trained at one of them, reached by the student itself."""
    critic_turns: int = Field(default=3, gt=0)
    """Critic turns per student turn."""
    reuse_samples: bool = True
    """Critic turns use the student turn's samples, noised afresh; false: new samples every turn."""
    noise_levels: NoiseLevels = LogNormal(mean=-0.6, std=1.2)
    """Noise levels at which student and teacher are compared."""
    critic_noise_levels: NoiseLevels | None = None
    """Noise levels of the critic's training; null: the same."""
    time_weight: Literal["denoiser", "half_g2"] = "denoiser"
    """denoiser: every noise level counts alike in units of x0; half_g2: g^2/2, Uni-Instruct's theorem."""
    normalizer: Literal["dmd", "none"] = "dmd"
    """dmd: divide by |x0 - teacher| (DMD, Eq. 8); none: the exact gradient of the row's objective."""
    bins: int = Field(default=10, gt=0)
    """Bins over noise levels for diagnostics and for the ratio's normalisation."""
    regression: Regression | None = None
    """Optional regression pairs."""


class DivergenceMatching(Matching):
    """What the methods for any f-divergence share."""

    divergence: DivergenceName = "forward_kl"
    """The f-divergence; `alpha` takes its order from `order`."""
    order: float = 0.5
    """Order of the alpha divergence; used with `divergence: alpha` only."""
    ratio_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the ratio's moving average per noise-level bin."""
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    """Range that the ratio is clipped to."""

    @field_validator("ratio_clip")
    @classmethod
    def _range(cls, clip: tuple[float, float]) -> tuple[float, float]:
        if not 0 < clip[0] < clip[1]:
            raise ValueError(f"{clip[0]:g} and {clip[1]:g} are no range of positive numbers")
        return clip

    normalize_ratio: bool = True
    """Stage 1: divide the ratio by its average at that noise level."""
    normalize_weight: bool = True
    """Stage 2: divide h(r) by its mean over the batch."""


class SDS(Matching):
    """Score distillation sampling (arXiv 2209.14988): no critic, hence without the student's entropy. Data-free."""

    kind: Literal["sds"] = "sds"
    normalizer: Literal["dmd", "none"] = "none"
    """As in the paper: the exact gradient."""


class DiffInstruct(Matching):
    """Diff-Instruct (arXiv 2305.18455): integrated reverse KL. Data-free."""

    kind: Literal["diff_instruct"] = "diff_instruct"
    normalizer: Literal["dmd", "none"] = "none"
    """As in the paper: the exact gradient."""


class DMD2(Matching):
    """DMD2 (arXiv 2405.14867): reverse KL through the score difference, plus a GAN term."""

    kind: Literal["dmd2"] = "dmd2"
    gan: GAN = GAN()
    """The discriminator."""


class FDistill(DivergenceMatching):
    """f-distill (arXiv 2502.15681): the score difference weighted by h(r), r the discriminator's density ratio."""

    kind: Literal["f_distill"] = "f_distill"
    gan: GAN = GAN()
    """The discriminator."""


class SIM(Matching):
    """Score implicit matching (arXiv 2410.16794): the Fisher divergence or its pseudo-Huber form. Data-free."""

    kind: Literal["sim"] = "sim"
    huber: float | None = Field(default=None, gt=0)
    """Width of the pseudo-Huber distance, in units of |x0| over all pixels; null: the squared distance."""


class SiD(Matching):
    """SiD (arXiv 2404.04057). Data-free."""

    kind: Literal["sid"] = "sid"
    alpha: float = 1.2
    """1.2 is the paper's; 0.5 is the exact gradient of half the Fisher divergence."""


class SiDA(Matching):
    """SiDA (arXiv 2410.14919): SiD with a GAN term, which reads the teacher's features here."""

    kind: Literal["sida"] = "sida"
    alpha: float = 1.0
    """As for sid; 1 is the paper's."""
    gan: GAN = GAN(weight=0.01)
    """The discriminator."""


class UniInstruct(DivergenceMatching):
    """Uni-Instruct (arXiv 2505.20755): the exact gradient of the expanded f-divergence.

    Its practical form: time_weight denoiser, normalizer dmd. With reverse_kl and without gan it is data-free.
    """

    kind: Literal["uni_instruct"] = "uni_instruct"
    noise_levels: NoiseLevels = LogUniform(low=0.02, high=20.0)
    """Noise levels at which student and teacher are compared."""
    time_weight: Literal["denoiser", "half_g2"] = "half_g2"
    """half_g2: g^2/2, the theorem's; denoiser: every noise level counts alike in units of x0."""
    normalizer: Literal["dmd", "none"] = "none"
    """none: the exact gradient; dmd: divide by |x0 - teacher|."""
    gan: GAN | None = GAN(weight=0.0)
    """The discriminator, which the ratio needs; its weight is that of the GAN term."""


MatchingMethod = SDS | DiffInstruct | DMD2 | FDistill | SIM | SiD | SiDA | UniInstruct
