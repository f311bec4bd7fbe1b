"""The whole configuration of a run: one YAML file, checked here, with overrides on the command line.

``accelerate launch distill/train.py --config configs/.../x.yaml --method.divergence jensen_shannon``
"""

import argparse
import copy
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tyro
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from distill.class_names import ClassesBy
from distill.noise_levels import LogNormal, LogUniform, NoiseLevels
from distill.picture_folder import CaptionsFrom
from distill.schema import Schema
from models.adapters import TARGETS
from models.errors import UserError
from models.folders import replace_text
from models.pictures import Background
from models.yaml_text import KeyGivenTwice, read_yaml

DivergenceName = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "pearson_chi2",
    "neyman_chi2",
    "alpha",
]


class FashionMNISTData(Schema):
    """Fashion-MNIST: 60,000 training photographs, 32 x 32 with padding, ten classes."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    path: Path = Path("data/fashion-mnist")
    """Folder of the four .gz files; `make data` fills it."""


class RealPictures(Schema):
    """How files of pictures become samples; see docs/pictures.md."""

    background: Background = "white"
    """Colour behind transparent pixels."""
    on_bad_picture: Literal["refuse", "skip"] = "refuse"
    """What a damaged picture, or one without the caption asked for, does: end the run, or be left out and counted."""
    classes_by: ClassesBy = "name"
    """name: a class is the teacher's of the same name, or of its number; position: the teacher's in the same place."""
    caption: str | None = None
    """Which caption of several is told: first, random, whole (of a .txt of several lines), or the key of a mapping."""


class ImageFolderData(RealPictures):
    """Pictures in a folder, one sub-folder per class, or with captions."""

    kind: Literal["image_folder"] = "image_folder"
    path: Path
    """The folder."""
    captions_from: CaptionsFrom = "auto"
    """files: name.txt beside name.png; metadata: metadata.jsonl; auto: whichever is there, for teachers of prompts."""
    caption_column: str = "text"
    """Key of the captions in metadata.jsonl."""
    size: int = Field(default=32, gt=0)
    """Side in pixels: shorter side resized to it (Lanczos), then centre crop."""
    channels: Literal[1, 3] = 3
    """1 gray, 3 RGB."""
    workers: int = Field(default=2, gt=0)
    """Threads that decode pictures."""


class HFData(RealPictures):
    """A data set of the Hugging Face `datasets` library: hub id, local folder, or a builder such as webdataset."""

    kind: Literal["hf_dataset"] = "hf_dataset"
    path: str
    """Hub id, folder, or builder name (webdataset, parquet, imagefolder)."""
    data_files: str | None = None
    """Files for a builder, with wildcards: "shards/*.tar"."""
    split: str = "train"
    """Split to use."""
    streaming: bool = False
    """Read as a stream: no random access, exact position kept; shards are split over processes."""
    image_column: str = "image"
    """Column of pictures (webdataset: the file suffix, e.g. "png")."""
    label_column: str | None = "label"
    """Column of class ids; null: all pictures are class 0."""
    caption_column: str | None = None
    """Column of captions (webdataset: "txt"), for teachers that are asked for prompts, in label_column's place."""
    prompts: Path | None = None
    """Text file with a prompt in each line, what a student is asked for; null: the captions of all pictures."""
    size: int = Field(default=32, gt=0)
    """Side in pixels."""
    channels: Literal[1, 3] = 3
    """1 gray, 3 RGB."""

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.caption_column is not None and self.label_column not in (None, "label"):
            raise ValueError("caption_column: pictures have captions or classes: leave out one of the two columns")
        return self


