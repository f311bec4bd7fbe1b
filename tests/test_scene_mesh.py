"""Marching tetrahedra, the rasteriser and the files, against closed forms."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from models.errors import UserError
from models.scene import export, nvdiffrast_backend, saved
from models.scene.cameras import Camera, Orbit
from models.scene.fields import Blob, Box, FieldSizes
from models.scene.mesh import Mesh, lattice, marching_tetrahedra, outer_hull, tetrahedra
from models.scene.particles import Views
from models.scene.raster import Raster, rasterise
from models.scene.solids import unit_sdf
from models.scene.surface import Geometry, find_threshold, surface
from models.scene.volume import Occupancy
from tests.tiny import torch_threads


def ball(cells: int = 16, radius: float = 0.6) -> Mesh:
    places = lattice(cells)
    return marching_tetrahedra(places, places.norm(dim=1) - radius, tetrahedra(cells))


def scene(strength: float = 40.0, half: float = 1.0) -> saved.Scene:
    orbit, box = Orbit(radius=(4.0 * half, 4.0 * half)), Box(half=half)
    return saved.Scene("a ball", "a ball", 1, orbit, box, Blob(strength, 0.5), FieldSizes(side=8), "white", 48)


def test_creases_like_flat_sides_with_sharp_edges_better_than_round_ones():
    """Their mean angle is a box's whole turning over all edges, however it is spread; roughness prefers it spread."""
    places, cells = lattice(20), tetrahedra(20)
    box = lambda r: (places.abs() - (0.53 - r)).clamp(min=0).norm(dim=1) - r  # rounded by r
    sharp, rounded = (marching_tetrahedra(places, box(r), cells) for r in (0.01, 0.3))
    bumpy = marching_tetrahedra(places, box(0.01) + 0.02 * torch.sin(40 * places).sum(1), cells)
    assert rounded.roughness() < sharp.roughness() and rounded.creases() > 0.7 * sharp.creases()
    assert bumpy.creases() > 2 * sharp.creases()


def test_gradients_of_a_mesh_are_the_same_each_time_with_several_threads():
    with torch_threads(2):
        places, cells, weights = lattice(40), tetrahedra(40), torch.randn(3, 64, 64)
        found = []
        for _ in range(8):
            distance = (places.norm(dim=1) - 0.6).requires_grad_()
            mesh = marching_tetrahedra(places, distance, cells)
            raster = rasterise(mesh, mesh.vertex_normals(), Camera(30, 20, 4, 40), 64)
            (mesh.creases() + (raster.attributes * weights).sum() + raster.coverage.sum()).backward()
            found.append(distance.grad)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_tetrahedra_fill_the_box_with_one_hand():
    corners = lattice(3)[tetrahedra(3)]
    volumes = torch.linalg.det(corners[:, 1:] - corners[:, :1]) / 6
    assert bool((volumes > 0).all())
    torch.testing.assert_close(volumes.sum(), torch.tensor(8.0))


@pytest.mark.parametrize("shape", ["sphere", "cube", "torus", "pyramid"])
def test_surfaces_are_watertight_and_look_outwards(shape: str):
    places = lattice(20)
    mesh = marching_tetrahedra(places, unit_sdf(shape, places / 0.83), tetrahedra(20))
    sides = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    forwards = {tuple(side) for side in sides.tolist()}
    assert len(forwards) == len(sides)  # no side twice in one direction
    assert all((b, a) in forwards for a, b in forwards)  # each once in the other
    euler = len(mesh.vertices) - len(sides) // 2 + len(mesh.faces)
    assert euler == (0 if shape == "torus" else 2)
    centres = mesh.vertices[mesh.faces].mean(1)
    step = 0.02 * mesh.face_normals()
    outward = unit_sdf(shape, (centres + step) / 0.83) > unit_sdf(shape, (centres - step) / 0.83)
    assert float(outward.float().mean()) > 0.99
    points = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inside = (unit_sdf(shape, points / 0.83) < 0).float().mean() * 8
    assert abs(float(mesh.volume() / inside) - 1) < 0.08


def test_the_surface_moves_as_its_distances_do():
    """A ball's volume grows by its area times the radius' growth."""
    places, cells = lattice(24), tetrahedra(24)
    radius = torch.tensor(0.6, requires_grad=True)
    volume = marching_tetrahedra(places, places.norm(dim=1) - radius, cells).volume()
    volume.backward()
    assert radius.grad is not None
    torch.testing.assert_close(volume, torch.tensor(4 / 3 * math.pi * 0.6**3), rtol=0.02, atol=0)
    torch.testing.assert_close(radius.grad, torch.tensor(4 * math.pi * 0.6**2), rtol=0.03, atol=0)


