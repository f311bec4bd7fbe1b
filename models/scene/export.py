"""A scene as files: GLB with a texture, OBJ, PLY, a turntable and a strip of views.

python -m models.scene.export RUN/texture/student OUT        again, e.g. with another --texture or --faces
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError, run_command
from models.folders import replace_folder
from models.scene import saved
from models.scene.backdrops import Backdrop
from models.scene.cameras import Camera
from models.scene.fields import Field
from models.scene.mesh import Mesh
from models.scene.particles import Views
from models.scene.raster import barycentric, visible_faces
from models.scene.surface import Picture, draw, find_threshold, surface

CELLS = 96
"""Cells a side of the grid that a field without a geometry stage is turned into a mesh on."""
SPECK = 0.05
"""Of the largest part's area: what is smaller is left out."""


def check_libraries() -> None:
    """UserError that says what to install where a scene's files could not be written."""
    try:
        for name in ("trimesh", "xatlas", "fast_simplification", "imageio", "imageio_ffmpeg"):
            import_module(name)
    except ImportError as error:
        raise UserError(f"writing meshes needs {error.name}: pip install -e '.[scene]'") from error


def _library(name: str) -> Any:
    check_libraries()
    return import_module(name)


def tidy(mesh: Mesh, faces: int) -> Mesh:
    """Simplified to at most ``faces`` triangles, looking outwards; of its connected parts those whose area is more than
    :data:`SPECK` of the largest's."""
    trimesh = _library("trimesh")
    whole = trimesh.Trimesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy(), process=True)
    parts = whole.split(only_watertight=False)
    least = SPECK * max((part.area for part in parts), default=0.0)
    part = trimesh.util.concatenate([part for part in parts if part.area > least]) if len(parts) else whole
    if len(part.faces) > faces:
        import fast_simplification

        places, triangles, *_ = fast_simplification.simplify(
            part.vertices.astype(np.float32), part.faces.astype(np.int32), target_count=faces
        )
        part = trimesh.Trimesh(places, triangles, process=True)
    if part.volume < 0:
        part.invert()
    return Mesh(torch.tensor(np.asarray(part.vertices), dtype=torch.float32), torch.tensor(np.asarray(part.faces)))


@dataclass(frozen=True)
class Textured:
    """A mesh with ``uv`` (V, 2) in [0, 1], v upwards, and a texture (3, H, W) in [0, 1]; row 0 is v = 1."""

    mesh: Mesh
    uv: Tensor
    texture: Tensor

    def library_mesh(self) -> Any:
        """The same as trimesh has it: not metallic, rough."""
        trimesh = _library("trimesh")
        pixels = (self.texture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.fromarray(pixels), metallicFactor=0.0, roughnessFactor=1.0
        )
        visual = trimesh.visual.TextureVisuals(uv=self.uv.numpy(), material=material)
        return trimesh.Trimesh(self.mesh.vertices.numpy(), self.mesh.faces.numpy(), visual=visual, process=False)


