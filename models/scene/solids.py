"""The solids world: scenes of one to four solids with captions, rendered from signed distance functions.

Nothing is stored: scene i is a function of its seed alone, and its boxes, masks, counts, depth and shape are known.
Solids rest on a floor or float above it; in a scene's own camera none hides another and all are wholly visible.

python -m models.scene.solids OUT.png --seed 0 --count 16      a sheet of pictures with their captions
"""

import itertools
import math
import random
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from models.errors import UserError, run_command
from models.scene.cameras import Camera, camera_to_world, rays
from models.scene.captions import COLOURS, PAIRS, SHAPES, Metadata, Thing, describe, draw, pick, seen, things_of
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

# ------------------------------------------------------------------------------------- signed distance functions

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


# --------------------------------------------------------------------------------------------------------- scenes


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


def _rest(shape: str, tilt: float) -> float:
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


def _placed(rng: random.Random, thing: Thing, radius: float, lift: float, spread: float) -> Solid:
    uniform = lambda low, high: low + (high - low) * rng.random()
    shape, yaw, tilt = thing.shape, 0.0, 0.0
    radius *= _SCALE.get(shape, 1.0)
    if shape in ("cube", "pyramid"):
        yaw = uniform(15, 75)  # two sides are seen, never one alone
    elif shape == "torus":
        yaw, tilt = uniform(-40, 40), uniform(40, 85)  # turned so that the hole is seen
    rest = _rest(shape, tilt)
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
    centre = (uniform(-0.06, 0.06), FLOOR + _rest(shape, tilt) * radius, uniform(-0.06, 0.06))
    solid = Solid(shape, colour, centre, radius, 0.0, tilt)
    metadata = describe([Thing(shape, colour if rng.random() < 0.8 else None)])
    coarse, fine = camera.seen
    metadata = seen(metadata, fine if rng.random() < 0.75 else coarse)
    return Scene((solid,), camera, metadata, uniform(0.40, 0.52), camera.azimuth + uniform(-60, 60))


# ------------------------------------------------------------------------------------------------------ rendering


@dataclass(frozen=True)
class Rendered:
    """``images`` (B, 3, H, W) in [-1, 1]; ``index`` (B, H, W) int64, the solid at each pixel's centre, -1 for none;
    ``depth`` (B, H, W), distance from the camera along the pixel's ray in world units, infinite where there is none."""

    images: Tensor
    index: Tensor
    depth: Tensor

    def masks(self, count: int) -> Tensor:
        """(B, count, H, W) bool: the visible pixels of each solid."""
        return self.index[:, None] == torch.arange(count, device=self.index.device)[:, None, None]

    def boxes(self, count: int) -> Tensor:
        """(B, count, 4) int64: x0, y0, x1, y1 of the visible pixels, ends exclusive, as GenEval has them; all zero for
        a solid that is not there."""
        return boxes_around(self.masks(count))


