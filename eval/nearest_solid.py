"""The solid of a given shape that lies nearest to a mesh, in volume and in outlines.

A prompt leaves size, place and turn open; this finds them, first by gradient on a soft overlap of volumes from several
turns, then by ever smaller steps on what is reported: the volumes' IoU and the outlines' mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import UserError
from models.scene import solids
from models.scene.cameras import Camera, Orbit, rays
from models.scene.fields import Box
from models.scene.mesh import Mesh, lattice
from models.scene.raster import barycentric, rasterise

CELLS, SIZE = 64, 64
"""Cells a side of the lattice that volumes are compared on, pixels a side of the views."""
DIRECTIONS = 16
"""Random ones that are tried beside a solid's own values."""
GAIN = 5e-4
"""Of the score, below which a move is not made."""
STEP = (0.08, 0.04, 0.04, 0.04, 0.12, 0.12)
"""First step in radius, place, yaw and tilt."""


def solid_at(shape: str, colour: str, values: Tensor) -> solids.Solid:
    """A solid of (radius, x, y, z, yaw in radians, tilt in radians)."""
    radius, x, y, z, yaw, tilt = values.tolist()
    return solids.Solid(shape, colour, (x, y, z), radius, math.degrees(yaw), math.degrees(tilt))


def _sdf(shape: str, points: Tensor, values: Tensor) -> Tensor:
    """Signed distances (K, N) of points (N, 3) to K solids of ``values`` (K, 6)."""
    radius, x, y, z, yaw, tilt = values[:, :, None].unbind(1)
    ca, sa, cb, sb = yaw.cos(), yaw.sin(), tilt.cos(), tilt.sin()
    px, py, pz = points[:, 0] - x, points[:, 1] - y, points[:, 2] - z
    u, w = ca * px - sa * pz, sa * px + ca * pz
    local = torch.stack([u, cb * py + sb * w, cb * w - sb * py], -1) / radius[..., None]
    return radius * solids.unit_sdf(shape, local)


def _moving(shape: str) -> Tensor:
    """Which of a solid's values (6,) say something of the shape, 1 or 0."""
    return torch.tensor([1, 1, 1, 1, float(shape in ("cube", "pyramid", "torus")), float(shape == "torus")])


def _turns(shape: str) -> list[tuple[float, float]]:
    """Yaws and tilts to start from, radians."""
    match shape:
        case "cube" | "pyramid":
            return [(i * math.pi / 12, 0.0) for i in range(6)]
        case "torus":
            return [(0.0, 0.0), *((i * math.pi / 4, tilt) for i in range(8) for tilt in (0.6, 1.2))]
        case _:
            return [(0.0, 0.0)]


# ------------------------------------------------------------------------------------------- volumes and outlines


def inside_mesh(mesh: Mesh, box: Box, cells: int) -> Tensor:
    """Which of the lattice's places in a box are inside a closed mesh, ((cells + 1)^3,) bool.

    Along every column of the lattice the faces that it crosses are counted, those that look up against those that look
    down, so meshes that overlap themselves count as one.
    """
    side = cells + 1
    corners = (box.scaled(mesh.vertices).double() + 1) * (cells / 2) + torch.tensor([1.3e-4, 2.7e-4, 0.0])  # no ties
    flat = corners[mesh.faces]
    low = flat[..., :2].amin(1).ceil().clamp(0, side).long()
    high = (flat[..., :2].amax(1).floor() + 1).clamp(0, side).long()
    extent = (high - low).clamp(min=0)
    count = extent[:, 0] * extent[:, 1]
    face = torch.arange(len(flat)).repeat_interleave(count)
    offset = torch.arange(len(face)) - (count.cumsum(0) - count)[face]
    row = torch.div(offset, extent[face, 0], rounding_mode="floor")
    x, y = low[face, 0] + offset - row * extent[face, 0], low[face, 1] + row
    weights = barycentric(flat[face][..., :2], torch.stack([x, y], 1).double())
    crossed = (weights >= 0).all(1)
    face, x, y, weights = face[crossed], x[crossed], y[crossed], weights[crossed]
    height = (weights * flat[face][..., 2]).sum(1)
    a, b, c = flat[face][..., :2].unbind(1)
    up = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).sign()
    level = height.ceil().clamp(0, side).long()  # the first place above the crossing
    change = torch.zeros(side, side, side + 1, dtype=torch.float64)
    change.view(-1).index_add_(0, (x * side + y) * (side + 1) + level, -up)
    return (change.cumsum(2)[..., :side] > 0.5).flatten()


