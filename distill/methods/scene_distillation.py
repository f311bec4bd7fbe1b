"""Text to 3D: distribution matching whose generator draws particles from cameras (VSD, arXiv 2305.16213).

A row of ``distill.rows`` and a ``fake`` choose the method: reverse KL with the score of one sample is SDS (arXiv
2209.14988), with a trained critic VSD, with the exact score of all particles VSD's own limit; other rows work alike.

=============  ==========================================================================================
student turn   generator G, encoder G, teacher F, critic F (``exact``: every other particle F instead)
critic turn    critic G, on the student turn's pictures
=============  ==========================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill import losses
from distill.data import Batch
from distill.methods.base import Logs, Turn
from distill.methods.distribution_matching import DistributionMatching
from distill.ratio import Ratio
from distill.rows import Row
from distill.settings import SceneStage
from models.condition import Condition
from models.denoiser import Guided
from models.errors import UserError
from models.process import expand_to
from models.scene.cameras import Camera, Orbit, camera_to_world
from models.scene.critic import LoRACritic
from models.scene.particles import Drawn, Generator, Views, posterior_mean
from models.seeds import Draws


@dataclass(frozen=True)
class Prompts:
    """The embedded text with what says where the camera stands, and the plain one; each a Condition of one row."""

    plain: Condition
    by_view: dict[str, Condition]

    def teacher(self, cameras: list[Camera]) -> Condition:
        """What the teacher is asked for: the text with the words for a camera's place, where there are any."""
        return Condition.cat(
            [
                next((self.by_view[view] for view in camera.seen if view in self.by_view), self.plain)
                for camera in cameras
            ]
        )


class Progress(nn.Module):
    """How many steps a stage has begun: a buffer, and so part of its checkpoints. ``step`` is the one it is in."""

    steps: Tensor

    def __init__(self, total: int):
        super().__init__()
        self.total, self.step = total, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def begin(self) -> None:
        self.step = int(self.steps)
        self.steps += 1

    @property
    def share(self) -> float:
        return self.step / self.total


