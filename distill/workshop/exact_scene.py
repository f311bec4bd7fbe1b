"""Text to 3D against a teacher that is known exactly: what SDS finds of a solid, and what that costs.

python -m distill.workshop.exact_scene

The teacher is the optimal denoiser of one solid's pictures from every camera, so a wrong picture is the loss's or the
renderer's fault. The tests train by the same recipe.
"""

import math
import time
from dataclasses import dataclass
from typing import cast

import torch
import tyro
from torch import Tensor, nn

from distill import rows
from distill.methods.base import Turn
from distill.methods.scene_distillation import Prompts, SceneDistillation
from distill.settings import Anneal, DiffInstruct, SceneStage
from eval.nearest_solid import iou
from models.condition import Condition
from models.denoiser import Guided
from models.errors import run_command
from models.process import Process, RectifiedFlow, expand_to
from models.scene import captions, solids
from models.scene.backdrops import Plain
from models.scene.cameras import Camera, Orbit
from models.scene.fields import Blob, Box, FieldSizes
from models.scene.particles import Fields, Views
from models.seeds import Draws, mix

SIZE, SAMPLES = 32, 40
ORBIT = Orbit(elevation=(-10.0, 45.0), radius=(4.0, 4.0))
WHITE = 1.0


def true_views(cameras: list[Camera]) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] of a red cube without light on white, and its masks (B, H, W) bool."""
    solid = solids.Solid("cube", "red", (0.0, 0.0, 0.0), 0.8, yaw=20.0)
    scene = solids.Scene((solid,), Camera(), captions.parse("a photo of a red cube"), 0.5, 0.0)
    inside = solids.render([scene] * len(cameras), SIZE, cameras).index >= 0
    colour = torch.tensor(solids.RGB["red"]).view(1, 3, 1, 1)
    return torch.where(inside[:, None], colour, WHITE) * 2 - 1, inside


class ExactTeacher(nn.Module):
    """The optimal denoiser where pictures from a camera are N(true render, spread^2)."""

    def __init__(self, spread: float = 0.1):
        super().__init__()
        self.process: Process = RectifiedFlow()
        self.spread, self.sigma_data = spread, 0.5
        self.denoiser = self

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        matrices = cast(Tensor, cond.camera).view(-1, 4, 4)
        back = matrices[:, :3, 2]
        cameras = [
            Camera(math.degrees(math.atan2(b[0], b[2])), math.degrees(math.asin(b[1])), float(m[:3, 3].norm()))
            for b, m in zip(back, matrices, strict=True)
        ]
        mean, alpha = true_views(cameras)[0], expand_to(self.process.alpha(t), x_t)
        sigma2, s2 = expand_to(self.process.sigma(t), x_t) ** 2, self.spread**2
        return (s2 * alpha * x_t + sigma2 * mean) / (alpha**2 * s2 + sigma2)


def new_fields(particles: int = 1) -> Fields:
    """Particles as they start, always the same ones."""
    torch.manual_seed(0)
    sizes = FieldSizes(side=32)
    return Fields([sizes.new(Box(), Blob()) for _ in range(particles)], Plain((WHITE, WHITE, WHITE)), SAMPLES)


def distillation(
    fake: str, fields: Fields, particles: int = 1, steps: int = 100, weights: tuple[float, float] = (1.0, 0.0)
) -> SceneDistillation:
    """A volume stage in pixels; ``fake`` is ``noise`` or ``exact``, ``weights`` those of latents and of pictures."""
    matching = DiffInstruct.model_validate({"noise_levels": {"kind": "grid", "low": 0.02, "high": 0.98}})
    stage = SceneStage.model_validate(
        {"name": "volume", "kind": "volume", "share": 1.0, "fake": fake, "matching": matching, "samples": SAMPLES}
        | {"resolutions": [(0.0, SIZE)], "anneal": Anneal(at=0.4, to=0.5)}
        | {"latents": weights[0], "pictures": weights[1]}
    )
    shape = (3, SIZE, SIZE)
    return SceneDistillation(
        stage,
        rows.reverse_kl(),
        cast(Guided, ExactTeacher()),
        fields,
        None,
        Prompts(Condition(class_ids=torch.zeros(1).long()), {}),
        ORBIT,
        particles,
        shape,
        shape,
        encode=lambda pictures: pictures,
        decode=lambda x0: x0,
        steps=steps,
    )


@dataclass(frozen=True)
class Found:
    """How near a particle came, on views between those that it was trained on, and the seconds of all cores."""

    silhouette_iou: float
    psnr: float
    core_seconds: float


def sds(steps: int = 250) -> Found:
    """Train one particle by SDS, one view a step."""
    started = time.process_time()
    fields = new_fields()
    method = distillation("noise", fields, steps=steps)
    optimizer = torch.optim.AdamW(fields.parameters(), 2e-3, (0.9, 0.99), 1e-15, weight_decay=0.0)
    for step in range(steps):
        loss, _ = method.student_loss(Turn(0, Draws([mix(0, step)]), None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - started
    cameras = [Camera(a + 11.0, e, 4.0) for a in range(0, 360, 60) for e in (0.0, 30.0)]
    with torch.no_grad():
        drawn = fields(Views.plain(cameras, 0, SIZE))
    truth, mask = true_views(cameras)
    psnr = -10 * ((drawn.images - truth) / 2).square().mean((1, 2, 3)).log10()
    return Found(
        float(iou((drawn.opacity[:, 0] > 0.5).flatten(1), mask.flatten(1)).mean()), float(psnr.mean()), seconds
    )


@dataclass(frozen=True)
class Options:
    """Distil a red cube from its exact denoiser."""

    steps: int = 250
    """Steps, of one view each."""

    def run(self) -> None:
        torch.set_num_threads(1)
        found = sds(self.steps)
        scores = f"silhouette IoU {found.silhouette_iou:.3f}, PSNR {found.psnr:.1f} dB"
        print(f"SDS, {self.steps} steps: {scores}, {found.core_seconds:.1f} core-seconds")


if __name__ == "__main__":
    run_command(tyro.cli(Options).run)