class SolidsData(Schema):
    """The solids world: scenes of one to four coloured solids with captions, rendered as they are needed."""

    kind: Literal["solids"] = "solids"
    count: int = Field(default=1_000_000, gt=0)
    """Scenes of an epoch."""
    size: int = Field(default=64, gt=0)
    """Side in pixels."""
    turntable: float = Field(default=0.0, ge=0, le=1)
    """Share of pictures of one solid in the middle, from all sides, whose captions say from where."""
    pairs: float = Field(default=0.0, ge=0, le=1)
    """Share of the others that show two solids named apart, the hardest captions; the rest are of any of six tasks."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """Where pictures are rendered: cpu, or cuda for a GPU."""
    workers: int = Field(default=0, ge=0)
    """Processes that render; 0: this one."""
    keep: bool = False
    """Keep what was rendered, a byte a value, for the next epochs of this process."""


class ConditionsOnly(Schema):
    """No pictures: the student learns from the teacher alone. For methods without a discriminator."""

    kind: Literal["conditions_only"] = "conditions_only"
    prompts: Path | None = None
    """Text file with a prompt in each line, for teachers that are asked for prompts; classes need none."""


class PrecomputedData(Schema):
    """Latents and text embeddings that `python -m distill.precompute` made, of pictures or of prompts alone.

    Neither autoencoder nor text encoder is asked in training; a student is asked for the prompts of all samples.
    """

    kind: Literal["precomputed"] = "precomputed"
    path: Path
    """The folder."""
    streaming: bool = False
    """Read shard after shard, in a random order, for data that do not fit into memory; false: anything at any time."""


Data = Annotated[
    FashionMNISTData | ImageFolderData | HFData | SolidsData | ConditionsOnly | PrecomputedData,
    Field(discriminator="kind"),
]


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


class Optimizer(Schema):
    """AdamW."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """First-moment decay."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Second-moment decay."""
    eps: float = Field(default=1e-8, gt=0)
    """Denominator offset."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    eight_bit: bool = False
    """Moments in 8 bits (bitsandbytes); for GPUs."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, in student steps."""
    final: float = Field(default=1.0, ge=0, le=1)
    """Cosine decay after the warm-up to this fraction of lr at the last step; 1 keeps lr constant."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm, network by network."""


class Train(Schema):
    """The loop."""

    steps: int = Field(gt=0)
    """Student optimizer steps."""
    batch_size: int = Field(gt=0)
    """Pictures per student step over all processes and accumulation steps."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches that one turn is split into."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16: autocast over float32 master weights; auto: bf16 where the device computes in it, else no."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _bare_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    channels_last: bool = False
    """Memory layout of the convolutions' weights."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: a copy of every network in each process; fsdp2: networks of diffusers are divided over the processes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time, far less memory."""
    compile: bool = False
    """torch.compile every network."""
    cpu_threads: int | None = Field(default=None, gt=0)
    """Threads of each process on a CPU; null: the machine's cores shared by its processes."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the student's moving average per student step, warmed up as 1 - (1 + n)^-0.75."""
    log_every: int = Field(default=20, gt=0)
    """Student steps between two lines of metrics.jsonl (each is a mean over them)."""
    sample_every: int = Field(default=500, gt=0)
    """Student steps between two sample grids."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Student steps between two checkpoints."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Save also when so many minutes have gone since the last checkpoint; null: by steps alone."""
    checkpoints_total_limit: int = Field(default=2, gt=0)
    """Checkpoints to keep."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers beside metrics.jsonl."""


class Evaluation(Schema):
    """Scoring at the end of the run."""

    num_images: int = Field(default=0, ge=0)
    """Pictures to score the student on; 0: no scoring."""
    teacher_steps: int = Field(default=18, gt=0)
    """Heun steps of the teacher that it is compared with."""