def iou(one: Tensor, other: Tensor) -> Tensor:
    """(...) of sets (..., N) bool."""
    return (one & other).sum(-1) / (one | other).sum(-1).clamp(min=1)


def outlines(mesh: Mesh, cameras: Sequence[Camera], size: int) -> Tensor:
    """(B, H, W) bool: where a mesh is seen."""
    views = [rasterise(mesh, mesh.vertices[:, :1], camera, size, smooth=False).coverage[0] for camera in cameras]
    return torch.stack(views) > 0.5


@torch.no_grad()
def solid_outlines(solid: solids.Solid, cameras: Sequence[Camera], size: int) -> Tensor:
    """(B, H, W) bool: where a solid is seen, as :func:`models.scene.solids.render` has it, without a picture."""
    origins, directions = rays(cameras, size)
    turn = torch.tensor(solid.rotation) / solid.radius
    start = (origins - torch.tensor(solid.centre)) @ turn
    heading = directions.flatten(2).transpose(1, 2) @ (turn * solid.radius)
    along = (heading * start[:, None]).sum(2)
    room = along.square() - start.square().sum(1)[:, None] + 1  # of the unit ball around the shape
    meets = (room > 0).flatten().nonzero().squeeze(1)
    half = room.flatten()[meets].sqrt()
    middle = -along.flatten()[meets]
    start = start[torch.div(meets, size**2, rounding_mode="floor")]
    heading = heading.flatten(0, 1)[meets]
    at, leave = middle - half, middle + half
    seen = torch.zeros(len(cameras) * size**2, dtype=torch.bool)
    distance = solids.unit_sdf(solid.shape, torch.addcmul(start, heading, at[:, None]))
    step = distance
    for _ in range(32):
        at = at + step
        before, distance = distance, solids.unit_sdf(solid.shape, torch.addcmul(start, heading, at[:, None]))
        # Along a ray the distance to what is convex is convex, so the secant's zero is not beyond the surface.
        slope = (distance - before) / step
        far = torch.where(slope < 0, -distance / slope, torch.inf) if solid.shape != "torus" else distance
        touched = distance < 1e-3
        seen[meets[touched]] = True
        live = (~touched & (at + far < leave)).nonzero().squeeze(1)
        if not len(live):
            break
        meets, start, heading, at, leave = meets[live], start[live], heading[live], at[live], leave[live]
        distance, step = distance[live], torch.maximum(far, distance)[live]
    return seen.view(len(cameras), size, size)


# ----------------------------------------------------------------------------------------------------- the search


