"""Volume rendering of a field in plain torch: any device, nothing to compile."""

from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scene.fields import Box, Field
from models.seeds import mix

CHUNK = 1 << 18
"""Points that a field is asked for at once where no gradient is wanted."""


class Occupancy(nn.Module):
    """Which cells of a box may hold something: a moving maximum of the density in a grid of ``side``^3 cells, above
    ``threshold``, 1 / half a side of the box.

    All of its state are buffers, its random points a function of how often it was updated.
    """

    peak: Tensor
    cells: Tensor
    updates: Tensor

    def __init__(self, box: Box, side: int = 32, threshold: float = 0.5, decay: float = 0.9):
        super().__init__()
        self.box, self.side, self.threshold, self.decay = box, side, threshold / box.half, decay
        self.register_buffer("peak", torch.zeros(side, side, side))
        self.register_buffer("cells", torch.ones(side, side, side, dtype=torch.bool))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, field: Field) -> None:
        """Look at one random point of each cell. Neighbours of an occupied cell count as occupied."""
        side, device = self.side, self.peak.device
        generator = torch.Generator().manual_seed(mix(20, int(self.updates)))
        cells = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), -1).view(-1, 3)
        scaled = (cells + torch.rand(len(cells), 3, generator=generator)) * (2 / side) - 1
        density = sampled(field, scaled.to(device)).view_as(self.peak)
        self.peak.copy_(torch.maximum(self.peak * self.decay, density))
        occupied = (self.peak > self.threshold).float()[None, None]
        self.cells.copy_(F.max_pool3d(occupied, 3, 1, 1)[0, 0] > 0)
        self.updates += 1

    def at(self, scaled: Tensor) -> Tensor:
        """Whether points (..., 3) of [-1, 1]^3 lie in occupied cells, (...,) bool."""
        x, y, z = ((scaled * 0.5 + 0.5) * self.side).long().clamp(0, self.side - 1).unbind(-1)
        return self.cells.view(-1)[(x * self.side + y) * self.side + z]


@torch.no_grad()
def sampled(field: Field, scaled: Tensor) -> Tensor:
    """Density (N,) at points (N, 3) of [-1, 1]^3, in parts."""
    return torch.cat([field.density(field.box.world(part)) for part in scaled.split(CHUNK)])


@dataclass(frozen=True)
class Rays:
    """What rays (R,) meet: ``colour`` (R, 3) premultiplied by ``opacity`` (R,)."""

    colour: Tensor
    opacity: Tensor


def span(box: Box, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays (R, 3) enter and leave a box, (R,) each, not behind the origin; and whether they meet it."""
    inverse = 1 / torch.where(directions.abs() < 1e-6, 1e-6, directions)
    start = box.scaled(origins) * box.half
    one, other = (-box.half - start) * inverse, (box.half - start) * inverse
    near, far = torch.minimum(one, other).amax(-1).clamp(min=0), torch.maximum(one, other).amin(-1)
    return near, far, far > near


def render(
    field: Field,
    origins: Tensor,
    directions: Tensor,
    samples: int,
    occupancy: Occupancy | None = None,
    jitter: Tensor | None = None,
) -> Rays:
    """March rays (R, 3) in ``samples`` equal steps through the field's box (NeRF, arXiv 2003.08934, Eq. 3).

    ``jitter`` (R,) in [0, 1) places the samples within their steps; None: in the middle. Samples in empty cells are
    left out. Where no gradient is wanted, a few rays are marched at a time.
    """
    if torch.is_grad_enabled():
        return _march(field, origins, directions, samples, occupancy, jitter)
    each = max(1, CHUNK // samples)
    jitters = repeat(None) if jitter is None else jitter.split(each)
    parts = [
        _march(field, start, heading, samples, occupancy, shift)
        for start, heading, shift in zip(origins.split(each), directions.split(each), jitters, strict=False)
    ]
    return Rays(torch.cat([part.colour for part in parts]), torch.cat([part.opacity for part in parts]))


def _march(
    field: Field,
    origins: Tensor,
    directions: Tensor,
    samples: int,
    occupancy: Occupancy | None,
    jitter: Tensor | None,
) -> Rays:
    near, far, meets = span(field.box, origins, directions)
    near, far = torch.where(meets, near, 0.0), torch.where(meets, far, 0.0)
    count = len(origins)
    place = torch.arange(samples, device=origins.device) + (0.5 if jitter is None else jitter[:, None])
    step = (far - near) / samples
    distance = near[:, None] + step[:, None] * place
    points = origins[:, None] + directions[:, None] * distance[..., None]
    chosen = meets[:, None].expand(count, samples)
    if occupancy is not None:
        chosen = chosen & occupancy.at(field.box.scaled(points))
    rows = chosen.flatten().nonzero().squeeze(1)
    density, colour = points.new_zeros(count * samples), points.new_zeros(count * samples, 3)
    if len(rows):
        values, colours = field(points.view(-1, 3)[rows])
        density, colour = density.index_put((rows,), values), colour.index_put((rows,), colours)
    depth = density.view(count, samples) * step[:, None]
    through = torch.exp(depth - depth.cumsum(1))
    weights = through * -torch.expm1(-depth)
    return Rays((weights[..., None] * colour.view(count, samples, 3)).sum(1), weights.sum(1))