class Autoencoder(Schema):
    """Train a deep-compression autoencoder (arXiv 2410.10733), whose latents a text-to-image teacher works in."""

    kind: Literal["autoencoder"] = "autoencoder"
    channels: list[int] = Field(default=[48, 96, 128], min_length=1)
    """Channels per level; a latent's side is the picture's divided by 2^levels."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks per level."""
    latent_channels: int = Field(default=16, gt=0)
    """Channels of a latent."""
    decoder_channels: list[int] | None = None
    """Channels per level of the decoder; null: those of the encoder."""
    decoder_layers: int | None = Field(default=None, gt=0)
    """Residual blocks per level of the decoder; null: those of the encoder."""
    start: Path | None = None
    """Run folder of an `autoencoder` run, or folder with vae/, whose encoder stays: the decoder alone is trained, from
    its weights where the sizes are the same, and latents that were stored stay valid. null: both are trained."""
    edge_weight: float = Field(default=1.0, ge=0)
    """Weight of the squared error of differences between neighbouring pixels beside that of the pixels."""
    latent_noise: float = Field(default=0.05, ge=0)
    """Standard deviation of the noise added to latents in training: a generator's latents are not exact."""
    latent_weight: float = Field(default=0.005, ge=0)
    """Weight of the channels' divergence from zero mean and unit variance, which keeps that noise small beside them."""

    @model_validator(mode="after")
    def _as_many_levels(self) -> Self:
        if self.decoder_channels is not None and len(self.decoder_channels) != len(self.channels):
            raise ValueError(
                f"decoder_channels: {self.decoder_channels} has other levels than channels {self.channels}"
            )
        return self


class SanaSize(Schema):
    """A miniature Sana (arXiv 2410.10629): text encoder and linear-attention transformer, both new."""

    autoencoder: Path
    """Run folder of an `autoencoder` run, or a folder with vae/."""
    width: int = Field(default=128, gt=0, multiple_of=32)
    """Width of the transformer."""
    depth: int = Field(default=8, gt=0)
    """Blocks of the transformer."""
    text_width: int = Field(default=96, gt=0, multiple_of=32)
    """Width of the text encoder."""
    text_depth: int = Field(default=2, gt=0)
    """Layers of the text encoder."""
    max_length: int = Field(default=16, gt=0)
    """Tokens of a prompt."""
    text_encoder: Path | None = None
    """Folder of `python -m distill.text_encoder`, of these sizes; null: one that knows nothing."""
    start: Path | None = None
    """Teacher of the same sizes and in the same latents whose weights to start from; null: new ones."""


class Pretrain(Schema):
    """Train a teacher by denoising score matching (EDM, arXiv 2206.00364), or by flow matching with ``sana``."""

    kind: Literal["pretrain"] = "pretrain"
    channels: list[int] = Field(default=[32, 64, 96], min_length=1)
    """Channels per level of the U-Net."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks per level."""
    patch: int = Field(default=2, gt=0)
    """Side of the squares folded into channels."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation that the preconditioning assumes of the data."""
    drop_condition: float = Field(default=0.1, ge=0, le=1)
    """Share of samples trained without their class, for guidance."""
    noise_levels: NoiseLevels = LogNormal(mean=-1.0, std=1.2)
    """Noise levels in training."""
    sana: SanaSize | None = None
    """A text-to-image flow transformer in latents, in the place of the U-Net and its channels, layers and patch."""
    control: int | None = Field(default=None, gt=0)
    """Blocks of a control branch (ControlNet, arXiv 2302.05543) for sketches: it alone is trained, on `teacher`."""


class ScoreMatching(Pretrain):
    """Teacher score matching (MSD, arXiv 2410.23274): a new, smaller network learns the teacher's denoising.

    What it makes is no one-step student yet, but what one starts from whose network is not the teacher's.
    ``sigma_data`` is the teacher's, whatever is given here.
    """

    kind: Literal["score_matching"] = "score_matching"  # type: ignore[assignment]


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

StageMethod = Annotated[ScoreMatching | MatchingMethod, Field(discriminator="kind")]


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


