"""Autoencoders of stock pipelines, with the scaling that the pipeline gives their latents."""

from collections.abc import Collection
from typing import Any

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from torch import Tensor

from models.errors import UserError
from models.teachers.keys import note

SCALING = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})


class Latents:
    """An autoencoder as the teacher's latents are scaled: ``(z - mean) * scale`` by its own config.

    ``used`` are the keys of its scaling that the stock pipeline reads.
    """

    def __init__(self, vae: Any, used: Collection[str] = ("scaling_factor",)):
        self.vae, config = vae, vae.config
        self.video = isinstance(vae, AutoencoderKLQwenImage)
        """Whether it encodes videos, here of one frame."""
        column = lambda values: torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
        value = lambda key: config.get(key) if key in used else None
        self.mean, self.scale = torch.tensor(float(value("shift_factor") or 0.0)), torch.tensor(1.0)
        self.scale = self.scale * float(value("scaling_factor") or 1.0)
        if value("latents_mean") is not None and value("latents_std") is not None:
            self.mean, self.scale = column(config["latents_mean"]), self.scale / column(config["latents_std"])

    @property
    def channels(self) -> int:
        return self.vae.config["z_dim" if self.video else "latent_channels"]

    @property
    def factor(self) -> int:
        """Pixels to a latent along a side."""
        if self.video:
            return 2 ** len(self.vae.temperal_downsample)
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to latents (B, C, h, w): the mode of their distribution."""
        device = self.vae.device
        inputs = pictures.to(device, self.vae.dtype)
        coded = self.vae.encode(inputs.unsqueeze(2) if self.video else inputs)
        z = coded.latents if isinstance(self.vae, AutoencoderTiny) else coded.latent_dist.mode()
        z = (z.squeeze(2) if self.video else z).float()
        return ((z - self.mean.to(device)) * self.scale.to(device)).to(pictures.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse; not clamped."""
        device = self.vae.device
        z = (latents.to(device) / self.scale.to(device) + self.mean.to(device)).to(self.vae.dtype)
        pictures = self.vae.decode(z.unsqueeze(2) if self.video else z, return_dict=False)[0]
        return (pictures.squeeze(2) if self.video else pictures).float().to(latents.device)


def checked(vae: Any, used: Collection[str], pipeline: str) -> Latents:
    """Of an autoencoder that was just read; a scaling that the stock pipeline does not read is named. UserError for a
    class of autoencoders that is not known."""
    if not isinstance(vae, AutoencoderKL | AsymmetricAutoencoderKL | AutoencoderTiny | AutoencoderKLQwenImage):
        raise UserError(
            f"teacher: its autoencoder is a {type(vae).__name__}; AutoencoderKL, AsymmetricAutoencoderKL, "
            "AutoencoderTiny and AutoencoderKLQwenImage are read: put one of them into the folder"
        )
    for key in sorted(SCALING - set(used)):
        if vae.config.get(key):
            note(f"vae/config.json: {key} is not read, as {pipeline} does not read it")
    if (vae.config.get("latents_mean") is None) != (vae.config.get("latents_std") is None):
        raise UserError("teacher: vae/config.json: latents_mean and latents_std go together: one of them is missing")
    return Latents(vae, used)
