"""The numbers of one exported scene: against the nearest true solid, against its own particle, and by CLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.clip import CLIP
from eval.glb import Exported, on_white
from eval.nearest_solid import SIZE, Target, iou, nearest_solid, solid_outlines
from models.scene import captions, solids
from models.scene.backdrops import Plain
from models.scene.cameras import Camera, Orbit
from models.scene.fields import Box, Field
from models.scene.mesh import Mesh, lattice
from models.scene.particles import Views
from models.scene.surface import draw

VIEWS = 12
"""Held-out views, at azimuths between those of the fit."""
CLIP_VIEWS = 36


def psnr(error: Tensor) -> float:
    """Decibels of a mean squared error in [0, 1]; 60 at most."""
    return float(-10 * error.clamp(min=1e-6).log10())


def solid_pictures(solid: solids.Solid, cameras: Sequence[Camera], size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1]: a solid in the light that is behind the camera, on the solids world's floor."""
    metadata = captions.describe([captions.Thing(solid.shape, solid.colour)])
    scenes = [solids.Scene((solid,), camera, metadata, 0.46, camera.azimuth) for camera in cameras]
    return (solids.render(scenes, size, cameras).images + 1) / 2


def chamfer(mesh: Mesh, solid: solids.Solid, box: Box, count: int = 4000) -> float:
    """Mean distance in world units from one surface to the other, both ways averaged."""
    generator = torch.Generator().manual_seed(0)
    corners = mesh.vertices[mesh.faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    chosen = corners[torch.multinomial(area, count, replacement=True, generator=generator)]
    weights = -torch.rand(count, 3, generator=generator).clamp(min=1e-9).log()  # even on a triangle once normalised
    samples = (chosen * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)
    grid = box.world(lattice(64))
    distance = solid.sdf(grid)
    near = grid[distance.abs() < box.half / 64]
    if not len(near):
        return float(solid.sdf(samples).abs().mean())
    backward = torch.cat([torch.cdist(part, samples).amin(1) for part in near.split(2000)]).mean()
    return float((solid.sdf(samples).abs().mean() + backward) / 2)


@dataclass(frozen=True)
class Colours:
    """Of the held-out views: the name nearest to each view's mean colour, and to that of them all."""

    each: list[str]
    whole: str

    @classmethod
    def of(cls, images: Tensor, masks: Tensor) -> "Colours":
        """Images (B, 3, H, W) in [0, 1] where masks (B, H, W) say."""
        total = (images * masks[:, None]).sum((2, 3))
        means = torch.cat([total, total.sum(0, keepdim=True)])
        counts = masks.sum((1, 2))
        means = means / torch.cat([counts, counts.sum()[None]]).clamp(min=1)[:, None]
        albedo, names = torch.tensor(list(solids.RGB.values())), list(solids.RGB)
        *each, whole = [names[int(index)] for index in torch.cdist(means, albedo).argmin(1)]
        return cls(each, whole)


@dataclass(frozen=True)
class Judged:
    """``scores`` by name and the true ``solid`` that they are against."""

    scores: dict[str, Any]
    solid: solids.Solid


@torch.no_grad()
def judge_solid(exported: Exported, thing: captions.Thing, box: Box, orbit: Orbit) -> Judged:
    """Scores of a mesh that should be one solid, of any colour where the prompt names none.

    ``view_agreement``: share of views whose nearest variant, of six shapes in ten colours, is that of all views
    together. A solid has the same back as front, so a scene that shows another thing from another side shows here.
    """
    target, cameras = Target.of(exported.mesh, box, orbit), orbit.turntable(VIEWS, 180 / VIEWS)
    images, coverage = exported.views(cameras, SIZE)
    own = coverage > 0.5
    colours = Colours.of(images, own)
    named = thing.colour or colours.whole
    with torch.enable_grad():
        fits = {shape: nearest_solid(shape, named, target) for shape in captions.SHAPES}
    solid, volume = fits[thing.shape]
    masks = {shape: solid_outlines(fitted, cameras, SIZE) for shape, (fitted, _) in fits.items()}
    overlaps = torch.stack([iou(own.flatten(1), mask.flatten(1)) for mask in masks.values()])
    nearest = [captions.SHAPES[index] for index in overlaps.argmax(0)]
    shape = captions.SHAPES[int(overlaps.mean(1).argmax())]
    same = [s == shape and c == colours.whole for s, c in zip(nearest, colours.each, strict=True)]
    overlap = overlaps[captions.SHAPES.index(thing.shape)]
    both = (own & masks[thing.shape])[:, None].expand_as(images)
    albedo = torch.tensor(solids.RGB[named])[:, None, None].expand_as(images)
    scores = {
        "silhouette_iou": float(overlap.mean()),
        "worst_silhouette_iou": float(overlap.min()),
        "volume_iou": volume,
        "chamfer": chamfer(exported.mesh, solid, box),
        "psnr": psnr((images - solid_pictures(solid, cameras, SIZE))[both].square().mean()),
        "albedo_psnr": psnr((images - albedo)[both].square().mean()),
        "colour_right": None if thing.colour is None else sum(c == named for c in colours.each) / VIEWS,
        "shape_right": sum(s == thing.shape for s in nearest) / VIEWS,
        "view_agreement": sum(same) / VIEWS,
        "variant": f"{colours.whole} {shape}",
        "radius": solid.radius,
    }
    return Judged(scores, solid)


@torch.no_grad()
def judge_export(exported: Exported, mesh: Mesh, field: Field, orbit: Orbit, size: int = 128) -> dict[str, Any]:
    """What was lost in the file: pictures of model.glb against those of the particle, ``mesh`` coloured by ``field``.

    ``glb_psnr`` is over what both cover wholly, ``glb_iou`` that of their outlines.
    """
    cameras = orbit.turntable(VIEWS, 180 / VIEWS)
    images, coverage = exported.views(cameras, size)
    drawn = draw([mesh], [field], Plain((1.0, 1.0, 1.0)), Views.plain(cameras, 0, size), "colour")
    inside = ((coverage > 0.999) & (drawn.opacity[:, 0] > 0.999))[:, None].expand_as(images)
    outlines = [(part > 0.5).flatten(1) for part in (coverage, drawn.opacity[:, 0])]
    error = (images - (drawn.images + 1) / 2)[inside].square()
    return {
        "glb_psnr": psnr(error.mean()) if len(error) else None,
        "glb_iou": float(iou(*outlines).mean()),
    }


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Of (B, 3, H, W) in [0, 1]."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels.numpy()]


@torch.no_grad()
def judge_clip(exported: Exported, clip: CLIP, prompt: str, others: Sequence[str], orbit: Orbit) -> dict[str, Any]:
    """CLIP score over 36 views, the share of views whose nearest prompt among ``others`` is its own, and the front
    seen twice.

    ``front_twice``: share of the back views, 60 degrees, that are nearer to the prompt with ", front view" than with
    ", back view". It says something only of what has one front, and only where ``front_seen``, the same share of the
    front views, is higher.
    """
    cameras = orbit.turntable(CLIP_VIEWS)
    pictures = clip.pictures(to_pictures(on_white(*exported.views(cameras, 224))))
    scores = pictures @ clip.texts([prompt, *others]).T
    front, back = (pictures @ clip.texts([f"{prompt}, front view", f"{prompt}, back view"]).T).unbind(1)
    share = lambda view: float((front > back)[[camera.view == view for camera in cameras]].float().mean())
    return {
        "clip": clip.name,
        "clip_score": float(scores[:, 0].mean()),
        "r_precision": float((scores.argmax(1) == 0).float().mean()) if others else None,
        "r_precision_among": 1 + len(others),
        "front_twice": share("back"),
        "front_seen": share("front"),
    }