class SceneDistillation(DistributionMatching):
    """One stage. ``encode`` takes pictures (B, 3, H, W) in [-1, 1] to the teacher's x0 and lets gradients through.

    ``reals()`` makes the teacher's own samples for a discriminator, each with a camera of the view it was asked for.
    """

    def __init__(
        self,
        stage: SceneStage,
        row: Row,
        teacher: Guided,
        generator: Generator,
        critic: LoRACritic | None,
        prompts: Prompts,
        orbit: Orbit,
        particles: int,
        shape: tuple[int, int, int],
        picture: tuple[int, int, int],
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        steps: int,
        camera_dropout: float = 0.1,
        discriminator: nn.Module | None = None,
        ratio: Ratio | None = None,
        reals: Callable[[], Batch] | None = None,
    ):
        if critic is None:
            row = replace(row, critic=False)
        super().__init__(
            stage.matching,
            row,
            teacher,
            generator,  # type: ignore[arg-type]
            critic,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            shape,
            discriminator,
            ratio,
        )
        self.stage, self.generator, self.prompts, self.orbit = stage, generator, prompts, orbit
        self.particles, self.picture, self.encode, self.camera_dropout = particles, picture, encode, camera_dropout
        self.decode, self._denoised = decode, torch.empty(0)
        self.progress = Progress(steps)
        self.buffers["progress"] = self.progress
        self.critic_turns = stage.matching.critic_turns if critic is not None or discriminator is not None else 0
        self.pictures = set()
        self._make_reals = reals
        self._reals: Batch | None = None
        self.frozen += generator.held()
        if critic is not None:
            self.frozen.append(critic.base)
        self._others: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ student turn

    def views(self, draws: Draws) -> Views:
        """Random cameras, particles, backdrops and places along the rays."""
        uniforms = torch.stack([draws.uniform() for _ in range(11)], 1)
        cameras = [self.orbit.camera(row[:6]) for row in uniforms.tolist()]
        particles = (uniforms[:, 6] * self.particles).long().clamp(max=self.particles - 1).tolist()
        size = next(s for share, s in reversed(self.stage.resolutions) if self.progress.share >= share)
        jitter = torch.special.ndtr(draws.normal(size, size)) if self.stage.kind == "volume" else None
        return Views(cameras, particles, size, uniforms[:, 7:], jitter)

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        draws, weights = turn.draws, self.stage.weights
        if turn.micro == 0:
            self.progress.begin()
            self.generator.prepare(self.progress.step)
        views = self.views(draws)
        u = self.annealed(draws.uniform())
        noise = draws.normal(*self.shape)
        drawn = cast(Drawn, self.networks["student"](views))
        if torch.is_grad_enabled() and not drawn.images.requires_grad:
            raise UserError(
                f"nothing is left of the scene at step {self.progress.step}: no ray meets any matter; lower "
                "method.stages' weights.sparsity, or raise method.blob_strength"
            )
        pictures = self.resized(drawn.images)
        with torch.set_grad_enabled(self.stage.latents > 0):
            x0 = self.encode(pictures)
        device = x0.device
        cond = replace(self.prompts.teacher(list(views.cameras)), camera=camera_to_world(views.cameras).flatten(1))
        cond = cond.to(device)
        self._samples[turn.micro] = (x0.detach(), cond)
        self._others = self.all_particles(views, x0.detach()) if self.stage.fake == "exact" else None
        matching, logs = self.matching(x0, cond, u, noise)
        loss = self.stage.latents * matching
        if self.stage.pictures:
            with torch.no_grad():
                target = self.decode(self._denoised).clamp(-1, 1)
            logs["picture_distance"] = (pictures.detach() - target).square().mean()
            loss = loss + self.stage.pictures * 0.5 * losses.per_sample((pictures - target) ** 2).mean()
        for name, value in drawn.terms.items():
            logs[name] = value.detach()
            if weight := getattr(weights, name, 0.0):
                loss = loss + weight * value
        loss = loss + 0 * sum(p.sum() for p in self.generator.parameters())  # DDP waits for what no view drew too
        logs["opacity"] = drawn.opacity.detach().mean()
        return loss, logs

    def annealed(self, u: Tensor) -> Tensor:
        """``u`` in the part of [0, 1) that the noise levels are drawn from at this step."""
        anneal, share = self.stage.anneal, self.progress.share
        if anneal.kind == "sqrt":
            return torch.full_like(u, 1 - (1 - anneal.to) * share**0.5)
        return u * anneal.to if share >= anneal.at else u

    def resized(self, images: Tensor) -> Tensor:
        """To the teacher's picture size."""
        if images.shape[2:] == self.picture[1:]:
            return images
        return F.interpolate(images, self.picture[1:], mode="bilinear", antialias=True)

    @torch.no_grad()
    def all_particles(self, views: Views, x0: Tensor) -> Tensor:
        """x0 (B, n, C, H, W) of every particle from each of the cameras; of the drawn ones those that were drawn."""
        rows = []
        for particle in range(self.particles):
            drawn = torch.tensor([p == particle for p in views.particles], device=x0.device)
            if not drawn.all():
                other = self.generator(replace(views, particles=[particle] * len(views)))
                rows.append(torch.where(expand_to(drawn, x0), x0, self.encode(self.resized(other.images))))
            else:
                rows.append(x0)
        return torch.stack(rows, 1)

    def _judge(self, x0: Tensor, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        teacher_x0, critic_x0, logit = super()._judge(x0, x_t, t, cond)
        self._denoised = teacher_x0.detach()
        if self._others is not None:
            critic_x0 = posterior_mean(x_t.detach(), self._others, self.process.alpha(t), self.process.sigma(t))
        return teacher_x0, critic_x0, logit

    # ------------------------------------------------------------------------------------------------- critic turn

    def _fakes(self, turn: Turn) -> tuple[Tensor, Condition]:
        x0, cond = self._samples[turn.micro]
        kept = (turn.draws.uniform() >= self.camera_dropout).float()[:, None].to(x0.device)
        return x0, replace(cond, camera=cast(Tensor, cond.camera) * kept)

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        if self._make_reals is None:
            return super().critic_loss(turn)
        self._reals = self._reals or self._make_reals()
        images, cond = self._reals.images, self._reals.cond
        rows = (turn.draws.uniform() * len(images)).long().clamp(max=len(images) - 1)
        return super().critic_loss(replace(turn, real=Batch(images[rows], cond[rows])))

    # ------------------------------------------------------------------------------------------------------ common

    @torch.no_grad()
    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        """Views around every particle, as many as ``z`` has rows."""
        count = len(z)
        each = max(1, count // self.particles)
        parts = []
        for particle in range(min(self.particles, count)):
            views = Views.plain(self.orbit.turntable(each), particle, self.picture[1], z.device)
            parts.append(self.generator(views).images)
        return torch.cat(parts)

    def reference(self, z: Tensor, cond: Condition, steps: int) -> None:
        return None

    def diagnose(self) -> Logs:
        return {}

    def exported(self) -> nn.Module:
        return self.generator
