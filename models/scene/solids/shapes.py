"""Signed distance functions of the six shapes."""

import math

import torch
from torch import Tensor

from models.scene.captions import SHAPES

_CUBE = 3**-0.5
_CYLINDER = (0.66, (1 - 0.66**2) ** 0.5)
_TORUS = (0.7, 0.3)
_CONE_BASE = -0.5
_PYRAMID_BASE = -0.36
_TINY = 1e-30  # under a square root, whose slope at 0 would make gradients NaN


def unit_sdf(shape: str, points: Tensor) -> Tensor:
    """Exact signed distance (...,) from ``points`` (..., 3) to a shape that touches the unit sphere from inside.

    The shape's own frame: y is the axis of all but the cube and the sphere; the torus lies, cone and pyramid point up.
    """
    x, y, z = points.unbind(-1)
    match shape:
        case "sphere":
            return _length(x, y, z) - 1
        case "cube":
            x, y, z = x.abs() - _CUBE, y.abs() - _CUBE, z.abs() - _CUBE
            outside = _length(x.clamp(min=0), y.clamp(min=0), z.clamp(min=0))
            return outside + torch.maximum(x, torch.maximum(y, z)).clamp(max=0)
        case "cylinder":
            u, v = _length(x, z) - _CYLINDER[0], y.abs() - _CYLINDER[1]
            return _length(u.clamp(min=0), v.clamp(min=0)) + torch.maximum(u, v).clamp(max=0)
        case "torus":
            return _length(_length(x, z) - _TORUS[0], y) - _TORUS[1]
        case "cone":
            rim = (1 - _CONE_BASE**2) ** 0.5
            r, y = _length(x, z), y - _CONE_BASE
            normal, along = _slant(r - rim, y, rim, 1 - _CONE_BASE)
            base = (r - rim).clamp(min=0).square() + y * y
            side = normal.square() + (along - along.clamp(0, _hypotenuse(rim, 1 - _CONE_BASE))).square()
            return _signed(torch.minimum(base, side), (normal < 0) & (y > 0))
        case "pyramid":
            # Mirror planes fold the four faces into half of one: 0 <= z <= x.
            half, height = ((1 - _PYRAMID_BASE**2) / 2) ** 0.5, 1 - _PYRAMID_BASE
            x, z = torch.maximum(x.abs(), z.abs()), torch.minimum(x.abs(), z.abs())
            y = y - _PYRAMID_BASE
            slant = _hypotenuse(half, height)
            normal, along = _slant(x - half, y, half, height)
            base = (x - half).clamp(min=0).square() + (z - half).clamp(min=0).square() + y * y
            # In the plane of the face, the edge from the corner (0, half) to the apex (slant, 0).
            beyond, up = _slant(z - half, along, half, slant)
            edge = beyond.square() + (up - up.clamp(0, _hypotenuse(half, slant))).square()
            face = normal.square() + edge * ((along < 0) | (beyond > 0))
            return _signed(torch.minimum(base, face), (normal < 0) & (y > 0))
    raise ValueError(f"no shape '{shape}'; there are {SHAPES}")


def _length(*parts: Tensor) -> Tensor:
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = torch.addcmul(total, part, part)
    return total.clamp(min=_TINY).sqrt()


def _hypotenuse(run: float, rise: float) -> float:
    return (run * run + rise * rise) ** 0.5


def _slant(x: Tensor, y: Tensor, run: float, rise: float) -> tuple[Tensor, Tensor]:
    """Coordinates across (outwards) and along the line from (0, 0) to (-run, rise)."""
    scale = 1 / _hypotenuse(run, rise)
    return x * (rise * scale) + y * (run * scale), y * (rise * scale) - x * (run * scale)


def _signed(squared: Tensor, inside: Tensor) -> Tensor:
    distance = squared.clamp(min=_TINY).sqrt()
    return torch.where(inside, -distance, distance)


def rest_height(shape: str, tilt: float) -> float:
    """Height of a shape's centre above what it rests on, in radii; ``tilt`` (degrees) counts for the torus alone."""
    match shape:
        case "cube":
            return _CUBE
        case "pyramid":
            return -_PYRAMID_BASE
        case "torus":
            return _TORUS[0] * math.sin(math.radians(tilt)) + _TORUS[1]
        case "cylinder":
            return _CYLINDER[1]
        case "cone":
            return -_CONE_BASE
        case _:
            return 1.0
