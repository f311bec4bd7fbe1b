"""Training of autoencoders and teachers."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from distill.noise_levels import LogNormal, NoiseLevels
from distill.schema import Schema


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
    """Folder of `python -m distill.workshop.text_encoder`, of these sizes; null: one that knows nothing."""
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
