"""A scene's model.glb as it is read back, and pictures of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError
from models.scene.cameras import Camera
from models.scene.mesh import Mesh
from models.scene.raster import rasterise


@dataclass(frozen=True)
class Exported:
    """A mesh, where on the texture (V, 2) its vertices are, and the texture (3, H, W) in [0, 1]."""

    mesh: Mesh
    uv: Tensor
    texture: Tensor

    @classmethod
    def read(cls, path: Path) -> "Exported":
        """UserError for a file that is not one textured mesh."""
        try:
            import trimesh
        except ImportError as error:
            raise UserError("reading meshes needs trimesh: pip install -e '.[scene]'") from error
        try:
            (part,) = trimesh.load_scene(path).geometry.values()
            picture = np.asarray(part.visual.material.baseColorTexture.convert("RGB"), dtype=np.float32) / 255
            uv = torch.tensor(np.asarray(part.visual.uv), dtype=torch.float32)
        except (OSError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is not one mesh with a texture ({reason}): export the scene again") from error
        mesh = Mesh(torch.tensor(np.asarray(part.vertices), dtype=torch.float32), torch.tensor(np.asarray(part.faces)))
        return cls(mesh, uv, torch.from_numpy(picture).permute(2, 0, 1))

    @torch.no_grad()
    def views(self, cameras: Sequence[Camera], size: int, lit: bool = False) -> tuple[Tensor, Tensor]:
        """RGB (B, 3, H, W) in [0, 1] and coverage (B, H, W); ``lit`` by the solids world's lamp behind the camera."""
        drawn = [self._view(camera, size, lit) for camera in cameras]
        return torch.stack([colour for colour, _ in drawn]), torch.stack([coverage for _, coverage in drawn])

    def _view(self, camera: Camera, size: int, lit: bool) -> tuple[Tensor, Tensor]:
        normals = self.mesh.vertex_normals() if lit else self.uv[:, :0]
        raster = rasterise(self.mesh, torch.cat([self.uv, normals], 1), camera, size)
        grid = torch.stack([2 * raster.attributes[0] - 1, 1 - 2 * raster.attributes[1]], -1)
        colour = F.grid_sample(self.texture[None], grid[None], align_corners=False)[0]
        if lit:
            angle = torch.deg2rad(torch.tensor(camera.azimuth))
            lamp = F.normalize(torch.stack([angle.sin(), torch.tensor(1.3), angle.cos()]), dim=0)
            normal = F.normalize(raster.attributes[2:], dim=0, eps=1e-6)
            colour = colour * (0.72 + 0.28 * (normal * lamp[:, None, None]).sum(0).clamp(min=0))
        # Beyond the outline go on with colours, not places: those of two charts have another one between them.
        seen = (raster.faces >= 0).float()[None]
        total = F.avg_pool2d((colour * seen)[None], 3, 1, 1, divisor_override=1)[0]
        count = F.avg_pool2d(seen[None], 3, 1, 1, divisor_override=1)[0]
        return torch.where(seen > 0, colour, total / count.clamp(min=1)), raster.coverage[0]


def on_white(colours: Tensor, coverage: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of colours with their coverage (B, H, W)."""
    return (colours * coverage[:, None] + 1 - coverage[:, None]).clamp(0, 1)
