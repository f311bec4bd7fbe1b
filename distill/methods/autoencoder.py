"""Train the autoencoder in whose latents a text-to-image teacher works (DC-AE, arXiv 2410.10733, without its GAN)."""

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from distill.methods.base import Logs, Turn
from distill.settings import Autoencoder
from models.condition import Condition


class Reconstruction(nn.Module):
    """Pictures to pictures through noised latents; keeps the latents' standard deviation, which becomes their scale."""

    scale: Tensor

    def __init__(self, vae: AutoencoderDC):
        super().__init__()
        self.vae = vae
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """``noise`` (B, C, h, w) in units of the latents' own standard deviation."""
        latents = self.vae.encode(pictures).latent  # type: ignore[union-attr]
        if noise is not None:
            std = latents.detach().std()
            self.scale.lerp_(std.to(self.scale.dtype), 0.05)
            latents = latents + std * noise
        return self.vae.decode(latents).sample  # type: ignore[union-attr]


class AutoencoderTraining:
    """L1 on pixels and on the differences of neighbouring ones, which keep edges sharp; no critic."""

    def __init__(self, settings: Autoencoder, vae: AutoencoderDC, shape: tuple[int, int, int], examples: Tensor):
        self.settings, self.shape, self.examples = settings, shape, examples
        self.network = Reconstruction(vae)
        self.networks: dict[str, nn.Module] = {"student": self.network}
        self.buffers: dict[str, nn.Module] = {}
        self.frozen: list[nn.Module] = []
        self.critic_turns = 0
        self.pictures = {"student"}

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert turn.real is not None
        pictures = turn.real.images
        noise = self.settings.latent_noise * turn.draws.normal(*self.shape)
        made = self.networks["student"](pictures, noise)
        error = made - pictures
        pixels = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mse = error.detach().square().mean()
        logs: Logs = {
            "l1": pixels.detach(),
            "psnr": 10 * torch.log10(4 / mse),
            "latent_std": self.network.scale.clone(),
        }
        return pixels + self.settings.edge_weight * edges, logs

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        raise NotImplementedError("an autoencoder has no critic turns")

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        """Reconstructions of the same few pictures, whatever ``z`` is."""
        return self.network(self.examples.to(z.device))

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor:
        return self.examples.to(z.device)

    def exported(self) -> nn.Module:
        self.network.vae.register_to_config(scaling_factor=1 / float(self.network.scale))
        return self.network.vae