@torch.no_grad()
def bake(mesh: Mesh, field: Field, side: int) -> Textured:
    """Unwrap a mesh (xatlas) and fill its texture, ``side`` pixels a side, with the field's colours on its surface."""
    xatlas = _library("xatlas")
    origin, faces, uv = xatlas.parametrize(mesh.vertices.numpy(), mesh.faces.numpy())
    vertices = mesh.vertices[torch.from_numpy(origin.astype(np.int64))]
    faces, uv = torch.from_numpy(faces.astype(np.int64)), torch.from_numpy(np.ascontiguousarray(uv))
    places = torch.stack([uv[:, 0], 1 - uv[:, 1]], 1) * side
    face = visible_faces(places, torch.ones(len(places)), faces, side)
    pixels = (face >= 0).nonzero().squeeze(1)
    centres = torch.stack([pixels % side, torch.div(pixels, side, rounding_mode="floor")], 1) + 0.5
    corners = faces[face[pixels]]
    weights = barycentric(places[corners], centres)
    points = (vertices[corners] * weights[..., None]).sum(1)
    colours = torch.cat([field(part.to(next(field.parameters()).device))[1].cpu() for part in points.split(1 << 18)])
    texture = torch.zeros(side * side, 3).index_put((pixels,), colours).T.reshape(1, 3, side, side)
    filled = (face >= 0).float().view(1, 1, side, side)
    for _ in range(8):  # beyond the charts' borders, where a viewer's filter reads too
        total = F.avg_pool2d(texture * filled, 3, 1, 1, divisor_override=1)
        count = F.avg_pool2d(filled, 3, 1, 1, divisor_override=1)
        texture, filled = torch.where(filled > 0, texture, total / count.clamp(min=1)), (count > 0).float()
    return Textured(Mesh(vertices, faces), uv, texture[0])


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def turntable(
    mesh: Mesh, field: Field, backdrop: Backdrop, cameras: Sequence[Camera], size: int, picture: Picture = "colour"
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of one mesh."""
    frames = [
        draw([mesh], [field], backdrop, Views.plain([camera], 0, size, mesh.vertices.device), picture).images
        for camera in cameras
    ]
    return torch.cat(frames)


def write_video(path: Path, pixels: np.ndarray, rate: int = 24) -> None:
    """H.264 in MP4 of frames (B, H, W, 3) uint8 with even sides."""
    imageio = _library("imageio")
    with imageio.get_writer(path, fps=rate, quality=8, macro_block_size=2) as writer:
        for frame in pixels:
            writer.append_data(frame)


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of pictures (B, H, W, 3), one below the other."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows]))


@dataclass(frozen=True)
class Sizes:
    """Density of the surface (None: found), triangles, texture side, frames of the turntable and their side."""

    threshold: float | None = None
    faces: int = 6000
    texture: int = 512
    frames: int = 48
    size: int = 256

    def __post_init__(self) -> None:
        """UserError for numbers that no file can have."""
        least = {"faces": 100, "texture": 64, "frames": 1, "size": 32}
        if low := [f"{name}: at least {number}" for name, number in least.items() if getattr(self, name) < number]:
            raise UserError("; ".join(low))
        if self.size % 2:
            raise UserError(f"size: a video's is even, not {self.size}")
        if self.threshold is not None and self.threshold <= 0:
            raise UserError("threshold: a density above 0, or none")


def load(folder: Path, threshold: float | None) -> tuple[saved.Scene, list[Mesh], list[Field], Backdrop]:
    """Meshes of any stage's folder; those of a volume stage are its fields' surfaces."""
    scene, tensors = saved.read(folder)
    if "mesh.0.vertices" in tensors:
        scene, meshes, fields = saved.load_meshes(folder)
        return scene, meshes, fields.all(), fields.backdrop
    scene, fields = saved.load_fields(folder)
    each = fields.all()
    chosen = [threshold or find_threshold(fields, index, scene.orbit) for index in range(scene.particles)]
    with torch.no_grad():
        meshes = [surface(field, CELLS, level) for field, level in zip(each, chosen, strict=True)]
    return scene, meshes, each, fields.backdrop


def export(folder: Path, output: Path, sizes: Sizes, picture: Picture = "colour") -> list[Path]:
    """Write ``model.glb``, ``.obj`` (with ``.mtl`` and texture), ``.ply`` (vertex colours), ``turntable.mp4`` and
    ``sheet.png``, for every particle with its number in front if there are several; ``output`` is replaced.

    Raises UserError where there is no surface.
    """
    scene, meshes, fields, backdrop = load(folder, sizes.threshold)
    trimesh = _library("trimesh")
    strips: list[np.ndarray] = []
    with replace_folder(output) as temporary:
        for index, (mesh, field) in enumerate(zip(meshes, fields, strict=True)):
            prefix = f"{index}-" if len(meshes) > 1 else ""
            small = tidy(mesh, sizes.faces)
            textured = bake(small, field, sizes.texture)
            library_mesh = textured.library_mesh()
            library_mesh.export(temporary / f"{prefix}model.glb")
            (temporary / f"{prefix}obj").mkdir()
            library_mesh.export(temporary / f"{prefix}obj" / "model.obj")
            with torch.no_grad():
                colours = (field(small.vertices)[1] * 255).round().byte().numpy()
            plain = trimesh.Trimesh(small.vertices.numpy(), small.faces.numpy(), vertex_colors=colours, process=False)
            plain.export(temporary / f"{prefix}model.ply")
            cameras = scene.orbit.turntable(sizes.frames)
            pixels = to_pixels(turntable(small, field, backdrop, cameras, sizes.size, picture))
            write_video(temporary / f"{prefix}turntable.mp4", pixels)
            strips.append(pixels[:: max(1, sizes.frames // 8)][:8])
        sheet(strips).save(temporary / "sheet.png")
    return sorted(path for path in output.rglob("*") if path.is_file())


@dataclass
class Arguments:
    """Write a scene's files again."""

    folder: tyro.conf.Positional[Path]
    """A stage's student folder."""
    output: tyro.conf.Positional[Path]
    """Folder to write; it is replaced."""
    threshold: float | None = None
    """Density of the surface, for a volume stage; None: found from the pictures' opacity."""
    faces: int = 6000
    """Triangles at most."""
    texture: int = 512
    """Side of the texture, pixels."""
    frames: int = 48
    """Pictures of the turntable."""
    size: int = 256
    """Their side, pixels."""
    picture: Picture = "shaded"
    """What the turntable shows."""

    def run(self) -> None:
        sizes = Sizes(self.threshold, self.faces, self.texture, self.frames, self.size)
        for path in export(self.folder, self.output, sizes, self.picture):
            print(path)


if __name__ == "__main__":
    run_command(tyro.cli(Arguments).run)
