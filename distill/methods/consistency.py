"""SANA-Sprint (arXiv 2503.09641): continuous-time consistency (sCM) and an adversarial term (LADD), on any teacher.

What a turn costs, in passes of the network size (F forward, G forward + backward, J forward-mode derivative, 2 to 5 F):

==============  ==================================================================================================
student turn    sCM: teacher F (2 F with guidance, one call), student J, student G. LADD: student G, in the same
                call as sCM's, and the teacher up to the last tapped block, forward and backward to its input only.
critic turn     LADD alone: teacher F up to the last tapped block for reals, fakes and misaligned pairs in one
                call; without ``reuse_samples`` also student F
==============  ==================================================================================================
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from distill import consistency_losses as losses
from distill.losses import bin_sums
from distill.methods.base import Logs, Turn
from distill.settings import LADD, Consistency
from distill.total_derivative import total_derivative
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import TrigFlow
from models.seeds import Draws
from models.student import OneStepStudent, heun
from models.trigflow import FlowStudent, TrigFlowView


class Steps(nn.Module):
    """Counts student steps: state of a checkpoint."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


class ConsistencyDistillation:
    """A student with the TrigFlow view's network learns to go to the end of the flow from any time on it.

    ``teacher`` is frozen; ``student.view`` may have started as a copy of it. ``discriminator`` maps the teacher's
    features to logits (B, K) and is needed for LADD. ``told``: the student's network embeds the guidance scale; else
    there is one scale alone, which it learns by heart. ``one_step`` is how the finished student makes its first step,
    by default from the view's last time.
    """

    def __init__(
        self,
        settings: Consistency,
        teacher: Denoiser,
        student: FlowStudent,
        discriminator: nn.Module | None = None,
        *,
        told: bool = True,
        one_step: OneStepStudent | None = None,
    ):
        self.settings, self.flow = settings, student.view
        self.process: TrigFlow = student.view.process
        self.clock = TrigFlow(self.process.sigma_data, self.process.t_min, self.process.t_max)
        """The process of the scaled data: where log(sigma / alpha) is the papers' tau."""
        self.unguided = TrigFlowView(teacher, self.process.sigma_data, self.process.data_scale)
        self.guides = told and settings.guidance != [1.0]
        scale = None if self.guides else settings.guidance[0]
        self.teacher = TrigFlowView(Guided(teacher, scale), self.process.sigma_data, self.process.data_scale)
        self.ladd: LADD | None = settings.ladd if settings.ladd and settings.ladd.weight > 0 else None
        self.networks: dict[str, nn.Module] = {"student": student}
        if self.ladd is not None:
            if discriminator is None:
                raise ValueError("LADD needs a discriminator")
            self.networks["discriminator"] = discriminator
        self.steps = Steps()
        self.buffers: dict[str, nn.Module] = {"steps": self.steps}
        self.frozen: list[nn.Module] = [self.teacher]
        self.critic_turns = 1 if self.ladd else 0
        self.pictures = {"student", "critic"} if self.ladd else {"student"}
        self.one_step = one_step or OneStepStudent(cast(Denoiser, self.flow), self.process.t_max)
        self._samples: dict[int, tuple[Tensor, Condition]] = {}
        self._checked = False

    # ------------------------------------------------------------------------------------------------ student turn

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert turn.real is not None
        x0, cond, draws = turn.real.images, self._with_guidance(turn.real.cond, turn.draws), turn.draws
        inputs: list[tuple[Tensor, Tensor]] = []
        u = draws.uniform()
        if self.settings.weight > 0:
            t = self.settings.noise_levels.times(u, self.clock)
            noise = draws.normal(*x0.shape[1:])
            inputs.append((self.process.add_noise(x0, noise, t), t))
            g, logs = self._tangent(*inputs[0], x0, noise, cond, u)
        else:
            g, logs = None, {}
        if self.ladd is not None:
            inputs.append(self._start(x0, draws))
        x_t, t = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        velocity, nu = self.networks["student"](x_t, t, Condition.cat([cond] * len(inputs)))

        loss = x0.new_zeros(())
        if g is not None:
            own, at = slice(0, len(x0)), t[: len(x0)]
            nu = nu[own] if nu is not None else None
            weight = losses.prior_weight(at, self.process.sigma_data) if self.settings.prior_weight else 1.0
            matching = losses.consistency_loss(velocity[own], g, weight, nu).mean()
            loss = loss + self.settings.weight * matching
            logs["consistency"] = matching.detach()
            if nu is not None:
                logs["nu"] = nu.detach().mean()
        elif nu is not None:
            loss = loss + 0 * nu.sum()  # unused parameters would stop a distributed run
        if self.ladd is not None:
            own = slice(-len(x0), None)
            samples = self.flow.x0_from(velocity[own], x_t[own], t[own])
            self._samples[turn.micro] = (samples.detach(), cond)
            s = self.ladd.noise_levels.times(draws.uniform(), self.clock)
            noised = self.process.add_noise(samples, draws.normal(*x0.shape[1:]), s)
            logits = self.networks["discriminator"](self._features(noised, s, cond))
            adversarial = losses.hinge_generator(logits).mean()
            loss = loss + self.ladd.weight * self._warmed(self.ladd.warmup_steps) * adversarial
            logs["adversarial"] = adversarial.detach()
        if turn.micro == 0:
            self.steps.count += 1
        return loss, logs

    def _with_guidance(self, cond: Condition, draws: Draws) -> Condition:
        """``cond`` with a scale drawn for each sample, if there is any guidance."""
        if not self.guides:
            return cond
        scales = torch.tensor(self.settings.guidance, device=draws.device)
        return replace(cond, guidance=scales[(draws.uniform() * len(scales)).long()])

    @torch.no_grad()
    def _tangent(
        self, x_t: Tensor, t: Tensor, x0: Tensor, noise: Tensor, cond: Condition, u: Tensor
    ) -> tuple[Tensor, Logs]:
        """The normalised tangent (B, C, H, W), and its length before that per noise level."""
        settings, sigma_data = self.settings, self.process.sigma_data
        if settings.target == "distillation":
            dx_dt = sigma_data * self.teacher.velocity(x_t, t, cond)
        else:
            dx_dt = losses.path_velocity(self.process.data_scale * x0, sigma_data * noise, t)
        device = x_t.device.type
        with torch.autocast(device, enabled=not settings.tangent_float32 and torch.is_autocast_enabled(device)):
            field = lambda x, t: self.flow.velocity(x, t, cond)
            mode, step, last = settings.tangent, settings.tangent_step, self.process.t_max
            self.flow.eval()  # a difference of two dropout masks is no derivative
            velocity, derivative = total_derivative(
                field, x_t.float(), t, dx_dt.float(), mode, step, last, check=not self._checked
            )
            self.flow.train()
            self._checked = True
        g = losses.tangent(x_t, t, velocity, derivative, dx_dt, sigma_data, self._warmed(settings.warmup_steps))
        logs: Logs = {"tangent": bin_sums(g.flatten(1).norm(dim=1), u, settings.bins)}
        return losses.normalize_tangent(g, settings.tangent_constant, settings.tangent_norm), logs

    def _warmed(self, steps: int) -> Tensor | float:
        """The share of ``steps`` that the student has made, at most 1."""
        return (self.steps.count / steps).clamp(max=1) if steps else 1.0

    def _start(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """A generator's input for LADD: pure noise with ``max_time_probability``, else a picture noised afresh."""
        assert self.ladd is not None
        t = self.settings.noise_levels.times(draws.uniform(), self.clock)
        last = draws.uniform() < self.ladd.max_time_probability
        t = torch.where(last, self.process.t_max, t)
        return self.process.add_noise(x0, draws.normal(*x0.shape[1:]), t), t

    def _features(self, x_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        assert self.ladd is not None
        return self.unguided.features(x_t, t, replace(cond, guidance=None), self.ladd.taps)

    # ------------------------------------------------------------------------------------------------- critic turn

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert self.ladd is not None and turn.real is not None
        real, draws = turn.real, turn.draws
        fake, cond = self._fakes(turn)
        shape, levels = fake.shape[1:], self.ladd.noise_levels
        s = levels.times(draws.uniform(), self.clock)
        pictures, times = [real.images, fake], [s, s]
        conds = [replace(real.cond, guidance=None), replace(cond, guidance=None)]
        counts = torch.ones_like(s)
        if self.ladd.misaligned_pairs and len(fake) > 1:
            rolled, differs = losses.misaligned(real.images, real.cond)
            pictures.append(rolled)
            times.append(levels.times(draws.uniform(), self.clock))
            conds.append(conds[0])
            counts = torch.cat([counts, differs])
        t = torch.cat(times)
        noise = torch.cat([draws.normal(*shape) for _ in pictures])
        with torch.no_grad():
            features = self._features(self.process.add_noise(torch.cat(pictures), noise, t), t, Condition.cat(conds))
        logits = self.networks["discriminator"](features)
        loss = losses.hinge_discriminator(logits[: len(fake)], logits[len(fake) :], counts)
        means = {"d_real": logits[: len(fake)].detach(), "d_fake": logits[len(fake) : 2 * len(fake)].detach()}
        logs: Logs = {"d_loss": loss.detach(), "d_auc": losses.separation(*means.values())}
        return loss, logs | {name: value.mean() for name, value in means.items()}

    def _fakes(self, turn: Turn) -> tuple[Tensor, Condition]:
        """The student's samples of this step, or new ones."""
        assert self.ladd is not None and turn.real is not None
        if self.ladd.reuse_samples and turn.micro in self._samples:
            return self._samples[turn.micro]
        cond = self._with_guidance(turn.real.cond, turn.draws)
        with torch.no_grad():
            return self.flow.denoise(*self._start(turn.real.images, turn.draws), cond), cond

    # ------------------------------------------------------------------------------------------------------ common

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        with torch.no_grad():
            return self.one_step(z, self._told(z, cond))

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor:
        return heun(self.teacher, z, self._told(z, cond), steps)

    def _told(self, z: Tensor, cond: Condition) -> Condition:
        """``cond`` with the middle one of the guidance scales, if it names none."""
        if cond.guidance is not None or not self.guides:
            return cond
        scales = sorted(self.settings.guidance)
        return replace(cond, guidance=torch.full((len(z),), scales[len(scales) // 2], device=z.device))

    def diagnose(self) -> Logs:
        return {}

    def exported(self) -> nn.Module:
        denoiser = self.flow.denoiser
        return (denoiser.denoiser if isinstance(denoiser, Guided) else denoiser).network