def boxes_around(masks: Tensor) -> Tensor:
    """(..., 4) int64 around masks (..., H, W): x0, y0, x1, y1, ends exclusive; all zero around nothing."""
    spans = []
    for dim in (-2, -1):
        hit = masks.any(dim).long()
        first, last = hit.argmax(-1), hit.shape[-1] - hit.flip(-1).argmax(-1)
        spans.append((first, torch.where(hit.any(-1), last, 0)))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], -1)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    size: int = 64,
    cameras: Sequence[Camera] | None = None,
    device: torch.device | str = "cpu",
) -> Rendered:
    """Render ``size`` x ``size`` pictures from each scene's own camera, or from ``cameras`` instead, on ``device``.

    All solids of one shape are sphere traced together, each only along the rays that meet its bounding sphere. Edges
    are smooth without more rays: coverage falls from 1 to 0 over the pixel's width as the ray's least distance to the
    surface goes from half a pixel inside to half a pixel outside.
    """
    cameras = cameras or [scene.camera for scene in scenes]
    origins, directions = (part.to(device) for part in rays(cameras, size))
    directions = directions.flatten(2)
    tensor = lambda values: torch.tensor(values, device=device)
    light = tensor([[math.sin(a), 1.3, math.cos(a)] for a in (math.radians(s.light) for s in scenes)])
    light = torch.nn.functional.normalize(light, dim=1)

    flat = [(b, k, solid) for b, scene in enumerate(scenes) for k, solid in enumerate(scene.solids)]
    batch = tensor([b for b, _, _ in flat])
    number = tensor([k for _, k, _ in flat])
    kind = tensor([SHAPES.index(solid.shape) for _, _, solid in flat])
    radius = tensor([solid.radius for _, _, solid in flat])
    centre = tensor([solid.centre for _, _, solid in flat])
    rotation = tensor([solid.rotation for _, _, solid in flat])
    albedo = tensor([RGB[solid.colour] for _, _, solid in flat])
    towards = centre - origins[batch]
    half = tensor([camera.slope for camera in cameras])[batch] / size * towards.norm(dim=1) / radius

    # Rays in front of the camera that pass a bounding sphere, grown by half a pixel.
    bound = radius * (1 + half)
    which, place = _windows(cameras, batch, centre, bound, size)
    channels = torch.arange(3, device=device)[:, None] * size**2
    world = directions.flatten()[channels + (batch[which] * (3 * size**2) + place)]
    along = (towards.T[:, which] * world).sum(0)
    chord = torch.addcmul((bound.square() - towards.square().sum(1))[which], along, along)
    entry = (along - chord.clamp(min=0).sqrt()).clamp(min=0) / radius[which]
    kind = torch.where((chord > 0) & (along > 0), kind[which], -1)
    traced: list[tuple[Tensor, ...]] = []
    for k, shape in enumerate(SHAPES):
        chosen = (kind == k).nonzero().squeeze(1)
        solid, ray = which[chosen], world[:, chosen]
        turn = rotation.permute(1, 2, 0)[:, :, solid]
        start = -(rotation * (towards / radius[:, None])[:, :, None]).sum(1).T[:, solid]
        rows, coverage, distance, normal = _trace(
            shape, start, (turn * ray[:, None]).sum(0), entry[chosen], half[solid]
        )
        solid, ray, normal = solid[rows], ray[:, rows], (turn[:, :, rows] * normal).sum(1)
        sun = light.T[:, batch[solid]]
        diffuse = (normal * sun).sum(0).clamp(min=0)
        specular = (normal * _unit(sun - ray)).sum(0).clamp(min=0) ** 32
        matt = albedo.T[:, solid] * (0.72 + 0.28 * diffuse)
        sheen = 0.02 * (1 + normal[1]) + 0.06 * diffuse + 0.15 * specular
        colour = matt + sheen * (1 - matt)
        traced.append((solid, place[chosen][rows], coverage, distance * radius[solid], colour.T))
    solid, place, coverage, distance, colour = (torch.cat(part) for part in zip(*traced, strict=True))

    # From far to near. Among disjoint bounding spheres that is the order of |distance|^2 - radius^2 along every ray.
    power = towards.square().sum(1) - radius.square()
    rank = ((batch[:, None] == batch) & (power[:, None] < power)).sum(1)[solid]
    pixel = batch[solid] * size**2 + place
    tone = tensor([scene.tone for scene in scenes])
    image = backdrop(tone, origins, directions, light, batch, centre, radius).flatten()[:, None].repeat(1, 3)
    index = torch.full((len(image),), -1, device=device)
    depth = torch.full((len(image),), math.inf, device=device)
    for level in range(int(rank.max()) + 1):
        chosen = (rank == level).nonzero().squeeze(1)
        where = pixel[chosen]
        image[where] = torch.lerp(image[where], colour[chosen], coverage[chosen, None])
        chosen = chosen[coverage[chosen] >= 0.5]
        index[pixel[chosen]], depth[pixel[chosen]] = number[solid[chosen]], distance[chosen]
    images = image.reshape(-1, size, size, 3).permute(0, 3, 1, 2).contiguous() * 2 - 1
    return Rendered(images, index.reshape(-1, size, size), depth.reshape(-1, size, size))


