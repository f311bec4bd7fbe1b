"""Pictures of scenes with their boxes, masks and depth, by sphere tracing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.scene.cameras import Camera, camera_to_world, rays
from models.scene.captions import SHAPES
from models.scene.solids.scenes import FLOOR, RGB, Scene
from models.scene.solids.shapes import unit_sdf


@dataclass(frozen=True)
class Rendered:
    """``images`` (B, 3, H, W) in [-1, 1]; ``index`` (B, H, W) int64, the solid at each pixel's centre, -1 for none;
    ``depth`` (B, H, W), distance from the camera along the pixel's ray in world units, infinite where there is none."""

    images: Tensor
    index: Tensor
    depth: Tensor

    def masks(self, count: int) -> Tensor:
        """(B, count, H, W) bool: the visible pixels of each solid."""
        return self.index[:, None] == torch.arange(count, device=self.index.device)[:, None, None]

    def boxes(self, count: int) -> Tensor:
        """(B, count, 4) int64: x0, y0, x1, y1 of the visible pixels, ends exclusive, as GenEval has them; all zero for
        a solid that is not there."""
        return boxes_around(self.masks(count))


def boxes_around(masks: Tensor) -> Tensor:
    """(..., 4) int64 around masks (..., H, W): x0, y0, x1, y1, ends exclusive; all zero around nothing."""
    spans = []
    for dim in (-2, -1):
        hit = masks.any(dim).long()
        first, last = hit.argmax(-1), hit.shape[-1] - hit.flip(-1).argmax(-1)
        spans.append((first, torch.where(hit.any(-1), last, 0)))
    (x0, x1), (y0, y1) = spans
    return torch.stack([x0, y0, x1, y1], -1)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    size: int = 64,
    cameras: Sequence[Camera] | None = None,
    device: torch.device | str = "cpu",
) -> Rendered:
    """Render ``size`` x ``size`` pictures from each scene's own camera, or from ``cameras`` instead, on ``device``.

    All solids of one shape are sphere traced together, each only along the rays that meet its bounding sphere. Edges
    are smooth without more rays: coverage falls from 1 to 0 over the pixel's width as the ray's least distance to the
    surface goes from half a pixel inside to half a pixel outside.
    """
    cameras = cameras or [scene.camera for scene in scenes]
    origins, directions = (part.to(device) for part in rays(cameras, size))
    directions = directions.flatten(2)
    tensor = lambda values: torch.tensor(values, device=device)
    light = tensor([[math.sin(a), 1.3, math.cos(a)] for a in (math.radians(s.light) for s in scenes)])
    light = torch.nn.functional.normalize(light, dim=1)

    flat = [(b, k, solid) for b, scene in enumerate(scenes) for k, solid in enumerate(scene.solids)]
    batch = tensor([b for b, _, _ in flat])
    number = tensor([k for _, k, _ in flat])
    kind = tensor([SHAPES.index(solid.shape) for _, _, solid in flat])
    radius = tensor([solid.radius for _, _, solid in flat])
    centre = tensor([solid.centre for _, _, solid in flat])
    rotation = tensor([solid.rotation for _, _, solid in flat])
    albedo = tensor([RGB[solid.colour] for _, _, solid in flat])
    towards = centre - origins[batch]
    half = tensor([camera.slope for camera in cameras])[batch] / size * towards.norm(dim=1) / radius

    # Rays in front of the camera that pass a bounding sphere, grown by half a pixel.
    bound = radius * (1 + half)
    which, place = _windows(cameras, batch, centre, bound, size)
    channels = torch.arange(3, device=device)[:, None] * size**2
    world = directions.flatten()[channels + (batch[which] * (3 * size**2) + place)]
    along = (towards.T[:, which] * world).sum(0)
    chord = torch.addcmul((bound.square() - towards.square().sum(1))[which], along, along)
    entry = (along - chord.clamp(min=0).sqrt()).clamp(min=0) / radius[which]
    kind = torch.where((chord > 0) & (along > 0), kind[which], -1)
    traced: list[tuple[Tensor, ...]] = []
    for k, shape in enumerate(SHAPES):
        chosen = (kind == k).nonzero().squeeze(1)
        solid, ray = which[chosen], world[:, chosen]
        turn = rotation.permute(1, 2, 0)[:, :, solid]
        start = -(rotation * (towards / radius[:, None])[:, :, None]).sum(1).T[:, solid]
        rows, coverage, distance, normal = _trace(
            shape, start, (turn * ray[:, None]).sum(0), entry[chosen], half[solid]
        )
        solid, ray, normal = solid[rows], ray[:, rows], (turn[:, :, rows] * normal).sum(1)
        sun = light.T[:, batch[solid]]
        diffuse = (normal * sun).sum(0).clamp(min=0)
        specular = (normal * _unit(sun - ray)).sum(0).clamp(min=0) ** 32
        matt = albedo.T[:, solid] * (0.72 + 0.28 * diffuse)
        sheen = 0.02 * (1 + normal[1]) + 0.06 * diffuse + 0.15 * specular
        colour = matt + sheen * (1 - matt)
        traced.append((solid, place[chosen][rows], coverage, distance * radius[solid], colour.T))
    solid, place, coverage, distance, colour = (torch.cat(part) for part in zip(*traced, strict=True))

    # From far to near. Among disjoint bounding spheres that is the order of |distance|^2 - radius^2 along every ray.
    power = towards.square().sum(1) - radius.square()
    rank = ((batch[:, None] == batch) & (power[:, None] < power)).sum(1)[solid]
    pixel = batch[solid] * size**2 + place
    tone = tensor([scene.tone for scene in scenes])
    image = backdrop(tone, origins, directions, light, batch, centre, radius).flatten()[:, None].repeat(1, 3)
    index = torch.full((len(image),), -1, device=device)
    depth = torch.full((len(image),), math.inf, device=device)
    for level in range(int(rank.max()) + 1):
        chosen = (rank == level).nonzero().squeeze(1)
        where = pixel[chosen]
        image[where] = torch.lerp(image[where], colour[chosen], coverage[chosen, None])
        chosen = chosen[coverage[chosen] >= 0.5]
        index[pixel[chosen]], depth[pixel[chosen]] = number[solid[chosen]], distance[chosen]
    images = image.reshape(-1, size, size, 3).permute(0, 3, 1, 2).contiguous() * 2 - 1
    return Rendered(images, index.reshape(-1, size, size), depth.reshape(-1, size, size))