class SceneCameras(Schema):
    """Where a scene is looked at from: uniform in these ranges, degrees and world units."""

    azimuth: tuple[float, float] = (0.0, 360.0)
    """0 is in front."""
    elevation: tuple[float, float] = (-10.0, 60.0)
    """Above the horizon; between -89 and 89."""
    radius: tuple[float, float] = (2.5, 3.0)
    """Distance from the origin."""
    fov: tuple[float, float] = (40.0, 40.0)
    """Whole angle of view."""
    sphere: float = Field(default=0.0, ge=0, le=1)
    """Share of views whose elevation is that of a point uniform on the sphere."""
    sectors: int = Field(default=1, gt=0)
    """How often the range of azimuths is repeated around, for what looks alike from several sides."""
    view_words: Literal["none", "sides", "degrees"] = "sides"
    """What is added to the teacher's prompt (not to the critic's): sides ", front view" and its like, degrees ", seen
    from 45 degrees" and its like, which `embedded:solids` knows."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("azimuth", "elevation", "radius", "fov"):
            low, high = getattr(self, name)
            limits = {"elevation": (-89, 89), "radius": (0.01, 1e4), "fov": (1, 170)}.get(name, (-1e4, 1e4))
            if not limits[0] <= low <= high <= limits[1]:
                raise ValueError(f"{name}: {low:g} to {high:g} is no range within {limits[0]:g} to {limits[1]:g}")
        return self


class SceneField(Schema):
    """The radiance field of a particle."""

    kind: Literal["triplane", "voxels", "hash"] = "triplane"
    """triplane is fastest on a CPU, hash on a GPU."""
    side: int = Field(default=64, gt=1)
    """Side of the planes or voxels."""
    channels: int = Field(default=16, gt=0)
    """Of the planes."""
    width: int = Field(default=32, gt=0)
    """Of the decoder."""
    levels: int = Field(default=16, gt=0)
    """Of the hash grid."""
    log_table: int = Field(default=19, gt=3, le=26)
    """Log2 of a hash table's length."""
    coarsest: int = Field(default=16, gt=1)
    """Side of the coarsest level."""
    finest: int = Field(default=2048, gt=1)
    """Side of the finest level."""
    fused: bool = False
    """tiny-cuda-nn's kernel for the hash grid (`python -m models.scene.doctor`)."""


class SceneCritic(Schema):
    """The fake score: LoRA of the teacher with a camera embedding."""

    rank: int = Field(default=4, gt=0)
    """Of every adapter."""
    path: str | None = None
    """Another teacher to adapt, e.g. one that predicts v, in the same latents; null: the teacher itself."""
    camera_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of the critic's pictures without their camera."""


class Anneal(Schema):
    """Noise levels that fall: u of ``noise_levels`` is drawn from less than [0, 1]."""

    kind: Literal["step", "sqrt"] = "step"
    """step: [0, 1] before `at`, [0, to] behind it. sqrt: the one level 1 - (1 - to) sqrt(progress) (HiFA)."""
    at: float = Field(default=0.2, ge=0, le=1)
    """Share of the stage's steps."""
    to: float = Field(default=0.5, gt=0, le=1)
    """Upper end afterwards."""


class SceneWeights(Schema):
    """Weights of a stage's regularisers; 0 leaves one out."""

    entropy: float = Field(default=0.0, ge=0)
    """Binary entropy of the pixels' opacity, against fog (volume)."""
    sparsity: float = Field(default=0.0, ge=0)
    """sqrt(opacity^2 + 0.01), against floaters (volume)."""
    creases: float = Field(default=0.0, ge=0)
    """Total variation of a mesh's normals: flat sides, sharp edges (geometry)."""
    normals: float = Field(default=0.0, ge=0)
    """1 - cosine between the normals of neighbouring faces (geometry)."""
    laplacian: float = Field(default=0.0, ge=0)
    """Squared second difference of the signed distances (geometry)."""


SceneMatching = Annotated[DiffInstruct | FDistill | SIM | SiD | UniInstruct, Field(discriminator="kind")]