def _windows(
    cameras: Sequence[Camera], batch: Tensor, centre: Tensor, radius: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The pixels of each bounding sphere's box: the sphere and the place, row * ``size`` + column, of each (N,)."""
    view = camera_to_world(cameras).to(batch.device)[batch]
    x, y, z = (view[:, :3, :3].mT @ (centre - view[:, :3, 3])[:, :, None])[:, :, 0].unbind(1)
    slope = torch.tensor([camera.slope for camera in cameras], device=batch.device)[batch]

    def interval(across: Tensor) -> tuple[Tensor, Tensor]:
        middle, sine = torch.atan2(across, -z), radius / torch.hypot(across, z)
        spread = torch.where((sine < 1) & (-z > radius), sine.clamp(max=1).asin(), math.pi)  # or all of the picture
        ends = [(middle + sign * spread).clamp(-1.5, 1.5).tan() / slope for sign in (-1, 1)]
        first, last = ((end + 1) * (size / 2) - 0.5 for end in ends)
        return first.ceil().clamp(0, size).long(), (last.floor() + 1).clamp(0, size).long()

    (left, right), (top, bottom) = interval(x), interval(-y)
    width = right - left
    area = width * (bottom - top)
    which = torch.arange(len(area), device=area.device).repeat_interleave(area)
    offset = torch.arange(len(which), device=area.device) - (area.cumsum(0) - area)[which]
    row = torch.div(offset, width[which], rounding_mode="floor")
    return which, (top * size + left)[which] + row * size + offset - row * width[which]


def _unit(vectors: Tensor) -> Tensor:
    """(3, N) divided by their lengths."""
    return vectors * vectors.square().sum(0).rsqrt()


def backdrop(
    tone: Tensor,
    origins: Tensor,
    directions: Tensor,
    light: Tensor,
    batch: Tensor,
    centre: Tensor,
    radius: Tensor,
) -> Tensor:
    """Grey wall and floor with the solids' soft shadows, (B, H W) in [0, 1].

    tone, origins, directions, light: (B,), (B, 3), (B, 3, H W) and unit (B, 3), of each picture
    batch, centre, radius:            (N,), (N, 3), (N,): the picture, centre and radius of each ball that casts one
    """
    tone = tone[:, None]
    right, up, back = directions.unbind(1)
    distance = (FLOOR - origins[:, 1:2]) / up.clamp(max=-1e-3)
    x, z = origins[:, 0:1] + distance * right, origins[:, 2:3] + distance * back
    near = torch.exp((x * x + z * z) * -0.06) * (up < 0)
    grey = tone + 0.12 * up + 0.14 * near
    # What a ball hides of a floor point's sky, r^2 h / d^3 for height h and distance d, drawn out away from the light.
    height = centre[:, 1:2] - FLOOR
    foot = centre - 0.5 * height * light[batch] / light[batch, 1:2]
    dx, dz = x[batch] - foot[:, 0:1], z[batch] - foot[:, 2:3]
    inverse = torch.addcmul(torch.addcmul(height * height, dx, dx), dz, dz).rsqrt()
    hidden = 0.7 * radius[:, None].square() * height * inverse**3
    shadow = torch.zeros_like(grey).index_add_(0, batch, hidden).clamp(max=1) * (up < 0)
    return (grey * (1 - 0.5 * shadow)).clamp(0, 1)


def _trace(shape: str, start: Tensor, heading: Tensor, entry: Tensor, half: Tensor) -> tuple[Tensor, ...]:
    """March rays (3, N) from ``entry`` (N,) in the shape's frame, half a pixel being ``half`` (N,) long at the solid.

    Returns the rows (M,) whose coverage (M,) is not 0, their distance (M,) along the ray and outward normals (3, M).
    """
    leave = -2 * (start * heading).sum(0) - entry
    t, least, nearest, before = entry.clone(), torch.full_like(entry, math.inf), entry.clone(), entry.clone()
    live = torch.arange(len(t), device=t.device)
    for _ in range(5):
        o, d, inset = start[:, live], heading[:, live], half[live]
        s, low, best, out = t[live], least[live], nearest[live], before[live]
        for _ in range(6):
            # To the surface half a pixel further in: the least of it gives the coverage on both sides of the true one.
            distance = unit_sdf(shape, torch.addcmul(o, d, s).T) + inset
            best = torch.where(distance < low, s, best)
            low = torch.minimum(low, distance)
            out = torch.where(low > inset, s, out)  # the last place before the true surface
            s = s + distance
        t[live], least[live], nearest[live], before[live] = s, low, best, out
        live = live[(low > 0.02 * inset) & (s < leave[live])]
    coverage = 1 - least / (2 * half)
    rows = (coverage > 0).nonzero().squeeze(1)
    start, heading, t, half = start[:, rows], heading[:, rows], nearest[rows], half[rows]
    # Differences over half a pixel also smooth the creases between faces.
    corners = start.new_tensor([[1, -1, -1, 1], [-1, -1, 1, 1], [-1, 1, -1, 1]])[:, :, None]
    points = (start + heading * t)[:, None] + half * corners
    values = unit_sdf(shape, points.movedim(0, -1))
    normal = _unit((corners * values).sum(1))
    distance = before[rows]
    for _ in range(4):
        distance = torch.minimum(distance + unit_sdf(shape, (start + heading * distance).T), t)
    return rows, coverage[rows].clamp(max=1), distance, normal


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Solids:
    """The world as a source of training batches, ``size`` pixels a side, without the captions in ``exclude``.

    In a share ``turntable`` of the pictures one solid is seen from all sides. In a share ``pairs`` of the others there
    are two solids, named apart (:data:`~models.scene.captions.PAIRS`); the rest are of any task. They are rendered on
    ``device`` and returned on the CPU.
    """

    size: int = 64
    exclude: frozenset[str] = frozenset()
    turntable: float = 0.0
    pairs: float = 0.0
    device: str = "cpu"

    def _scene(self, seed: int) -> Scene:
        if mix(seed, 2) < self.turntable * 2**63:
            return sample_turntable(seed)
        return sample_scene(seed, exclude=self.exclude, tasks=PAIRS if mix(seed, 4) < self.pairs * 2**63 else None)

    def batch(self, seeds: Sequence[int]) -> tuple[Tensor, list[Scene]]:
        """Pictures (B, 3, H, W) in [-1, 1] and scenes of the seeds."""
        scenes = [self._scene(seed) for seed in seeds]
        return render(scenes, self.size, device=self.device).images.cpu(), scenes

    def captioned(self, seeds: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Pictures as of :meth:`batch`, and their captions."""
        images, scenes = self.batch(seeds)
        return images, [scene.prompt for scene in scenes]


def contact_sheet(seed: int, count: int, path: Path, size: int = 64, zoom: int = 3) -> None:
    """Write pictures of the seeds ``seed``, ``seed + 1``, ..., enlarged without smoothing, with their captions.

    Raises UserError for numbers out of range or another file type than PNG.
    """
    from PIL import Image, ImageDraw, ImageFont

    if seed < 0 or count < 1 or size < 8 or path.suffix != ".png":
        raise UserError(f"seed {seed}, count {count}, size {size}, {path}: at least 0, 1 and 8, and a name in .png")
    images, scenes = Solids(size).batch(range(seed, seed + count))
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns, side, head = min(count, 6), size * zoom, 30
    sheet = Image.new("RGB", (columns * (side + 6), -(-count // columns) * (side + head)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, scene in enumerate(scenes):
        left, top = i % columns * (side + 6), i // columns * (side + head)
        lines = textwrap.fill(scene.prompt.removeprefix("a photo of "), side // 6)
        canvas.text((left + side / 2, top + head / 2), lines, "black", font, anchor="mm", align="center", spacing=1)
        sheet.paste(Image.fromarray(pixels[i]).resize((side, side), Image.Resampling.NEAREST), (left, top + head))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


@dataclass
class Arguments:
    """Write a sheet of pictures with their captions."""

    output: tyro.conf.Positional[Path]
    """Picture file to write (.png)."""
    seed: int = 0
    """Seed of the first scene."""
    count: int = 16
    """Number of scenes."""
    size: int = 64
    """Pixels a side."""


if __name__ == "__main__":
    arguments = tyro.cli(Arguments)
    run_command(lambda: contact_sheet(arguments.seed, arguments.count, arguments.output, arguments.size))