def _windows(
    cameras: Sequence[Camera], batch: Tensor, centre: Tensor, radius: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The pixels of each bounding sphere's box: the sphere and the place, row * ``size`` + column, of each (N,)."""
    view = camera_to_world(cameras).to(batch.device)[batch]
    x, y, z = (view[:, :3, :3].mT @ (centre - view[:, :3, 3])[:, :, None])[:, :, 0].unbind(1)
    slope = torch.tensor([camera.slope for camera in cameras], device=batch.device)[batch]

    def interval(across: Tensor) -> tuple[Tensor, Tensor]:
        middle, sine = torch.atan2(across, -z), radius / torch.hypot(across, z)
        spread = torch.where((sine < 1) & (-z > radius), sine.clamp(max=1).asin(), math.pi)  # or all of the picture
        ends = [(middle + sign * spread).clamp(-1.5, 1.5).tan() / slope for sign in (-1, 1)]
        first, last = ((end + 1) * (size / 2) - 0.5 for end in ends)
        return first.ceil().clamp(0, size).long(), (last.floor() + 1).clamp(0, size).long()

    (left, right), (top, bottom) = interval(x), interval(-y)
    width = right - left
    area = width * (bottom - top)
    which = torch.arange(len(area), device=area.device).repeat_interleave(area)
    offset = torch.arange(len(which), device=area.device) - (area.cumsum(0) - area)[which]
    row = torch.div(offset, width[which], rounding_mode="floor")
    return which, (top * size + left)[which] + row * size + offset - row * width[which]


def _unit(vectors: Tensor) -> Tensor:
    """(3, N) divided by their lengths."""
    return vectors * vectors.square().sum(0).rsqrt()


def backdrop(
    tone: Tensor,
    origins: Tensor,
    directions: Tensor,
    light: Tensor,
    batch: Tensor,
    centre: Tensor,
    radius: Tensor,
) -> Tensor:
    """Grey wall and floor with the solids' soft shadows, (B, H W) in [0, 1].

    tone, origins, directions, light: (B,), (B, 3), (B, 3, H W) and unit (B, 3), of each picture
    batch, centre, radius:            (N,), (N, 3), (N,): the picture, centre and radius of each ball that casts one
    """
    tone = tone[:, None]
    right, up, back = directions.unbind(1)
    distance = (FLOOR - origins[:, 1:2]) / up.clamp(max=-1e-3)
    x, z = origins[:, 0:1] + distance * right, origins[:, 2:3] + distance * back
    near = torch.exp((x * x + z * z) * -0.06) * (up < 0)
    grey = tone + 0.12 * up + 0.14 * near
    # What a ball hides of a floor point's sky, r^2 h / d^3 for height h and distance d, drawn out away from the light.
    height = centre[:, 1:2] - FLOOR
    foot = centre - 0.5 * height * light[batch] / light[batch, 1:2]
    dx, dz = x[batch] - foot[:, 0:1], z[batch] - foot[:, 2:3]
    inverse = torch.addcmul(torch.addcmul(height * height, dx, dx), dz, dz).rsqrt()
    hidden = 0.7 * radius[:, None].square() * height * inverse**3
    shadow = torch.zeros_like(grey).index_add_(0, batch, hidden).clamp(max=1) * (up < 0)
    return (grey * (1 - 0.5 * shadow)).clamp(0, 1)


def _trace(shape: str, start: Tensor, heading: Tensor, entry: Tensor, half: Tensor) -> tuple[Tensor, ...]:
    """March rays (3, N) from ``entry`` (N,) in the shape's frame, half a pixel being ``half`` (N,) long at the solid.

    Returns the rows (M,) whose coverage (M,) is not 0, their distance (M,) along the ray and outward normals (3, M).
    """
    leave = -2 * (start * heading).sum(0) - entry
    t, least, nearest, before = entry.clone(), torch.full_like(entry, math.inf), entry.clone(), entry.clone()
    live = torch.arange(len(t), device=t.device)
    for _ in range(5):
        o, d, inset = start[:, live], heading[:, live], half[live]
        s, low, best, out = t[live], least[live], nearest[live], before[live]
        for _ in range(6):
            # To the surface half a pixel further in: the least of it gives the coverage on both sides of the true one.
            distance = unit_sdf(shape, torch.addcmul(o, d, s).T) + inset
            best = torch.where(distance < low, s, best)
            low = torch.minimum(low, distance)
            out = torch.where(low > inset, s, out)  # the last place before the true surface
            s = s + distance
        t[live], least[live], nearest[live], before[live] = s, low, best, out
        live = live[(low > 0.02 * inset) & (s < leave[live])]
    coverage = 1 - least / (2 * half)
    rows = (coverage > 0).nonzero().squeeze(1)
    start, heading, t, half = start[:, rows], heading[:, rows], nearest[rows], half[rows]
    # Differences over half a pixel also smooth the creases between faces.
    corners = start.new_tensor([[1, -1, -1, 1], [-1, -1, 1, 1], [-1, 1, -1, 1]])[:, :, None]
    points = (start + heading * t)[:, None] + half * corners
    values = unit_sdf(shape, points.movedim(0, -1))
    normal = _unit((corners * values).sum(1))
    distance = before[rows]
    for _ in range(4):
        distance = torch.minimum(distance + unit_sdf(shape, (start + heading * distance).T), t)
    return rows, coverage[rows].clamp(max=1), distance, normal