def test_hollows_are_filled_and_open_rooms_are_not():
    places = lattice(20).view(21, 21, 21, 3)
    distance = places.norm(dim=3)
    shell = (distance < 0.8) & (distance > 0.5)
    assert torch.equal(outer_hull(shell), distance < 0.8)
    cup = shell & ~((places[..., 1] > 0) & (places[..., 0].abs() < 0.4) & (places[..., 2].abs() < 0.4))
    assert not bool(outer_hull(cup)[10, 10, 10])


def test_coverage_is_that_of_a_disc():
    size, camera = 64, Camera(30, 20, 4)
    raster = rasterise(ball(32), ball(32).vertex_normals(), camera, size)
    tangent = math.tan(math.asin(0.6 / 4)) / camera.slope * size / 2
    torch.testing.assert_close(raster.coverage.sum(), torch.tensor(math.pi * tangent**2), rtol=0.01, atol=0)


def test_outline_gradient_agrees_with_finite_differences():
    """Of the covered area by the size and the place of a cube."""
    places = lattice(8)
    mesh = marching_tetrahedra(places, places.abs().amax(1) - 0.55, tetrahedra(8))
    camera = Camera(10, 15, 4)

    def area(values: torch.Tensor) -> torch.Tensor:
        moved = Mesh(mesh.vertices * values[0] + values[1:], mesh.faces)
        coverage = rasterise(moved, moved.vertices, camera, 48).coverage[0]
        weights = torch.linspace(0, 1, 48)  # a weight by column, so that a shift counts too
        return (coverage * weights).sum()

    values = torch.tensor([1.0, 0.05, -0.02, 0.0], requires_grad=True)
    (slope,) = torch.autograd.grad(area(values), values)
    step = 0.02
    for index in range(4):
        offset = torch.zeros(4)
        offset[index] = step
        difference = (area(values.detach() + offset) - area(values.detach() - offset)) / (2 * step)
        assert abs(float(slope[index] - difference)) < 0.04 * float(slope.abs().max()), index


def test_attributes_are_interpolated_in_space_not_on_the_screen():
    """A square seen at a slant: the place at each pixel lies on the ray through it."""
    vertices = torch.tensor([[-1.0, -0.3, -1.0], [1.0, -0.3, -1.0], [1.0, -0.3, 1.0], [-1.0, -0.3, 1.0]])
    mesh, camera = Mesh(vertices, torch.tensor([[0, 2, 1], [0, 3, 2]])), Camera(25, 30, 4)
    raster = rasterise(mesh, vertices, camera, 32, smooth=False)
    from models.scene.cameras import rays

    origins, directions = rays([camera], 32)
    seen = raster.faces >= 0
    towards = raster.attributes[:, seen] - origins[0][:, None]
    cosine = (towards / towards.norm(dim=0) * directions[0][:, seen]).sum(0)
    assert int(seen.sum()) > 100 and float(cosine.min()) > 1 - 1e-5


def test_the_nearest_face_is_seen():
    near, far = ball(12), ball(12)
    both = Mesh(
        torch.cat([near.vertices * 0.3 + torch.tensor([0.0, 0.0, 1.5]), far.vertices]),
        torch.cat([near.faces, far.faces + len(near.vertices)]),
    )
    raster = rasterise(both, both.vertices, Camera(0, 0, 4), 32)
    assert int(raster.faces[16, 16]) < len(near.faces) and float(raster.attributes[2, 16, 16]) > 1.2


