"""nvdiffrast's kernels (arXiv 2011.03277) for the rasteriser: CUDA only, licensed for research and evaluation only.

Never needed and never installed along: :func:`models.scene.raster.rasterise` takes it where it can be imported.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from models.scene.cameras import Camera
from models.scene.mesh import Mesh


@functools.cache
def usable() -> bool:
    """Whether it can be imported."""
    try:
        import nvdiffrast.torch  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def _context(device: torch.device) -> Any:
    """Its buffers on a device, made once."""
    import nvdiffrast.torch as dr  # type: ignore[import-not-found]

    return dr.RasterizeCudaContext(device=device)


def clip_places(vertices: Tensor, camera: Camera) -> Tensor:
    """Homogeneous clip coordinates (V, 4) of world places (V, 3): within the picture x / w and y / w are in [-1, 1],
    and w is the depth along the camera's axis.

    y points down, so that nvdiffrast's first row, which is at y = -1, is the picture's upper one. The near and far
    planes lie closely around the vertices, for the precision of z.
    """
    axes = vertices.new_tensor(camera.axes)
    x, y, z = (vertices @ axes.T - vertices.new_tensor([0.0, 0.0, camera.radius])).unbind(1)
    near, far = 0.9 * (-z).detach().amin().clamp(min=1e-3), 1.1 * (-z).detach().amax().clamp(min=1e-2)
    depth = (-z * (far + near) - 2 * far * near) / (far - near)
    return torch.stack([x / camera.slope, -y / camera.slope, depth, -z], 1)


def draw(
    mesh: Mesh, attributes: Tensor, camera: Camera, size: int, smooth: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Attributes (C, H, W), coverage (1, H, W) and visible faces (H, W), -1 for none, of a mesh that has faces.

    Differentiable in ``attributes`` (V, C) and, with ``smooth``, in the outline too.
    """
    import nvdiffrast.torch as dr  # type: ignore[import-not-found]

    places = clip_places(mesh.vertices, camera)[None].contiguous()
    faces = mesh.faces.int().contiguous()
    found, _ = dr.rasterize(_context(places.device), places, faces, resolution=[size, size], grad_db=False)
    image, _ = dr.interpolate(attributes[None].contiguous(), found, faces)
    visible = found[0, :, :, 3].long() - 1
    coverage = (visible >= 0).to(image.dtype)[None, :, :, None]
    if smooth:
        coverage = dr.antialias(coverage, found, places, faces)
    return image[0].movedim(-1, 0), coverage[0].movedim(-1, 0), visible
