"""Scenes of one to four solids, each a function of its seed.

Solids rest on a floor or float above it; in a scene's own camera none hides another and all are wholly visible.
"""

import itertools
import math
import random
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.scene.cameras import Camera
from models.scene.captions import COLOURS, SHAPES, Metadata, Thing, describe, draw, pick, seen, things_of
from models.scene.solids.shapes import rest_height, unit_sdf
from models.seeds import mix

FLOOR = -0.8
"""Height of the floor."""

RGB = {
    "red": (0.88, 0.09, 0.10),
    "orange": (1.00, 0.50, 0.04),
    "yellow": (1.00, 0.90, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.10, 0.28, 0.92),
    "purple": (0.52, 0.14, 0.78),
    "pink": (1.00, 0.46, 0.72),
    "brown": (0.45, 0.24, 0.09),
    "black": (0.06, 0.06, 0.07),
    "white": (0.96, 0.96, 0.96),
}
"""Albedo of each of ``captions.COLOURS``, display RGB in [0, 1]."""


@dataclass(frozen=True)
class Solid:
    """A shape of :func:`unit_sdf` scaled by ``radius`` and turned (degrees): tilted about x, then about y."""

    shape: str
    colour: str
    centre: tuple[float, float, float]
    radius: float
    yaw: float = 0.0
    tilt: float = 0.0

    @property
    def rotation(self) -> list[list[float]]:
        """The shape's frame to the world, 3 x 3."""
        a, b = math.radians(self.yaw), math.radians(self.tilt)
        ca, sa, cb, sb = math.cos(a), math.sin(a), math.cos(b), math.sin(b)
        return [[ca, sa * sb, sa * cb], [0.0, cb, -sb], [-sa, ca * sb, ca * cb]]

    def sdf(self, points: Tensor) -> Tensor:
        """Exact signed distance (...,) of world ``points`` (..., 3), negative inside."""
        rotation, centre = points.new_tensor(self.rotation), points.new_tensor(self.centre)
        return self.radius * unit_sdf(self.shape, (points - centre) @ (rotation / self.radius))


@dataclass(frozen=True)
class Scene:
    """Solid k is thing k of ``things_of(metadata)``. ``tone`` is the wall's grey in [0, 1], ``light`` an azimuth."""

    solids: tuple[Solid, ...]
    camera: Camera
    metadata: Metadata
    tone: float
    light: float

    @property
    def prompt(self) -> str:
        return self.metadata["prompt"]

    def sdf(self, points: Tensor) -> Tensor:
        """Signed distance (...,) of world ``points`` (..., 3) to the nearest solid; the floor does not count."""
        return torch.stack([solid.sdf(points) for solid in self.solids]).amin(0)


_RADII = {1: (0.62, 1.0), 2: (0.50, 0.74), 3: (0.42, 0.58), 4: (0.36, 0.50)}
_SCALE = {"sphere": 0.82, "torus": 0.95, "cylinder": 0.95}
_GAP = 1.5 / 64
"""Least room between two solids and between a solid and the picture's edge, in picture sides."""


def _placed(rng: random.Random, thing: Thing, radius: float, lift: float, spread: float) -> Solid:
    uniform = lambda low, high: low + (high - low) * rng.random()
    shape, yaw, tilt = thing.shape, 0.0, 0.0
    radius *= _SCALE.get(shape, 1.0)
    if shape in ("cube", "pyramid"):
        yaw = uniform(15, 75)  # two sides are seen, never one alone
    elif shape == "torus":
        yaw, tilt = uniform(-40, 40), uniform(40, 85)  # turned so that the hole is seen
    rest = rest_height(shape, tilt)
    colour = thing.colour or pick(rng, COLOURS)
    centre = (uniform(-spread, spread), FLOOR + rest * radius + lift, uniform(-1.2, 0.8) * min(spread, 1))
    return Solid(shape, colour, centre, radius, yaw, tilt)