class Nvdiffrast(ModuleType):
    """nvdiffrast.torch as it is documented: rows from y = -1 upwards, (u, v, z / w, triangle + 1) with u and v the
    shares of a triangle's first two corners. By homogeneous edge functions (Olano and Greer 1997); no antialiasing."""

    @staticmethod
    def RasterizeCudaContext(device: torch.device) -> torch.device:
        return device

    @staticmethod
    def rasterize(
        _context: Any, pos: Tensor, tri: Tensor, resolution: list[int], grad_db: bool = True
    ) -> tuple[Tensor, None]:
        assert pos.shape[0] == 1 and tri.dtype == torch.int32 and pos.is_contiguous() and tri.is_contiguous()
        height, width = resolution
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) * 2 / height - 1, (torch.arange(width) + 0.5) * 2 / width - 1, indexing="ij"
        )
        pixels = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3).double()

        def shares(corners: Tensor, pixels: Tensor) -> Tensor:
            a, b, c = corners[..., [0, 1, 3]].unbind(-2)
            sides = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -2)
            return (sides * pixels[..., None, :]).sum(-1) / (a * sides[..., 0, :]).sum(-1, keepdim=True)

        corners = pos[0].double()[tri.long()]
        with torch.no_grad():
            parts = shares(corners[None], pixels[:, None])
            depth = (parts * corners[..., 2]).sum(2) / (parts * corners[..., 3]).sum(2)
            nearest = torch.where((parts >= 0).all(2), depth, torch.inf).min(1)
        seen, face = nearest.values.isfinite().nonzero()[:, 0], nearest.indices
        chosen = shares(corners[face[seen]], pixels[seen])
        chosen = chosen / chosen.sum(1, keepdim=True)
        values = torch.cat([chosen[:, :2], torch.stack([nearest.values[seen], face[seen] + 1.0], 1)], 1)
        return values.new_zeros(len(pixels), 4).index_put((seen,), values).view(1, height, width, 4).float(), None

    @staticmethod
    def interpolate(attr: Tensor, rast: Tensor, tri: Tensor) -> tuple[Tensor, None]:
        u, v, _, face = rast[0].unbind(-1)
        corners = attr[0][tri.long()[(face.long() - 1).clamp(min=0)]]
        values = (corners * torch.stack([u, v, 1 - u - v], -1)[..., None]).sum(2)
        return torch.where(face[..., None] > 0, values, 0.0)[None], None

    @staticmethod
    def antialias(color: Tensor, _rast: Tensor, _pos: Tensor, _tri: Tensor) -> Tensor:
        return color


@pytest.mark.parametrize("camera", [Camera(30, 20, 4), Camera(200, -35, 2.5, 60)])
def test_nvdiffrast_is_asked_for_the_same_picture(camera: Camera, monkeypatch: pytest.MonkeyPatch):
    """Faces, attributes and their slopes are those of the torch rasteriser, the right way up."""
    monkeypatch.setitem(sys.modules, "nvdiffrast", ModuleType("nvdiffrast"))
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", Nvdiffrast("nvdiffrast.torch"))
    places = lattice(8)
    shape = marching_tetrahedra(places, (places - torch.tensor([0.2, 0.15, -0.1])).norm(dim=1) - 0.6, tetrahedra(8))
    values = torch.cat([shape.vertices, shape.vertex_normals()], 1)
    weights, slopes, drawn = torch.rand(6, 32, 32, generator=torch.Generator().manual_seed(0)), [], []
    for draw in (rasterise, nvdiffrast_backend.draw):
        vertices = shape.vertices.clone().requires_grad_()
        result = draw(Mesh(vertices, shape.faces), values, camera, 32, smooth=False)
        image, coverage, faces = (
            (result.attributes, result.coverage, result.faces) if isinstance(result, Raster) else result
        )
        slopes.append(torch.autograd.grad((image * weights).sum(), vertices)[0])
        drawn.append((image.detach(), coverage, faces))
    (image, coverage, faces), (other, its_coverage, its_faces) = drawn
    assert int((faces >= 0).sum()) > 100 and torch.equal(faces, its_faces) and torch.equal(coverage, its_coverage)
    torch.testing.assert_close(other, image, atol=1e-4, rtol=0)
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-3 * float(slopes[0].abs().max()), rtol=0)
    z = nvdiffrast_backend.clip_places(shape.vertices, camera)
    assert bool((z[:, 2].abs() < z[:, 3]).all())  # between the near and the far plane
    monkeypatch.setattr(nvdiffrast_backend, "draw", None)
    assert torch.equal(rasterise(shape, values, camera, 32, smooth=False).faces, faces)  # not taken on a CPU


@pytest.mark.parametrize("half", [0.1, 1.0, 20.0])
def test_threshold_and_surface_fit_the_rendered_blob(half: float):
    """In boxes of any size, with their empty cells left out."""
    torch.manual_seed(0)
    fields = scene(half=half).new()
    fields.prepare(fields.update_every)
    assert 0.05 < float(cast(Occupancy, fields.occupancy[0]).cells.float().mean()) < 0.5
    level = find_threshold(fields, 0, scene(half=half).orbit, cells=24, views=3, size=32)
    mesh = surface(fields.particle(0), 32, level)
    assert 0.4 < float((mesh.volume() * 3 / (4 * math.pi)) ** (1 / 3)) / half < 0.6


