"""Triangle meshes: marching tetrahedra on a grid, normals, the outer hull of a field."""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError

EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Of a tetrahedron, by its corners."""


def at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, whose gradient on the CPU is summed in one order however many threads there are."""
    return values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:])


@dataclass(frozen=True)
class Mesh:
    """``vertices`` (V, 3) in world units and ``faces`` (F, 3) int64, counter-clockwise seen from outside."""

    vertices: Tensor
    faces: Tensor

    def face_normals(self) -> Tensor:
        """Unit (F, 3), outwards."""
        a, b, c = at(self.vertices, self.faces).unbind(1)
        return F.normalize(torch.linalg.cross(b - a, c - a), dim=1, eps=1e-12)

    def vertex_normals(self) -> Tensor:
        """Unit (V, 3): the faces' around a vertex, weighted by their areas."""
        a, b, c = at(self.vertices, self.faces).unbind(1)
        weighted = torch.linalg.cross(b - a, c - a)
        total = torch.zeros_like(self.vertices)
        for corner in range(3):
            total = total.index_add(0, self.faces[:, corner], weighted)
        return F.normalize(total, dim=1, eps=1e-12)

    def volume(self) -> Tensor:
        """Enclosed volume, a scalar; positive where the faces look outwards."""
        a, b, c = at(self.vertices, self.faces).unbind(1)
        return (a * torch.linalg.cross(b, c)).sum() / 6

    def neighbours(self) -> Tensor:
        """(E, 2): the pairs of faces that share an edge."""
        sides = torch.cat([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]]).sort(1).values
        keys = sides[:, 0] * len(self.vertices) + sides[:, 1]
        order = keys.argsort()
        owner = order % len(self.faces)
        same = keys[order][1:] == keys[order][:-1]
        return torch.stack([owner[:-1][same], owner[1:][same]], 1)

    @functools.cached_property
    def bends(self) -> Tensor:
        """(E,): squared length of the difference of neighbouring faces' normals, which is 2 (1 - cosine)."""
        one, other = at(self.face_normals(), self.neighbours()).unbind(1)
        return (one - other).square().sum(1)

    def creases(self) -> Tensor:
        """Angle between neighbouring faces' normals as the length of their difference, averaged: the total variation
        of the normals, which leaves flat sides flat and edges sharp; a scalar."""
        return (self.bends + 1e-4).sqrt().mean()

    def roughness(self) -> Tensor:
        """1 - cosine between neighbouring faces, averaged: a scalar."""
        return self.bends.mean() / 2


def lattice(cells: int) -> Tensor:
    """((cells + 1)^3, 3): the corners of a regular grid on [-1, 1]^3, x slowest."""
    line = torch.linspace(-1, 1, cells + 1)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)


def tetrahedra(cells: int) -> Tensor:
    """(6 cells^3, 4) indices into :func:`lattice`: Kuhn's six tetrahedra around each cell's diagonal, all of positive
    orientation. Neighbouring cells share whole faces, so a surface through them has no gaps."""
    strides = ((cells + 1) ** 2, cells + 1, 1)
    line = torch.arange(cells)
    corner = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3) @ torch.tensor(strides)
    parts = []
    for order in itertools.permutations(range(3)):
        offsets = [0, *itertools.accumulate(strides[axis] for axis in order)]
        if order not in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # an odd path around the diagonal is of the other hand
            offsets[2], offsets[3] = offsets[3], offsets[2]
        parts.append(corner[:, None] + torch.tensor(offsets))
    return torch.cat(parts)


def _triangles() -> Tensor:
    """(16, 2, 3): for each set of inside corners (corner i is bit i) up to two triangles of edge numbers, or -1."""
    one = {1: (0, 1, 2), 2: (0, 4, 3), 4: (1, 3, 5), 8: (2, 5, 4)}
    two = {3: (1, 2, 4, 3), 5: (0, 3, 5, 2), 9: (0, 1, 5, 4), 6: (0, 4, 5, 1), 10: (0, 2, 5, 3), 12: (1, 3, 4, 2)}
    table = torch.full((16, 2, 3), -1)
    for code, edges in one.items():
        table[code, 0], table[15 - code, 0] = torch.tensor(edges), torch.tensor(edges[::-1])
    for code, (a, b, c, d) in two.items():
        table[code] = torch.tensor([[a, b, c], [a, c, d]])
    return table


_TABLE = _triangles()


def marching_tetrahedra(places: Tensor, distance: Tensor, cells: Tensor) -> Mesh:
    """The surface where ``distance`` (N,) at ``places`` (N, 3) changes sign within ``cells`` (T, 4); inside is < 0.

    DMTet's layer (arXiv 2111.04276): differentiable in places and distances. Closed where no inside corner lies on the
    border. An empty Mesh if nothing is inside.
    """
    with torch.no_grad():
        inside = distance < 0
        code = (inside[cells] * torch.tensor([1, 2, 4, 8], device=cells.device)).sum(1)
        crossed = ((code > 0) & (code < 15)).nonzero().squeeze(1)
        ends = cells[crossed][:, torch.tensor(EDGES, device=cells.device)].sort(2).values
        keys = ends[..., 0] * len(places) + ends[..., 1]
        triangles = _TABLE.to(cells.device)[code[crossed]]
        real = triangles[..., 0] >= 0
        corners = keys.gather(1, triangles.clamp(min=0).flatten(1)).view(-1, 2, 3)[real]
        used, faces = corners.unique(return_inverse=True)
        a, b = used // len(places), used % len(places)
    ends = torch.stack([a, b])
    (its_distance, other_distance), (place, other_place) = at(distance, ends), at(places, ends)
    share = (its_distance / (its_distance - other_distance))[:, None]
    return Mesh(torch.lerp(place, other_place, share), faces)


@torch.no_grad()
def outer_hull(solid: Tensor) -> Tensor:
    """``solid`` (n, n, n) bool with everything filled that cannot be reached from the border through what is empty.

    A narrow opening does not count as a way in: paths are as wide as three cells.
    """
    empty = ~solid
    wide = -F.max_pool3d(-F.pad(empty.float(), (2,) * 6, value=1.0)[None, None], 3, 1, 1)[0, 0] > 0
    reached = torch.zeros_like(wide)
    reached[0] = reached[-1] = True
    reached[:, 0] = reached[:, -1] = True
    reached[:, :, 0] = reached[:, :, -1] = True
    reached &= wide
    while True:
        grown = (F.max_pool3d(reached.float()[None, None], 3, 1, 1)[0, 0] > 0) & wide
        if bool((grown == reached).all()):
            break
        reached = grown
    outside = F.max_pool3d(reached.float()[None, None], 3, 1, 1)[0, 0, 2:-2, 2:-2, 2:-2] > 0
    return ~(outside & empty)


def check_not_empty(mesh: Mesh, threshold: float, peak: float) -> None:
    """UserError with what to change where there is no surface."""
    if len(mesh.faces) == 0:
        raise UserError(
            f"there is no surface at density {threshold:.3g}: the field's highest is {peak:.3g}; lower "
            "method.export.threshold, train the volume stage longer, or lower its weights.sparsity"
        )
