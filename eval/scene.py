"""How a scene is judged: against a solid of known shape where the prompt names one, by CLIP otherwise.

A prompt leaves size, place and turn open, so the truth is the solid of that shape which fits the exported mesh best, in
volume and outlines; the views that it is then compared in are at azimuths between those of the fit.

python -m eval.scene RUN/a-red-cube [RUN/...] [--clip MODEL:WEIGHTS] [--output scores.json]
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError, run_command
from models.scene import captions, saved, solids
from models.scene.cameras import Camera, Orbit
from models.scene.fields import Box
from models.scene.mesh import Mesh, lattice
from models.scene.raster import barycentric, rasterise

CELLS = 40
"""Cells a side of the lattice that volumes are compared on."""
SIZE = 64
"""Side of the views, pixels."""


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


def _moving(shape: str) -> Tensor:
    """Which of a solid's values (6,) say something of the shape, 1 or 0."""
    return torch.tensor([1, 1, 1, 1, float(shape in ("cube", "pyramid", "torus")), float(shape == "torus")])


def fit(shape: str, points: Tensor, inside: Tensor, steps: int = 120) -> tuple[Tensor, float]:
    """The solid's values (6,) with the best overlap with a volume, and its IoU.

    points (N, 3): a regular grid; inside (N,) bool: which are in the volume. Adam from several turns on a soft IoU.
    """
    within = points[inside]
    centre, spread = within.mean(0), (within.amax(0) - within.amin(0)).norm() / 2
    tilts = [0.0] if shape != "torus" else [0.0, 0.6, 1.2]
    yaws = [i * math.pi / 16 for i in range(8)] if shape in ("cube", "pyramid") else [0.0]
    if shape == "torus":
        yaws = [i * math.pi / 4 for i in range(8)]
    starts = [[0.75 * float(spread), *centre.tolist(), yaw, tilt] for yaw in yaws for tilt in tilts]
    values = torch.tensor(starts, requires_grad=True)
    moving = _moving(shape)
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


@dataclass(frozen=True)
class Exported:
    """A model.glb read back: its mesh, where on the texture (V, 2) its vertices are, and the texture (3, H, W)."""

    mesh: Mesh
    uv: Tensor
    texture: Tensor

    @classmethod
    def read(cls, path: Path) -> "Exported":
        try:
            import trimesh
        except ImportError as error:
            raise UserError("reading meshes needs trimesh: pip install -e '.[scene]'") from error
        if not path.is_file():
            raise UserError(f"{path.parent.parent} has no {path.relative_to(path.parent.parent)}: run it to its end")
        (part,) = trimesh.load_scene(path).geometry.values()
        picture = np.asarray(part.visual.material.baseColorTexture.convert("RGB"), dtype=np.float32) / 255
        mesh = Mesh(torch.tensor(np.asarray(part.vertices), dtype=torch.float32), torch.tensor(np.asarray(part.faces)))
        uv = torch.tensor(np.asarray(part.visual.uv), dtype=torch.float32)
        return cls(mesh, uv, torch.from_numpy(picture).permute(2, 0, 1))

    def view(self, camera: Camera, size: int) -> tuple[Tensor, Tensor]:
        """RGB (3, H, W) in [0, 1] without light, and coverage (H, W)."""
        raster = rasterise(self.mesh, self.uv, camera, size)
        u, v = raster.attributes
        colour = F.grid_sample(self.texture[None], torch.stack([2 * u - 1, 1 - 2 * v], -1)[None], align_corners=False)[
            0
        ]
        return colour, raster.coverage[0]


def cameras_of(orbit: Orbit, count: int, offset: float) -> list[Camera]:
    """Around, in the middle of the training's elevations, the first ``offset`` degrees from the front."""
    return orbit.turntable(count, offset)


