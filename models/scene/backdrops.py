"""What is behind a particle: a background for every ray, RGB in [0, 1]."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scene import solids


class Backdrop(nn.Module, ABC):
    """``backdrop(origins (B, 3), directions (B, 3, H, W), azimuths (B,), noise (B, 4))``: RGB (B, 3, H, W) in [0, 1].

    ``noise`` is uniform in [0, 1): what may change from picture to picture is taken from it. Azimuths are degrees.
    """

    @abstractmethod
    def forward(self, origins: Tensor, directions: Tensor, azimuths: Tensor, noise: Tensor) -> Tensor: ...


class Plain(Backdrop):
    """One colour for a picture: a given one, or None for a random one."""

    def __init__(self, colour: tuple[float, float, float] | None):
        super().__init__()
        self.colour = colour

    def forward(self, origins: Tensor, directions: Tensor, azimuths: Tensor, noise: Tensor) -> Tensor:
        colour = noise[:, :3] if self.colour is None else noise.new_tensor([self.colour]).expand(len(noise), 3)
        return colour[:, :, None, None].expand(directions.shape)


class Learned(Backdrop):
    """A small network of the direction; in a share ``plain`` of the pictures a random colour, so that what belongs to
    the object is not left to it."""

    def __init__(self, plain: float = 0.5, frequencies: int = 3, width: int = 32):
        super().__init__()
        self.plain, self.frequencies = plain, frequencies
        self.layers = nn.Sequential(nn.Linear(6 * frequencies, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, origins: Tensor, directions: Tensor, azimuths: Tensor, noise: Tensor) -> Tensor:
        scales = 2.0 ** torch.arange(self.frequencies, device=noise.device)
        waves = directions.movedim(1, -1)[..., None, :] * scales[:, None]
        features = torch.cat([waves.sin(), waves.cos()], -1).flatten(-2)
        learned = torch.sigmoid(self.layers(features)).movedim(-1, 1)
        plain = noise[:, :3, None, None].expand_as(learned)
        return torch.where((noise[:, 3] < self.plain)[:, None, None, None], plain, learned)


def light(azimuths: Tensor, noise: Tensor) -> Tensor:
    """Unit (B, 3) towards a lamp above the scene, within 60 degrees of the camera to either side: the solids world's.

    ``azimuths`` (B,) of the cameras in degrees; which side ``noise`` (B, 4) says, so it fits the backdrop's.
    """
    angle = torch.deg2rad(azimuths + (noise[:, 1] - 0.5) * 120)
    return F.normalize(torch.stack([angle.sin(), torch.full_like(angle, 1.3), angle.cos()], 1), dim=1)


class Studio(Backdrop):
    """Wall, floor and soft shadow of the solids world, as its pictures have them: tone and light are random, the light
    within 60 degrees of the camera. The shadow is that of a ball on the floor."""

    def __init__(self, radius: float = 0.7):
        super().__init__()
        self.radius = radius

    def forward(self, origins: Tensor, directions: Tensor, azimuths: Tensor, noise: Tensor) -> Tensor:
        count, device = len(origins), origins.device
        centre = torch.tensor([[0.0, solids.FLOOR + self.radius, 0.0]], device=device).expand(count, 3)
        grey = solids.backdrop(
            0.40 + 0.12 * noise[:, 0],
            origins,
            directions.flatten(2),
            light(azimuths, noise),
            torch.arange(count, device=device),
            centre,
            torch.full((count,), self.radius, device=device),
        )
        return grey.view(count, 1, *directions.shape[2:]).expand(directions.shape)