class SceneStage(Schema):
    """One stage; it starts from the stage before."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of its folder."""
    kind: Literal["volume", "geometry", "texture"]
    """volume: fields; geometry: marching tetrahedra from the fields' surface; texture: colours on fixed meshes."""
    share: float = Field(gt=0, le=1)
    """Its share of train.steps; the shares of all stages make 1."""
    matching: SceneMatching = DiffInstruct()
    """The row of the distribution-matching table; diff_instruct is VSD."""
    fake: Literal["noise", "lora", "exact"] = "lora"
    """The particles' score: that of one sample (SDS), a trained critic (VSD), or the exact one of all particles."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: the teacher's."""
    latents: float = Field(default=1.0, ge=0)
    """Weight of the row's loss, which is in the teacher's latents."""
    pictures: float = Field(default=0.0, ge=0)
    """Weight of SDS in pictures (HiFA, arXiv 2305.18766): half the squared distance, over all pixels, to the decoded
    picture that the teacher sees in the noised one. Smooth and of the right colour; what views differ in is evened."""
    anneal: Anneal = Anneal()
    """How the noise levels fall."""
    resolutions: list[tuple[float, int]] = Field(default=[(0.0, 64)], min_length=1)
    """Pixels a side from each share of the steps on; pictures are then resized to the teacher's size."""
    samples: int = Field(default=48, gt=1)
    """Samples a ray (volume); lowered where memory would not do."""
    picture: Literal["colour", "shaded", "normals"] = "colour"
    """What the teacher sees of a mesh (geometry, texture)."""
    tetrahedra: int = Field(default=48, gt=3)
    """Cells a side of the grid of tetrahedra (geometry)."""
    weights: SceneWeights = SceneWeights()
    """Regularisers."""
    student: Optimizer | None = None
    """Optimizer of the particles; null: the run's."""
    critic: Optimizer | None = None
    """Optimizer of the critic; null: the run's."""

    @field_validator("resolutions")
    @classmethod
    def _rising(cls, resolutions: list[tuple[float, int]]) -> list[tuple[float, int]]:
        shares = [share for share, _ in resolutions]
        if shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] >= 1 or min(s for _, s in resolutions) < 8:
            raise ValueError("shares must rise from 0 and stay below 1, sizes must be 8 or more")
        return resolutions

    @model_validator(mode="after")
    def _all_is_used(self) -> Self:
        terms = {"volume": ["entropy", "sparsity"], "geometry": ["creases", "normals", "laplacian"], "texture": []}
        matching = ["start", "sigma_init", "clip_samples", "student_steps", "reuse_samples", "regression"]
        weights = [name for name in SceneWeights.model_fields if name not in terms[self.kind]]
        for part, names in (("weights", weights), ("matching", matching)):
            values = getattr(self, part)
            for name in names:
                if getattr(values, name) != type(values).model_fields[name].default:
                    raise ValueError(f"{part}.{name}: a stage of kind {self.kind} has no use for it: remove the key")
        if self.kind == "texture" and self.picture == "normals":
            raise ValueError("picture: normals show no texture: choose colour or shaded")
        return self

    @model_validator(mode="after")
    def _fake_fits(self) -> Self:
        if self.latents == 0 and self.pictures == 0:
            raise ValueError("latents, pictures: one of them must be above 0")
        if self.fake != "lora" and self.matching.kind != "diff_instruct":
            raise ValueError(f"fake: {self.matching.kind} needs a trained critic: choose lora")
        return self


class SceneExport(Schema):
    """The files made at the end."""

    threshold: float | None = Field(default=None, gt=0)
    """Density of the surface, 1 / world unit; null: found from the pictures' opacity."""
    faces: int = Field(default=6000, ge=100)
    """Triangles that the mesh is simplified to."""
    texture: int = Field(default=512, ge=64)
    """Side of the texture, pixels."""
    frames: int = Field(default=48, gt=0)
    """Pictures of the turntable."""
    size: int = Field(default=256, ge=32, multiple_of=2)
    """Their side, pixels."""