def outlines(solid: solids.Solid, cameras: list[Camera]) -> tuple[Tensor, Tensor]:
    """Masks (B, H, W) bool of a solid, and its pictures (B, 3, H, W) in [-1, 1]."""
    metadata = captions.describe([captions.Thing(solid.shape, solid.colour)])
    scenes = [solids.Scene((solid,), camera, metadata, 0.46, camera.azimuth) for camera in cameras]
    drawn = solids.render(scenes, SIZE, cameras)
    return drawn.index >= 0, drawn.images


def mask_iou(one: Tensor, other: Tensor) -> Tensor:
    """(B,) of masks (B, H, W)."""
    return (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)


def nearest_solid(shape: str, colour: str, mesh: Mesh, box: Box, orbit: Orbit) -> tuple[solids.Solid, float]:
    """The solid nearest to a mesh and the IoU of their volumes: the best one in volume, then moved, turned and scaled by
    ever smaller steps while that raises the sum of the volume's IoU and the outlines' mean."""
    points = box.world(lattice(CELLS))
    inside = inside_mesh(mesh, box, CELLS)
    coarse = inside_mesh(mesh, box, CELLS // 2)
    values, _ = fit(shape, box.world(lattice(CELLS // 2)), coarse, steps=80)
    views = cameras_of(orbit, 6, 0.0)
    masks = [rasterise(mesh, mesh.vertices, camera, SIZE, smooth=False).coverage[0] > 0.5 for camera in views]
    own = torch.stack(masks)

    def score(tried: Tensor) -> tuple[float, float]:
        distance = _sdf(shape, points, tried[None])[0] < 0
        volume = float((distance & inside).sum() / (distance | inside).sum())
        return volume + float(mask_iou(outlines(solid_at(shape, colour, tried), views)[0], own).mean()), volume

    best = score(values)
    step = torch.tensor([0.08, 0.04, 0.04, 0.04, 0.12, 0.12]) * _moving(shape)
    while float(step[0]) > 0.005:
        improved = False
        for move in torch.cat([step.diag(), -step.diag()])[torch.cat([step, step]) > 0]:
            found = score(values + move)
            if found[0] > best[0]:
                best, values, improved = found, values + move, True
        if not improved:
            step = step / 2
    return solid_at(shape, colour, values), best[1]


@torch.no_grad()
def judge_solid(exported: Exported, thing: captions.Thing, box: Box, orbit: Orbit, views: int = 12) -> dict[str, Any]:
    """Scores of a mesh that should be one solid: silhouette and volume IoU, Chamfer distance in world units, the share
    of views with the right colour and with the right shape, and PSNR where both are seen."""
    colour = thing.colour or "white"
    with torch.enable_grad():
        fits = {shape: nearest_solid(shape, colour, exported.mesh, box, orbit) for shape in captions.SHAPES}
    solid, volume = fits[thing.shape]
    cameras = cameras_of(orbit, views, 180 / views)
    seen = [exported.view(camera, SIZE) for camera in cameras]
    own = torch.stack([coverage > 0.5 for _, coverage in seen])
    truth, pictures = outlines(solid, cameras)
    overlap = mask_iou(own, truth)
    by_shape = torch.stack([mask_iou(own, outlines(other, cameras)[0]) for other, _ in fits.values()])
    right = by_shape.argmax(0) == captions.SHAPES.index(thing.shape)
    names, albedo = list(solids.RGB), torch.tensor(list(solids.RGB.values()))
    nearest, errors = [], []
    for index, (image, _) in enumerate(seen):
        mean = image[:, own[index]].mean(1)
        nearest.append(names[int((albedo - mean).square().sum(1).argmin())])
        both = own[index] & truth[index]
        errors.append((image[:, both] - (pictures[index][:, both] + 1) / 2).square().mean())
    generator = torch.Generator().manual_seed(0)
    corners = exported.mesh.vertices[exported.mesh.faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    chosen = corners[torch.multinomial(area, 4000, replacement=True, generator=generator)]
    weights = torch.distributions.Dirichlet(torch.ones(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = (chosen * weights.sample((4000,))[..., None]).sum(1)
    forward = solid.sdf(samples).abs().mean()
    grid = box.world(lattice(64))
    near = grid[solid.sdf(grid).abs() < box.half / 64]
    backward = torch.cat([torch.cdist(part, samples).amin(1) for part in near.split(2000)]).mean()
    return {
        "silhouette_iou": float(overlap.mean()),
        "worst_silhouette_iou": float(overlap.min()),
        "volume_iou": volume,
        "chamfer": float((forward + backward) / 2),
        "psnr": float(-10 * torch.stack(errors).mean().log10()),
        "colour_right": None if thing.colour is None else sum(name == thing.colour for name in nearest) / views,
        "view_agreement": float(right.float().mean()),
        "radius": solid.radius,
    }


@torch.no_grad()
def judge_clip(exported: Exported, source: str, prompt: str, others: list[str], orbit: Orbit) -> dict[str, Any]:
    """CLIP score over 36 views, and the share of views whose nearest prompt among ``others`` is its own."""
    from eval.clip import CLIP

    clip, pictures = CLIP(source), []
    for camera in cameras_of(orbit, 36, 0.0):
        image, coverage = exported.view(camera, 224)
        pixels = ((image * coverage + 1 - coverage).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        pictures.append(Image.fromarray(pixels))
    scores = clip.pictures(pictures) @ clip.texts([prompt, *others]).T
    found = {"clip": clip.name, "clip_score": float(scores[:, 0].mean())}
    if others:
        found["r_precision"] = float((scores.argmax(1) == 0).float().mean())
    return found


def modes(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of several seeds: means of the numbers, with twice the standard error where there are eight or more."""
    numbers = {key: [float(r[key]) for r in results if isinstance(r.get(key), int | float)] for key in results[0]}
    table = {key: sum(values) / len(values) for key, values in numbers.items() if values}
    if len(results) >= 8:
        table |= {f"{key}_interval": 2 * float(np.std(v, ddof=1)) / len(v) ** 0.5 for key, v in numbers.items() if v}
    return table


@dataclass
class Options:
    """Judge finished scenes."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Scene folders: OUTPUT/PROMPT of a run."""
    clip: str | None = None
    """MODEL:WEIGHTS of open_clip, for the CLIP score and R-precision among the prompts given."""
    output: Path | None = None
    """JSON file for the result."""

    def run(self) -> None:
        scenes = {folder: _scene(folder) for folder in self.folders}
        results: list[dict[str, Any]] = []
        for folder, scene in scenes.items():
            names = sorted(path.name for path in (folder / "student").glob("*model.glb"))
            if not names:
                raise UserError(f"{folder} has no student/model.glb: run it to its end")
            for name in names:
                exported = Exported.read(folder / "student" / name)
                found: dict[str, Any] = {"scene": str(folder), "model": name, "prompt": scene.sentence}
                if scene.backdrop == "studio":
                    metadata = captions.parse(scene.sentence)
                    things = captions.things_of(metadata)
                    if len(things) > 1:
                        raise UserError(f"{folder}: '{scene.sentence}' names several solids; one can be judged")
                    found |= judge_solid(exported, things[0], scene.box, scene.orbit)
                if self.clip is not None:
                    others = sorted({other.sentence for other in scenes.values()} - {scene.sentence})
                    found |= judge_clip(exported, self.clip, scene.sentence, others, scene.orbit)
                results.append(found)
                words = (
                    f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in found.items()
                )
                print("  ".join(words), flush=True)
        if len(results) > 1:
            print("mean  " + "  ".join(f"{key} {value:.3f}" for key, value in modes(results).items()))
        if self.output is not None:
            self.output.write_text(json.dumps({"scenes": results, "mean": modes(results)}, indent=2) + "\n")


def _scene(folder: Path) -> saved.Scene:
    """What the last stage of a scene's folder remembers."""
    stages = sorted(folder.glob("*/student/scene.json"), key=lambda path: path.stat().st_mtime)
    if not stages:
        raise UserError(f"{folder} holds no stage of text to 3D")
    return saved.read(stages[-1].parent)[0]


if __name__ == "__main__":
    run_command(tyro.cli(Options).run)
