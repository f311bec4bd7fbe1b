"""A differentiable rasteriser in plain torch: hard visibility, perspective interpolation, analytic outlines.

A picture's coverage is 0 or 1 but along the outline, where it follows the signed distance to the nearest silhouette
edge, so outlines have gradients (the idea of nvdiffrast's antialiasing, arXiv 2011.03277, Sec. 3.6, in another form).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.scene import nvdiffrast_backend
from models.scene.cameras import Camera
from models.scene.mesh import Mesh, at

PAIRS = 1 << 21
"""Pixels times edges that are compared at once."""


@dataclass(frozen=True)
class Raster:
    """One view of a mesh. ``attributes`` (C, H, W), not premultiplied and continued one pixel beyond the outline;
    ``coverage`` (1, H, W) in [0, 1]; ``faces`` (H, W) int64, the visible one or -1."""

    attributes: Tensor
    coverage: Tensor
    faces: Tensor


def project(vertices: Tensor, camera: Camera, size: int) -> tuple[Tensor, Tensor]:
    """Places (V, 2) in pixels, x right and y down, and depths (V,) along the camera's axis."""
    axes = vertices.new_tensor(camera.axes)
    local = vertices @ axes.T - vertices.new_tensor([0.0, 0.0, camera.radius])
    depth = -local[:, 2]
    scale = 0.5 * size / camera.slope
    return torch.stack([local[:, 0], -local[:, 1]], 1) / depth[:, None] * scale + 0.5 * size, depth


def barycentric(corners: Tensor, points: Tensor) -> Tensor:
    """Coordinates (N, 3) of points (N, 2) in triangles (N, 3, 2)."""
    cross = lambda u, v: u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
    a, b, c = corners.unbind(1)
    area = cross(b - a, c - a)
    area = torch.where(area.abs() < 1e-9, 1e-9, area)
    first, second = cross(b - points, c - points) / area, cross(c - points, a - points) / area
    return torch.stack([first, second, 1 - first - second], 1)


@torch.no_grad()
def visible_faces(places: Tensor, depth: Tensor, faces: Tensor, size: int) -> Tensor:
    """(size^2,) int64: the nearest face at each pixel's centre, -1 for none. Faces behind the camera are left out."""
    corners = places[faces]
    low = (corners.amin(1) - 0.5).ceil().clamp(0, size).long()
    high = ((corners.amax(1) - 0.5).floor() + 1).clamp(0, size).long()
    extent = (high - low).clamp(min=0) * (depth[faces] > 1e-3).all(1, keepdim=True)
    count = extent[:, 0] * extent[:, 1]
    face = torch.arange(len(faces), device=faces.device).repeat_interleave(count)
    offset = torch.arange(len(face), device=faces.device) - (count.cumsum(0) - count)[face]
    row = torch.div(offset, extent[face, 0], rounding_mode="floor")
    x, y = low[face, 0] + offset - row * extent[face, 0], low[face, 1] + row
    weights = barycentric(corners[face], torch.stack([x, y], 1) + 0.5)
    covered = (weights >= 0).all(1)
    face, pixel, weights = face[covered], (y * size + x)[covered], weights[covered]
    nearness = (weights / depth[faces[face]]).sum(1)  # 1 / depth is linear on the screen
    best = nearness.new_zeros(size**2).scatter_reduce(0, pixel, nearness, "amax")
    wins = nearness >= best[pixel]
    return torch.full((size**2,), -1, device=faces.device).scatter_(0, pixel[wins], face[wins])