class SceneDistillation(Schema):
    """Text to 3D by variational score distillation (ProlificDreamer, arXiv 2305.16213), in stages."""

    kind: Literal["scene_distillation"] = "scene_distillation"
    prompt: str = Field(min_length=1)
    """What to make; --prompt for short."""
    template: str = "{}"
    """Sentence that the prompt is put into for the teacher; words before {} that the prompt has too are not doubled."""
    particles: int = Field(default=1, gt=0)
    """Fields that are trained together, with one critic."""
    cameras: SceneCameras = SceneCameras()
    """Views in training."""
    field: SceneField = SceneField()
    """Representation."""
    box_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Centre of the cube that holds everything, world units."""
    box_half: float = Field(default=1.0, gt=0)
    """Half its side."""
    blob_strength: float = 10.0
    """Density at the start, of softplus(strength (1 - distance / radius)): 10 for objects, -10 for hollow scenes."""
    blob_radius: float = Field(default=0.5, gt=0)
    """In half sides of the box."""
    blob_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """In half sides from the box's centre."""
    backdrop: Literal["studio", "learned", "random", "white", "black", "grey"] = "learned"
    """studio: the wall and floor of solids; learned: a network of the direction, or half the time a plain colour."""
    critic: SceneCritic = SceneCritic()
    """The fake score."""
    stages: list[SceneStage] = Field(min_length=1)
    """What is trained, in order: those of kind volume, at most one of kind geometry, those of kind texture."""
    only: str | None = None
    """Run this stage alone; null: all."""
    stage: str | None = None
    """Which stage this run is; set in the folders of stages."""
    start: Path | None = None
    """Run folder of the stage before; set in the folders of stages."""
    export: SceneExport = SceneExport()
    """The files made at the end."""

    @property
    def sentence(self) -> str:
        """What the teacher is asked for."""
        return self.template.replace("{}", self.prompt.removeprefix(self.template.partition("{}")[0]))

    @model_validator(mode="after")
    def _order(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have one name: {names}")
        kinds = [stage.kind for stage in self.stages]
        if self.stage is not None:
            return self
        order = ["volume", "geometry", "texture"]
        if kinds[0] != "volume" or kinds.count("geometry") > 1 or kinds != sorted(kinds, key=order.index):
            raise ValueError(
                "stages: first those of kind volume, one or more, then at most one of kind geometry, then those of "
                "kind texture"
            )
        for name in (self.only, self.stage):
            if name is not None and name not in names:
                raise ValueError(f"there is no stage {name}; there are {names}")
        if abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"stages: the shares {[stage.share for stage in self.stages]} do not make 1")
        if self.template.count("{}") != 1:
            raise ValueError("template: write {} once, where the prompt belongs")
        return self


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


# --------------------------------------------------------------------------------------------- reading and errors


MOST_PROBLEMS = 20
"""Of a file that are named."""


def _variants(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for arg in get_args(annotation) for model in _variants(arg)]