def fit(shape: str, points: Tensor, inside: Tensor, steps: int = 80) -> tuple[Tensor, float]:
    """The solid's values (6,) with the best overlap with a volume, and its IoU.

    points (N, 3): a regular grid; inside (N,) bool: which are in the volume, some of them. Adam from several turns on
    a soft IoU; after a quarter of the steps the best three go on.
    """
    within = points[inside]
    centre, spread = within.mean(0), (within.amax(0) - within.amin(0)).norm() / 2
    starts = [[0.75 * float(spread), *centre.tolist(), yaw, tilt] for yaw, tilt in _turns(shape)]
    values, moving, target = torch.tensor(starts), _moving(shape), inside.float()
    width = 0.06 * float(spread)

    def overlap(tried: Tensor) -> Tensor:
        own = torch.sigmoid(-_sdf(shape, points, tried) / width * 4)
        common = own @ target
        return common / (own.sum(1) + target.sum() - common)

    done, scores = 0, torch.zeros(len(values))
    for part in (steps // 4, steps - steps // 4):
        values = values.detach().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=0.03)
        for step in range(done, done + part):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps) + 0.001
            optimizer.zero_grad()
            scores = overlap(values)
            (-scores.sum()).backward()
            assert values.grad is not None
            values.grad *= moving
            optimizer.step()
        done += part
        values = values[scores.topk(min(3, len(values))).indices]
    values = values.detach()
    shares = iou(_sdf(shape, points, values) < 0, inside)
    return values[shares.argmax()], float(shares.max())


@dataclass(frozen=True)
class Volume:
    """``points`` (N, 3) of a lattice, some ``inside`` (N,) bool a mesh."""

    points: Tensor
    inside: Tensor

    @classmethod
    def of(cls, mesh: Mesh, box: Box, cells: int) -> "Volume":
        """UserError where the mesh holds none of the lattice's places."""
        points, inside = box.world(lattice(cells)), inside_mesh(mesh, box, cells)
        if not bool(inside.any()):
            raise UserError("the mesh encloses no volume inside the scene's box: there is nothing to compare")
        return cls(points, inside)

    def around(self, margin: float) -> "Volume":
        """The part near what is inside."""
        within = self.points[self.inside]
        low, high = within.amin(0) - margin, within.amax(0) + margin
        near = ((self.points >= low) & (self.points <= high)).all(1)
        return Volume(self.points[near], self.inside[near])

    def overlap(self, solid: solids.Solid) -> float:
        """IoU with a solid."""
        return float(iou(solid.sdf(self.points) < 0, self.inside))


@dataclass(frozen=True)
class Target:
    """A mesh as the search sees it: its volume, the part of a fine and of a coarse lattice around it, its outlines."""

    volume: Volume
    near: Volume
    coarse: Volume
    cameras: Sequence[Camera]
    outlines: Tensor

    @classmethod
    def of(cls, mesh: Mesh, box: Box, orbit: Orbit) -> "Target":
        volume, cameras = Volume.of(mesh, box, CELLS), orbit.turntable(6)
        margin = 0.3 * box.half
        coarse = Volume.of(mesh, box, CELLS // 2).around(margin)
        return cls(volume, volume.around(margin), coarse, cameras, outlines(mesh, cameras, SIZE))

    def score(self, solid: solids.Solid) -> float:
        """Volume IoU + mean IoU of the outlines."""
        seen = solid_outlines(solid, self.cameras, SIZE)
        return self.near.overlap(solid) + float(iou(seen.flatten(1), self.outlines.flatten(1)).mean())


def nearest_solid(shape: str, colour: str, target: Target) -> tuple[solids.Solid, float]:
    """The solid of a shape nearest to a mesh, and the IoU of their volumes.

    Its values are moved, one by one and in random directions, by ever smaller steps while that raises
    :meth:`Target.score`.
    """
    values, _ = fit(shape, target.coarse.points, target.coarse.inside)
    step, generator = torch.tensor(STEP) * _moving(shape), torch.Generator().manual_seed(0)
    best = target.score(solid_at(shape, colour, values))
    while float(step[0]) > 0.005:
        improved = False
        moves = torch.cat([step.diag()[step > 0], 0.7 * step * torch.randn(DIRECTIONS, 6, generator=generator)])
        for move in torch.cat([moves, -moves]):
            if float(values[0] + move[0]) <= 0:
                continue
            found = target.score(solid_at(shape, colour, values + move))
            if found > best + GAIN:
                best, values, improved = found, values + move, True
        if not improved:
            step = step / 2
    solid = solid_at(shape, colour, values)
    return solid, target.volume.overlap(solid)
