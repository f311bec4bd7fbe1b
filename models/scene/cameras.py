"""Pinhole cameras that look at the origin. Right-handed, y up, a camera looks along its own -z (as in OpenGL).

Azimuth 0 is in front, at +z; positive azimuth goes towards +x. Angles are degrees, lengths are world units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.scene.captions import TURN


@dataclass(frozen=True)
class Camera:
    """``elevation`` strictly between -90 and 90; ``fov`` is the whole angle of view, of the square picture's side."""

    azimuth: float = 0.0
    elevation: float = 20.0
    radius: float = 4.0
    fov: float = 40.0

    @property
    def slope(self) -> float:
        """Half the picture's side at distance 1."""
        return math.tan(math.radians(self.fov) / 2)

    @property
    def axes(self) -> tuple[tuple[float, float, float], ...]:
        """The camera's x (right), y (up) and z (towards the camera) axes in the world."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        right = (math.cos(a), 0.0, -math.sin(a))
        up = (-math.sin(e) * math.sin(a), math.cos(e), -math.sin(e) * math.cos(a))
        return right, up, (math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a))

    def to_camera(self, point: Sequence[float]) -> tuple[float, float, float]:
        """A world point in camera coordinates: right, up, towards the camera."""
        x, y, z = (sum(a * p for a, p in zip(axis, point, strict=True)) for axis in self.axes)
        return x, y, z - self.radius

    @property
    def view(self) -> str:
        """One of ``captions.VIEWS``: front and back are sectors of 60 degrees, as ProlificDreamer has them."""
        turned = abs((self.azimuth + 180) % 360 - 180)
        return "front" if turned <= 30 else "back" if turned >= 150 else "side"

    @property
    def seen(self) -> tuple[str, str]:
        """How ``captions.SEEN`` puts it: coarsely (from above 60 degrees "overhead view"), and to 15 degrees."""
        angle = round(self.azimuth / TURN) * TURN % 360
        return f"{'overhead' if self.elevation > 60 else self.view} view", f"seen from {angle} degrees"


def camera_to_world(cameras: Sequence[Camera]) -> Tensor:
    """(B, 4, 4) float32 matrices; ``.flatten(1)`` is what ``Condition.camera`` takes."""
    rows = []
    for camera in cameras:
        columns = [*camera.axes, tuple(camera.radius * c for c in camera.axes[2])]
        rows.append([[column[i] for column in columns] for i in range(3)] + [[0.0, 0.0, 0.0, 1.0]])
    return torch.tensor(rows, dtype=torch.float32)


def rays(cameras: Sequence[Camera], size: int) -> tuple[Tensor, Tensor]:
    """Origins (B, 3) and unit directions (B, 3, H, W) through the pixel centres of ``size`` x ``size`` pictures."""
    matrix = camera_to_world(cameras)
    grid = (torch.arange(size) + 0.5) * (2 / size) - 1
    slope = torch.tensor([camera.slope for camera in cameras])[:, None, None, None]
    right, up, back = matrix[:, :3, :3, None, None].unbind(2)
    directions = right * (slope * grid) - up * (slope * grid[:, None]) - back
    length = (1 + slope.square() * (grid.square() + grid[:, None].square())).sqrt()
    return matrix[:, :3, 3], directions / length


@dataclass(frozen=True)
class Orbit:
    """Where cameras are drawn from: uniform in these ranges, angles in degrees; in a share ``sphere`` of the draws the
    elevation is that of a point uniform on the sphere between the same bounds.

    The range of azimuths is repeated ``sectors`` times around, for what looks alike from several sides.
    """

    azimuth: tuple[float, float] = (0.0, 360.0)
    elevation: tuple[float, float] = (15.0, 28.0)
    radius: tuple[float, float] = (3.9, 4.2)
    fov: tuple[float, float] = (40.0, 40.0)
    sphere: float = 0.0
    sectors: int = 1

    def camera(self, uniforms: Sequence[float]) -> Camera:
        """The camera of six numbers in [0, 1)."""
        between = lambda ends, u: ends[0] + (ends[1] - ends[0]) * u
        azimuth, elevation, radius, fov = (
            between(ends, u)
            for ends, u in zip((self.azimuth, self.elevation, self.radius, self.fov), uniforms, strict=False)
        )
        azimuth += 360 / self.sectors * int(self.sectors * uniforms[5])
        if uniforms[4] < self.sphere:
            heights = [math.sin(math.radians(e)) for e in self.elevation]
            elevation = math.degrees(math.asin(between(heights, uniforms[1])))
        return Camera(azimuth, elevation, radius, fov)

    def turntable(self, count: int, start: float = 0.0) -> list[Camera]:
        """``count`` cameras around, at the middle of the other ranges; the first at azimuth ``start``."""
        middle = [sum(ends) / 2 for ends in (self.elevation, self.radius, self.fov)]
        return [Camera(start + 360 * i / count, *middle) for i in range(count)]
