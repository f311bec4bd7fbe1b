"""The generators of the mesh stages: surfaces that move (geometry), and colours on surfaces that do not (texture)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scene.backdrops import Backdrop, light
from models.scene.cameras import Orbit, rays
from models.scene.fields import Field
from models.scene.mesh import Mesh, check_not_empty, lattice, marching_tetrahedra, outer_hull, tetrahedra
from models.scene.particles import Drawn, Fields, Generator, Views
from models.scene.raster import rasterise
from models.scene.volume import sampled

Picture = Literal["colour", "shaded", "normals"]


def distances(field: Field, cells: int, threshold: float) -> tuple[Tensor, float]:
    """About signed distances, in cells and within [-1, 1], at :func:`lattice`'s places: negative where the density is
    above ``threshold``, and in the hollows that it encloses, but for a scene that is one. Also the highest density.

    On fine lattices an average over up to three neighbours is taken of ``1 - 2^(-density / threshold)``: densities are
    striped, what can be seen through is not.
    """
    side = cells + 1
    density = sampled(field, lattice(cells).to(next(field.parameters()).device)).view(1, 1, side, side, side)
    occupied = -torch.expm1(-math.log(2) * density / threshold)
    for _ in range(min(3, cells // 16)):
        occupied = F.avg_pool3d(F.pad(occupied, (1,) * 6, mode="replicate"), 3, 1)
    distance = 1 - 2 * occupied[0, 0]
    solid = distance < 0
    if field.blob.strength >= 0:
        distance = torch.where(outer_hull(solid) & ~solid, -1.0, distance)
    for axis in range(3):  # what reaches the box's border is closed there
        distance.movedim(axis, 0)[[0, -1]] = distance.movedim(axis, 0)[[0, -1]].clamp(min=0.05)
    return distance.flatten(), float(density.max())


def surface(field: Field, cells: int, threshold: float) -> Mesh:
    """The field's surface at a density, world units, from outside alone but for a hollow scene's; UserError if there is
    none."""
    distance, peak = distances(field, cells, threshold)
    places = lattice(cells).to(distance.device)
    mesh = marching_tetrahedra(places, distance, tetrahedra(cells).to(distance.device))
    check_not_empty(mesh, threshold, peak)
    return Mesh(field.box.world(mesh.vertices), mesh.faces)


@torch.no_grad()
def find_threshold(fields: Fields, index: int, orbit: Orbit, cells: int = 48, views: int = 6, size: int = 64) -> float:
    """The density whose surface has the outlines that the rendered particle has: the best mean IoU of silhouettes.

    Raises UserError if no density gives a surface that is seen.
    """
    field = fields.particle(index)
    cameras = orbit.turntable(views)
    device = next(field.parameters()).device
    seen = fields(Views.plain(cameras, index, size, device)).opacity[:, 0] > 0.5
    places = lattice(cells).to(device)
    grid = tetrahedra(cells).to(device)
    best, score = 0.0, 0.0
    for threshold in (torch.logspace(-0.5, 1.75, 10) / field.box.half).tolist():
        distance, peak = distances(field, cells, threshold)
        mesh = marching_tetrahedra(places, distance, grid)
        if not len(mesh.faces):
            break
        mesh = Mesh(field.box.world(mesh.vertices), mesh.faces)
        drawn = torch.stack([rasterise(mesh, mesh.vertices, c, size, smooth=False).coverage[0] > 0.5 for c in cameras])
        overlap = float((drawn & seen).sum() / (drawn | seen).sum().clamp(min=1))
        if overlap > score:
            best, score = threshold, overlap
    if score == 0.0:
        distance, peak = distances(field, cells, 1 / field.box.half)
        check_not_empty(Mesh(places[:0], grid[:0, :3]), 1 / field.box.half, peak)
    return best


def draw(
    meshes: Sequence[Mesh],
    fields: Sequence[Field],
    backdrop: Backdrop,
    views: Views,
    picture: Picture,
    smooth: bool = True,
) -> Drawn:
    """Views of surfaces whose colours are those of fields where they lie.

    ``shaded`` adds the solids world's diffuse light; ``normals`` shows them in the camera's axes, as RGB.
    """
    size, device = views.size, views.noise.device
    origins, directions = (part.to(device) for part in rays(views.cameras, size))
    azimuths = torch.tensor([camera.azimuth for camera in views.cameras], device=device)
    behind = backdrop(origins, directions, azimuths, views.noise)
    suns = light(azimuths, views.noise)
    colours, coverages = [], []
    for camera, index, sun in zip(views.cameras, views.particles, suns, strict=True):
        mesh = meshes[index]
        raster = rasterise(mesh, torch.cat([mesh.vertices, mesh.vertex_normals()], 1), camera, size, smooth)
        points, normals = raster.attributes.flatten(1).T.split(3, 1)
        rows = (raster.coverage.flatten() > 0).nonzero().squeeze(1)
        normal = F.normalize(normals[rows], dim=1, eps=1e-6)
        if picture == "normals":
            colour = normal @ normal.new_tensor(camera.axes).T * 0.5 + 0.5
        else:
            colour = fields[index](points[rows])[1]
            if picture == "shaded":
                colour = colour * (0.72 + 0.28 * (normal @ sun).clamp(min=0)[:, None])
        image = colour.new_zeros(size * size, 3).index_put((rows,), colour)
        colours.append(image.T.view(3, size, size))
        coverages.append(raster.coverage)
    coverage = torch.stack(coverages)
    images = torch.stack(colours) * coverage + (1 - coverage) * behind
    return Drawn(images * 2 - 1, coverage)


def _keep(meshes: Sequence[Mesh], fields: Fields) -> dict[str, Tensor]:
    kept = dict(fields.state_dict())
    for index, mesh in enumerate(meshes):
        kept[f"mesh.{index}.vertices"], kept[f"mesh.{index}.faces"] = mesh.vertices, mesh.faces
    return kept


class Geometry(Generator):
    """Stage two: signed distances and offsets on a grid of tetrahedra, DMTet (arXiv 2111.04276); the colours stay.

    ``fields`` are those of the volume stage, frozen; their surface at ``thresholds``, one each, is where it starts.
    """

    places: Tensor
    cells: Tensor

    def __init__(self, fields: Fields, thresholds: Sequence[float], cells: int, picture: Picture):
        super().__init__()
        self._fields, self.side = (fields.requires_grad_(False),), cells
        self.picture: Picture = picture
        start = []
        for index, threshold in enumerate(thresholds):
            distance, peak = distances(fields.particle(index), cells, threshold)
            if not bool((distance < 0).any()):
                check_not_empty(Mesh(distance.new_zeros(0, 3), torch.zeros(0, 3).long()), threshold, peak)
            start.append(distance)
        self.distance = nn.Parameter(torch.stack(start))
        self.offset = nn.Parameter(torch.zeros(len(start), len(start[0]), 3))
        self.register_buffer("places", lattice(cells), persistent=False)
        self.register_buffer("cells", tetrahedra(cells), persistent=False)

    def held(self) -> list[nn.Module]:
        return [self._fields[0]]

    def meshes(self) -> list[Mesh]:
        """The surfaces of all particles, world units."""
        found = []
        for index, (distance, offset) in enumerate(zip(self.distance, self.offset, strict=True)):
            places = self.places + torch.tanh(offset) / self.side  # at most half a cell
            mesh = marching_tetrahedra(places, distance, self.cells)
            if not len(mesh.faces):
                check_not_empty(mesh, 0.0, 0.0)
            found.append(Mesh(self._fields[0].particle(index).box.world(mesh.vertices), mesh.faces))
        return found

    def forward(self, views: Views) -> Drawn:
        meshes, fields = self.meshes(), self._fields[0]
        drawn = draw(meshes, fields.all(), fields.backdrop, views, self.picture)
        used = sorted(set(views.particles))
        rough = torch.stack([meshes[index].roughness() for index in used]).mean()
        creases = torch.stack([meshes[index].creases() for index in used]).mean()
        grid = self.distance[used].unflatten(1, (self.side + 1,) * 3)
        bend = torch.stack([grid.diff(n=2, dim=axis).square().mean() for axis in (1, 2, 3)]).sum()
        return Drawn(drawn.images, drawn.opacity, {"normals": rough, "creases": creases, "laplacian": bend})

    def tensors(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return _keep(self.meshes(), self._fields[0])


class Texture(Generator):
    """Stage three: the meshes are fixed, the fields' colours are trained."""

    def __init__(self, meshes: Sequence[Mesh], fields: Fields, picture: Picture):
        super().__init__()
        self.fields = fields
        self.picture: Picture = picture
        for index, mesh in enumerate(meshes):
            self.register_buffer(f"vertices_{index}", mesh.vertices, persistent=False)
            self.register_buffer(f"faces_{index}", mesh.faces, persistent=False)

    def meshes(self) -> list[Mesh]:
        pair = lambda i: (self.get_buffer(f"vertices_{i}"), self.get_buffer(f"faces_{i}"))
        return [Mesh(*pair(index)) for index in range(len(self.fields.fields))]

    def forward(self, views: Views) -> Drawn:
        meshes = self.meshes()
        return draw(meshes, self.fields.all(), self.fields.backdrop, views, self.picture)

    def tensors(self) -> dict[str, Tensor]:
        return _keep(self.meshes(), self.fields)