def _known_keys(model: type[BaseModel], values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys that are allowed under ``model``, of a union only those of the variant that ``values`` chooses."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = values.get(name) if isinstance(values, dict) else None
        kind = inner.get("kind") if isinstance(inner, dict) else None
        for variant in _variants(field.annotation):
            if kind is None or "kind" not in variant.model_fields or variant.model_fields["kind"].default == kind:
                yield from _known_keys(variant, inner, f"{prefix}{name}.")


def _hint(key: str, keys: list[str]) -> str:
    """The known key that ``key`` was probably meant to be: alike in its last part, rather under the same parent."""

    def likeness(other: str) -> float:
        parent, _, last = key.rpartition(".")
        other_parent, _, other_last = other.rpartition(".")
        return difflib.SequenceMatcher(None, last, other_last).ratio() + 0.1 * (parent == other_parent)

    key = re.sub(r"\.\d+", "", key)  # keys do not know the places in a list
    best = max(keys, key=likeness)
    return f"; did you mean '{best}'?" if likeness(best) > 0.75 else ""


def _explain(error: ValidationError, values: Any, source: str) -> str:
    """All problems of a file in a line: key, what is wrong, what was given."""
    keys = list(dict.fromkeys(_known_keys(Config, values)))
    lines = []
    for item in error.errors():
        where, value, model = [], values, None
        for part in item["loc"]:
            if isinstance(value, dict) and part not in value and value.get("kind") == part:
                continue  # pydantic puts the union's tag into the path; the file has no such level
            where.append(str(part))
            if isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                value = value.get(part) if isinstance(value, dict) else model
        key = ".".join(where)
        match item["type"]:
            case "extra_forbidden":
                lines.append(f"{key}: unknown key{_hint(key, keys)}")
            case "missing":
                lines.append(f"{key}: missing")
            case "union_tag_invalid" | "union_tag_not_found":
                allowed = item.get("ctx", {}).get("expected_tags", "see --help")
                lines.append(f"{key}.kind: must be one of {allowed}")
            case _:
                lines.append(f"{key}: {item['msg']} (got {item['input']!r:.200})")
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    return f"{source}: " + "; ".join(lines[:MOST_PROBLEMS] + more)


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked; UserError if there are none to be had."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def check(values: dict[str, Any], source: str) -> Config:
    """The configuration that ``values`` are; UserError in one line that names every problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, values, source)) from error


def read_config(path: Path) -> Config:
    """The configuration in a YAML file."""
    return check(read_values(path), str(path))


def write_config(config: Config, path: Path) -> None:
    replace_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def override(values: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """``values`` with ``--dotted.key value`` or ``--dotted.key=value`` put in; values are read as YAML.

    UserError for a key that is given twice, as in a file.
    """
    values, rest, given = copy.deepcopy(values), list(arguments), list[str]()
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise UserError(f"command line: expected --key value, found '{argument}'")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"command line: --{key} has no value")
            text = rest.pop(0)
        name = key.replace("-", "_")
        if lost := [before for before in given if f"{before}.".startswith(f"{name}.")]:
            said = "is given twice" if lost[0] == name else f"would take away --{lost[0]}, which stands before it"
            raise UserError(f"command line: --{key} {said}: give each key once, a whole section before its keys")
        given.append(name)
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        try:
            place[last] = read_yaml(text)
        except KeyGivenTwice as error:
            raise UserError(f"--{key}: {error}") from error
        except yaml.YAMLError:
            place[last] = text
    return values


def show_help(path: Path | None) -> None:
    """Every key with its meaning; with a file, that file's method and values."""
    epilogue = (
        "--dry-run prints the resolved configuration with an estimate of time and memory, and ends. Each key is given "
        "once, a section before keys of its own."
    )
    if path is None:
        print(f"usage: train.py --config FILE [--key.sub value ...] [--dry-run]\n\n{epilogue}")
        print("--config FILE --help shows every key of that file's kind of run, and its values as defaults.")
        return
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    description = f"Defaults are the values of {path}. {epilogue}"
    tyro.cli(
        Config, args=["--help"], default=read_config(path), prog="train.py", description=description, config=options
    )


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"command line: --{self.dest} is given twice")
        setattr(namespace, self.dest, values)


def parse(argv: list[str]) -> tuple[Config, bool]:
    """The configuration that a command line asks for, and whether it is only to be shown (``--dry-run``)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, action=_Once)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--prompt", action=_Once)
    known, rest = parser.parse_known_args(argv)
    if known.prompt is not None:
        rest.append(f"--method.prompt={json.dumps(known.prompt, ensure_ascii=False)}")  # whatever YAML makes of it
    if known.help:
        show_help(known.config)
        sys.exit(0)
    if known.config is None:
        raise UserError("--config is missing: give one, e.g. --config configs/fashion_mnist/quickstart.yaml")
    source = f"{known.config} with the command line" if rest else str(known.config)
    return check(override(read_values(known.config), rest), source), known.dry_run