@dataclass(frozen=True)
class _Outline:
    """Where a camera sees a bounding sphere: a cone about a unit direction, and a box in picture sides, y down."""

    direction: tuple[float, float, float]
    angle: float
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, solid: Solid, camera: Camera) -> "_Outline":
        x, y, z = camera.to_camera(solid.centre)
        distance = math.sqrt(x * x + y * y + z * z)

        def interval(across: float) -> tuple[float, float]:
            middle = math.atan2(across, -z)
            half = math.asin(solid.radius / math.hypot(across, z))
            ends = (0.5 + 0.5 * math.tan(middle + s * half) / camera.slope for s in (-1, 1))
            return next(ends), next(ends)

        (left, right), (top, bottom) = interval(x), interval(-y)
        direction = (x / distance, y / distance, z / distance)
        return cls(direction, math.asin(solid.radius / distance), (left, top, right, bottom))

    def inside(self) -> bool:
        return min(self.box) >= _GAP and max(self.box) <= 1 - _GAP

    def apart(self, other: "_Outline", camera: Camera) -> bool:
        cosine = sum(a * b for a, b in zip(self.direction, other.direction, strict=True))
        return math.acos(min(cosine, 1.0)) > self.angle + other.angle + _GAP * 2 * camera.slope

    def stands(self, relation: str, other: "_Outline") -> bool:
        """Whether this one is, well beyond GenEval's rule, ``relation`` the other and nothing else: no overlap along
        the relation's axis, and within 27 degrees of it."""
        axis = 0 if relation in ("left of", "right of") else 1
        low, high = (self, other) if relation in ("left of", "above") else (other, self)
        offset = [sum(high.box[i::2]) / 2 - sum(low.box[i::2]) / 2 for i in (0, 1)]
        return high.box[axis] >= low.box[axis + 2] and abs(offset[1 - axis]) <= 0.5 * offset[axis]


def _arranged(rng: random.Random, metadata: Metadata, camera: Camera, scale: float) -> tuple[Solid, ...] | None:
    things = things_of(metadata)
    relation = metadata["include"][-1].get("position", [None])[0]
    low, high = (scale * radius for radius in _RADII[len(things)])
    solids: list[Solid] = []
    outlines: list[_Outline] = []
    for index, thing in enumerate(things):
        upper = relation in ("above", "below") and index == (relation == "above")
        for _ in range(20):
            floats = upper or (len(things) > 1 and rng.random() < 0.25)
            lift = (0.2 + 1.2 * rng.random()) if floats else 0.0
            radius = low + (high - low) * rng.random()
            solid = _placed(rng, thing, radius, lift, spread=0.35 if len(things) == 1 else 1.5)
            outline = _Outline.of(solid, camera)
            if not outline.inside() or not all(outline.apart(other, camera) for other in outlines):
                continue
            if index == 1 and relation is not None and not outline.stands(relation, outlines[0]):
                continue
            solids.append(solid)
            outlines.append(outline)
            break
        else:
            return None
    return tuple(solids)


def sample_scene(
    seed: int, metadata: Metadata | None = None, exclude: Container[str] = (), tasks: Sequence[str] | None = None
) -> Scene:
    """The scene of a seed (not negative): of ``metadata``, or of a random caption that is not in ``exclude``, of one of
    ``tasks`` (None: of any).

    It depends on nothing else: not on the batch, the picture size, the device or the version of torch.
    """
    if metadata is None:
        rng = random.Random(mix(seed, 0))
        drawn = lambda: draw(rng, pick(rng, tasks) if tasks else None)
        metadata = drawn()
        while metadata["prompt"] in exclude:
            metadata = drawn()
    rng = random.Random(mix(seed, 1))
    uniform = lambda low, high: low + (high - low) * rng.random()
    camera = Camera(uniform(-10, 10), uniform(15, 28), uniform(3.9, 4.2))
    tone, light = uniform(0.40, 0.52), uniform(-60, 60)
    for attempt in itertools.count():
        if solids := _arranged(rng, metadata, camera, scale=0.97**attempt):
            return Scene(solids, camera, metadata, tone, light)
    raise AssertionError("unreachable")


def sample_turntable(seed: int) -> Scene:
    """One solid in the middle, its front towards azimuth 0, from a camera anywhere around; the caption says from where.

    A torus stands upright and is seen through from in front. The light keeps to the camera, as in the other scenes.
    """
    rng = random.Random(mix(seed, 3))
    uniform = lambda low, high: low + (high - low) * rng.random()
    shape, colour = pick(rng, SHAPES), pick(rng, COLOURS)
    camera = Camera(uniform(0, 360), uniform(15, 28), uniform(3.9, 4.2))
    radius = uniform(0.8, 0.98) * _SCALE.get(shape, 1.0)
    tilt = 90.0 if shape == "torus" else 0.0
    centre = (uniform(-0.06, 0.06), FLOOR + rest_height(shape, tilt) * radius, uniform(-0.06, 0.06))
    solid = Solid(shape, colour, centre, radius, 0.0, tilt)
    metadata = describe([Thing(shape, colour if rng.random() < 0.8 else None)])
    coarse, fine = camera.seen
    metadata = seen(metadata, fine if rng.random() < 0.75 else coarse)
    return Scene((solid,), camera, metadata, uniform(0.40, 0.52), camera.azimuth + uniform(-60, 60))
