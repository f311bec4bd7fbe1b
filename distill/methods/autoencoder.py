"""Train the autoencoder in whose latents a text-to-image teacher works (DC-AE, arXiv 2410.10733, without its GAN)."""

from typing import cast

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from distill.methods.base import Logs, Turn
from distill.settings import Autoencoder
from models.condition import Condition


class Reconstruction(nn.Module):
    """Pictures to pictures through noised latents; keeps the latents' standard deviation, which becomes their scale.

    With a ``fixed`` encoder the decoder alone has gradients, and the scale stays.
    """

    scale: Tensor

    def __init__(self, vae: AutoencoderDC, fixed: bool = False):
        super().__init__()
        self.vae, self.fixed = vae, fixed
        self.register_buffer("scale", torch.tensor(1 / vae.config["scaling_factor"] if fixed else 1.0))

    def requires_grad_(self, requires_grad: bool = True) -> "Reconstruction":
        super().requires_grad_(requires_grad)
        if self.fixed:
            cast(nn.Module, self.vae).encoder.requires_grad_(False)
        return self

    def forward(self, pictures: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the latents that ``noise`` (B, C, h, w) was added to."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            latents = self.vae.encode(pictures).latent  # type: ignore[union-attr]
        if noise is not None and not self.fixed:
            deviation = latents.detach().std().to(self.scale.dtype)
            # the optimizer skips what is not finite; one such batch must not stay in the average for ever
            self.scale.lerp_(torch.where(deviation.isfinite(), deviation, self.scale), 0.05)
        noised = latents if noise is None else latents + noise
        return self.vae.decode(noised).sample, latents  # type: ignore[union-attr]


def moment_divergence(latents: Tensor) -> Tensor:
    """KL(N(m, v) || N(0, 1)) with mean m and variance v of each channel of (B, C, h, w), its mean over channels.

    Without it latents grow to drown the noise, and the loudest channel alone survives.
    """
    variance, mean = torch.var_mean(latents.float(), dim=(0, 2, 3))
    return 0.5 * (mean.square() + variance - 1 - variance.clamp(min=1e-8).log()).mean()


class AutoencoderTraining:
    """Squared error of pixels and of the differences of neighbouring ones, which keep edges sharp; no critic.

    Not L1: most pixels are background, and the median of a picture has no solids.
    """

    def __init__(self, settings: Autoencoder, vae: AutoencoderDC, shape: tuple[int, int, int], examples: Tensor):
        self.settings, self.shape, self.examples = settings, shape, examples
        self.network = Reconstruction(vae, fixed=settings.start is not None).requires_grad_()
        self.networks: dict[str, nn.Module] = {"student": self.network}
        self.buffers: dict[str, nn.Module] = {}
        self.frozen: list[nn.Module] = []
        self.critic_turns = 0
        self.pictures = {"student"}

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert turn.real is not None
        pictures = turn.real.images
        noise = self.settings.latent_noise * turn.draws.normal(*self.shape)
        made, latents = self.networks["student"](pictures, noise)
        error = made - pictures
        pixels = error.square().mean()
        edges = error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()
        deviation = moment_divergence(latents)
        logs: Logs = {
            "mse": pixels.detach(),
            "psnr": 10 * torch.log10(4 / pixels.detach()),
            "latent_std": self.network.scale.clone(),
            "latent_kl": deviation.detach(),
        }
        return pixels + self.settings.edge_weight * edges + self.settings.latent_weight * deviation, logs

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        raise NotImplementedError("an autoencoder has no critic turns")

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        """Reconstructions of the same few pictures, whatever ``z`` is."""
        return self.network(self.examples.to(z.device))[0]

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor:
        return self.examples.to(z.device)

    def diagnose(self) -> Logs:
        return {}

    def exported(self) -> nn.Module:
        if not self.network.fixed:
            self.network.vae.register_to_config(scaling_factor=1 / float(self.network.scale))
        return self.network.vae
