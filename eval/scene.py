"""How a scene is judged: against a solid of known shape where the prompt names one.

A prompt leaves size, place and turn open, so the truth is the solid of that shape which fits the mesh best; the views
that it is then compared in lie between those of training.

python -m eval.scene RUN/a-red-cube [RUN/...]        one table, a line for each
"""

import math

import torch
from torch import Tensor

from models.scene import solids
from models.scene.fields import Box
from models.scene.mesh import Mesh
from models.scene.raster import barycentric


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


def fit(shape: str, points: Tensor, inside: Tensor, steps: int = 120) -> tuple[Tensor, float]:
    """The solid's values (6,) with the best overlap with a volume, and its IoU.

    points (N, 3): a regular grid; inside (N,) bool: which are in the volume. Adam from several turns on a soft IoU.
    """
    within = points[inside]
    centre, spread = within.mean(0), (within.amax(0) - within.amin(0)).norm() / 2
    tilts = [0.0] if shape != "torus" else [0.0, 0.6, 1.2]
    yaws = [0.0] if shape in ("sphere", "cylinder", "cone") else [i * math.pi / 16 for i in range(8)]
    if shape == "torus":
        yaws = [i * math.pi / 4 for i in range(8)]
    starts = [[0.75 * float(spread), *centre.tolist(), yaw, tilt] for yaw in yaws for tilt in tilts]
    values = torch.tensor(starts, requires_grad=True)
    moving = torch.tensor([1, 1, 1, 1, float(len(yaws) > 1), float(shape == "torus")])
    optimizer = torch.optim.Adam([values], lr=0.03)
    target = inside.float()
    width = 0.06 * float(spread)

    def overlap(soft: bool) -> Tensor:
        distance = _sdf(shape, points, values)
        own = torch.sigmoid(-distance / width * 4) if soft else (distance < 0).float()
        return (own * target).sum(1) / (own + target - own * target).sum(1)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps) + 0.001
        optimizer.zero_grad()
        (-overlap(True).sum()).backward()
        assert values.grad is not None
        values.grad *= moving
        optimizer.step()
    with torch.no_grad():
        scores = overlap(False)
        best = int(scores.argmax())
        return values.detach()[best], float(scores[best])


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
