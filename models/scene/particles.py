"""The generators of text to 3D: particles that are drawn from cameras (ProlificDreamer, arXiv 2305.16213)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from models.process import expand_to
from models.scene.backdrops import Backdrop
from models.scene.cameras import Camera, rays
from models.scene.fields import Field
from models.scene.volume import Occupancy, render


@dataclass(frozen=True)
class Views:
    """What to draw: B views of ``size`` x ``size`` pixels, view b of particle ``particles[b]``.

    noise:   (B, 4) uniform in [0, 1), for the backdrop
    jitter:  (B, H, W) uniform in [0, 1), for the samples along the rays; None: none
    """

    cameras: Sequence[Camera]
    particles: Sequence[int]
    size: int
    noise: Tensor
    jitter: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cameras)

    @staticmethod
    def plain(cameras: Sequence[Camera], particle: int, size: int, device: torch.device | str = "cpu") -> "Views":
        """Views of one particle without anything random."""
        noise = torch.full((len(cameras), 4), 0.5, device=device)
        return Views(cameras, [particle] * len(cameras), size, noise)


@dataclass(frozen=True)
class Drawn:
    """``images`` (B, 3, H, W) in [-1, 1], ``opacity`` (B, 1, H, W), and regularisers, scalars by name."""

    images: Tensor
    opacity: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Generator(nn.Module):
    """Something with particles to draw."""

    def forward(self, views: Views) -> Drawn:
        raise NotImplementedError

    def prepare(self, step: int) -> None:
        """Called before every training step; no gradient, nothing random but by ``step``."""

    def held(self) -> list[nn.Module]:
        """Frozen modules that it uses and that are not its own."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """What a scene's folder keeps of it."""
        return self.state_dict()


def binary_entropy(p: Tensor) -> Tensor:
    """Of probabilities, in nats; finite with its slope at 0 and 1."""
    p = p.clamp(1e-4, 1 - 1e-4)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def posterior_mean(x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] (B, C, H, W) where x0 is one of ``x0`` (B, n, C, H, W), each as likely: the exact denoiser of n
    particles seen from one camera. With n = 1 it is that one, exactly."""
    alpha, sigma = expand_to(alpha, x0), expand_to(sigma, x0)
    distance = ((x_t[:, None] - alpha * x0) ** 2 / (2 * sigma**2)).flatten(2).sum(2)
    return (expand_to((-distance).softmax(1), x0) * x0).sum(1)


class Fields(Generator):
    """Stage one: radiance fields, volume-rendered, over one backdrop. Occupancy is part of the state."""

    def __init__(self, fields: Sequence[Field], backdrop: Backdrop, samples: int, update_every: int = 16):
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.occupancy = nn.ModuleList(Occupancy(f.box) for f in fields)
        self.backdrop, self.samples, self.update_every = backdrop, samples, update_every

    def prepare(self, step: int) -> None:
        if step and step % self.update_every == 0:
            for index, occupancy in enumerate(self.occupancy):
                cast(Occupancy, occupancy).update(self.particle(index))

    def particle(self, index: int) -> Field:
        return cast(Field, self.fields[index])

    def all(self) -> list[Field]:
        return [self.particle(index) for index in range(len(self.fields))]

    def forward(self, views: Views) -> Drawn:
        size, device = views.size, views.noise.device
        origins, directions = (part.to(device) for part in rays(views.cameras, size))
        azimuths = torch.tensor([camera.azimuth for camera in views.cameras], device=device)
        behind = self.backdrop(origins, directions, azimuths, views.noise)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for particle in sorted(set(views.particles)):
            rows = torch.tensor([b for b, p in enumerate(views.particles) if p == particle], device=device)
            start = origins[rows, None].expand(-1, size * size, 3).reshape(-1, 3)
            heading = directions[rows].flatten(2).transpose(1, 2).reshape(-1, 3)
            jitter = None if views.jitter is None else views.jitter[rows].flatten()
            occupancy = cast(Occupancy, self.occupancy[particle])
            met = render(self.particle(particle), start, heading, self.samples, occupancy, jitter)
            shape = (len(rows), size, size)
            parts.append((rows, met.colour.view(*shape, 3).movedim(-1, 1), met.opacity.view(*shape)[:, None]))
        order = torch.cat([rows for rows, _, _ in parts]).argsort()
        colour = torch.cat([part for _, part, _ in parts])[order]
        opacity = torch.cat([part for _, _, part in parts])[order]
        images = (colour + (1 - opacity) * behind) * 2 - 1
        terms = {
            "entropy": binary_entropy(opacity).mean(),
            "sparsity": (opacity.square() + 0.01).sqrt().mean(),
        }
        return Drawn(images, opacity, terms)