def test_a_hollow_scene_keeps_its_inner_walls():
    torch.manual_seed(0)
    mesh = surface(scene(-40.0).new().particle(0), 32, 2.0)
    inner = mesh.vertices.norm(dim=1).min()
    assert 0.4 < float(inner) < 0.6 and 6 < float(mesh.volume()) < 8 - 4 / 3 * math.pi * float(inner) ** 3


def test_the_geometry_stage_moves_no_colours():
    torch.manual_seed(0)
    fields = scene().new()
    geometry = Geometry(fields, [5.0], 8, "shaded")
    geometry(Views.plain([Camera(30)], 0, 16)).images.square().mean().backward()
    assert geometry.distance.grad is not None and all(value.grad is None for value in fields.parameters())


def test_an_empty_field_says_what_to_change():
    fields = scene(strength=-40.0).new()
    with torch.no_grad():
        for parameter in fields.parameters():
            parameter.zero_()
        fields.particle(0).blob = Blob(-200.0, 100.0)  # type: ignore[misc]
    with pytest.raises(UserError, match=r"no surface.*threshold.*train"):
        find_threshold(fields, 0, scene().orbit, cells=12, views=2, size=16)
    with pytest.raises(UserError, match=r"no surface at density 3"):
        surface(fields.particle(0), 12, 3.0)


def test_files_reload_with_texture_and_video(tmp_path: Path):
    trimesh, imageio = pytest.importorskip("trimesh"), pytest.importorskip("imageio")
    pytest.importorskip("xatlas")
    torch.manual_seed(0)
    fields = scene().new()
    saved.save(tmp_path / "scene", scene(), fields.tensors(), "card")
    sizes = export.Sizes(faces=800, texture=64, frames=4, size=32)
    names = {path.name for path in export.export(tmp_path / "scene", tmp_path / "files", sizes)}
    assert {"model.glb", "model.obj", "model.ply", "turntable.mp4", "sheet.png"} <= names
    whole = trimesh.load(tmp_path / "files/model.glb")
    (part,) = whole.geometry.values()
    assert part.is_watertight or abs(part.volume) > 0.2
    assert part.visual.material.baseColorTexture.size == (64, 64) and len(part.faces) <= 800
    # What the texture says at a vertex is the field's colour there.
    pixels = np.asarray(part.visual.material.baseColorTexture.convert("RGB")).astype(float) / 255
    uv = np.asarray(part.visual.uv)
    rows = np.clip(((1 - uv[:, 1]) * 64).astype(int), 0, 63), np.clip((uv[:, 0] * 64).astype(int), 0, 63)
    with torch.no_grad():
        truth = fields.particle(0)(torch.tensor(np.asarray(part.vertices), dtype=torch.float32))[1].numpy()
    assert np.abs(pixels[rows] - truth).mean() < 0.05
    assert len(imageio.mimread(tmp_path / "files/turntable.mp4")) == 4
    assert trimesh.load(tmp_path / "files/model.ply").visual.kind == "vertex"


def test_files_have_every_object_and_no_speck():
    pytest.importorskip("trimesh")
    places = lattice(24)
    off = lambda x, radius: (places - torch.tensor([x, 0.0, 0.0])).norm(dim=1) - radius
    apart = torch.stack([off(0.5, 0.35), off(-0.45, 0.3), (places - 0.8).norm(dim=1) - 0.06]).amin(0)
    both = marching_tetrahedra(places, torch.minimum(off(0.5, 0.35), off(-0.45, 0.3)), tetrahedra(24))
    mesh = export.tidy(marching_tetrahedra(places, apart, tetrahedra(24)), 10**6)
    torch.testing.assert_close(mesh.volume(), both.volume(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"frames": 0}, {"size": 0}, {"size": 33}, {"texture": 0}, {"faces": 0}, {"threshold": 0.0}], ids=str
)
def test_files_of_no_size_are_refused(wrong: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match=rf"{next(iter(wrong))}: "):
        export.Arguments(tmp_path, tmp_path / "files", **wrong).run()


def test_a_folder_without_a_scene_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no scene"):
        saved.read(tmp_path)