def silhouette_edges(places: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Ends (E,), (E,) of the edges between a face that looks at the camera and one that does not, or that have one."""
    a, b, c = places[faces].unbind(1)
    front = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0] < 0).float()  # y points down
    sides = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
    keys, which = (sides[:, 0] * len(places) + sides[:, 1]).unique(return_inverse=True)
    fronts = front.new_zeros(len(keys)).index_add(0, which, front.repeat(3))
    count = front.new_zeros(len(keys)).index_add(0, which, torch.ones_like(front).repeat(3))
    chosen = keys[(fronts == 1) | (count == 1)]
    return chosen // len(places), chosen % len(places)


def _coverage(places: Tensor, faces: Tensor, covered: Tensor) -> Tensor:
    """(size^2,): ``covered`` (size, size) of 0 and 1, replaced along its border by 1/2 + the signed distance to the
    outline in pixels."""
    size = covered.shape[0]
    around = covered[None, None]
    border = F.max_pool2d(around, 3, 1, 1) != -F.max_pool2d(-around, 3, 1, 1)
    band = border.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        start, end = silhouette_edges(places, faces)
        if not len(band) or not len(start):
            return covered.flatten()
        points = torch.stack([band % size, torch.div(band, size, rounding_mode="floor")], 1) + 0.5
        nearest = torch.cat(
            [
                _distance(part[:, None], places[start], places[end]).argmin(1)
                for part in points.split(max(1, PAIRS // len(start)))
            ]
        )
    distance = _distance(points, at(places, start[nearest]), at(places, end[nearest]))
    sign = covered.flatten()[band] * 2 - 1
    return covered.flatten().index_put((band,), (0.5 + sign * distance).clamp(0, 1))


def _distance(points: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """From points (..., 2) to segments (..., 2)."""
    along = end - start
    share = ((points - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-9)
    foot = start + share.clamp(0, 1)[..., None] * along
    return ((points - foot).square().sum(-1) + 1e-12).sqrt()


def _draw(mesh: Mesh, attributes: Tensor, camera: Camera, size: int, smooth: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attributes (C, H, W), coverage (1, H, W) and visible faces (H, W)."""
    places, depth = project(mesh.vertices, camera, size)
    visible = visible_faces(places, depth, mesh.faces, size)
    pixels = (visible >= 0).nonzero().squeeze(1)
    corners = mesh.faces[visible[pixels]]
    centres = torch.stack([pixels % size, torch.div(pixels, size, rounding_mode="floor")], 1) + 0.5
    weights = barycentric(at(places, corners), centres) / at(depth, corners)
    weights = weights / weights.sum(1, keepdim=True)
    values = (at(attributes, corners) * weights[..., None]).sum(1)
    image = values.new_zeros(size**2, attributes.shape[1]).index_put((pixels,), values)
    coverage = (visible >= 0).to(image.dtype).view(size, size)
    if smooth and len(pixels):
        coverage = _coverage(places, mesh.faces, coverage)
    return image.T.view(-1, size, size), coverage.view(1, size, size), visible.view(size, size)


def _continued(image: Tensor, covered: Tensor) -> Tensor:
    """Attributes (C, H, W), where nothing is ``covered`` (H, W) the mean of the covered neighbours."""
    total = F.avg_pool2d(image[None], 3, 1, 1, divisor_override=1)[0]
    count = F.avg_pool2d(covered.to(image.dtype)[None, None], 3, 1, 1, divisor_override=1)[0]
    return torch.where(covered, image, total / count.clamp(min=1))


def rasterise(mesh: Mesh, attributes: Tensor, camera: Camera, size: int, smooth: bool = True) -> Raster:
    """One view of ``mesh`` with ``attributes`` (V, C) at its vertices; differentiable in both, and never in bfloat16.

    Without ``smooth`` coverage is 0 or 1 and has no gradient, and attributes end with it. On CUDA nvdiffrast's kernels
    do the work where they are installed.
    """
    with torch.autocast(mesh.vertices.device.type, enabled=False):
        fast = mesh.vertices.is_cuda and len(mesh.faces) > 0 and nvdiffrast_backend.usable()
        image, coverage, faces = (nvdiffrast_backend.draw if fast else _draw)(mesh, attributes, camera, size, smooth)
        return Raster(_continued(image, faces >= 0) if smooth else image, coverage, faces)
