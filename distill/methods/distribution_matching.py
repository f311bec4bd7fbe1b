"""Distribution matching: a student follows a frozen teacher by one row of the table in ``distill.rows``.

What a turn must cost, in passes of the network size (F forward without gradient, G forward + backward), and does cost:

=======================  =========================================================================================
student turn             student G, critic F, teacher F; with a GAN, inside that same teacher pass, gradients up to
                         the last tapped block (one backward through that part, to the input only). Rows with k1 or
                         k2: critic G and teacher G, to the input only. SDS: no critic
critic turn              critic G; with a GAN, teacher's encoder F on fakes and reals in one call (+ R1: a third
                         part); without ``reuse_samples`` also student F
=======================  =========================================================================================
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill import losses
from distill.data import Captions, Classes
from distill.methods.base import Logs, Turn
from distill.noise_levels import half_g2
from distill.pairs import Pairs
from distill.ratio import Ratio
from distill.rows import Row
from distill.settings import GAN, MatchingMethod
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import expand_to
from models.seeds import Draws
from models.student import OneStepStudent, heun


class DistributionMatching:
    """Student against a frozen teacher, with a critic (fake score) that follows the student.

    ``discriminator`` reads the frozen teacher's features; it serves the density ratio and the adversarial term.
    ``later`` are the times of the steps behind the first, for a student of several.
    """

    def __init__(
        self,
        settings: MatchingMethod,
        row: Row,
        teacher: Guided,
        student: OneStepStudent,
        critic: Denoiser | None,
        conditions: Classes | Captions,
        shape: tuple[int, int, int],
        discriminator: nn.Module | None = None,
        ratio: Ratio | None = None,
        pairs: Pairs | None = None,
        later: Sequence[float] = (),
    ):
        self.settings, self.row, self.teacher, self.conditions, self.shape = settings, row, teacher, conditions, shape
        self.ratio, self.pairs, self.later = ratio, pairs, tuple(later)
        self.gan: GAN | None = getattr(settings, "gan", None)
        self.networks: dict[str, nn.Module] = {"student": student}
        if critic is not None:
            self.networks["critic"] = critic
        if discriminator is not None:
            self.networks["discriminator"] = discriminator
        self.buffers: dict[str, nn.Module] = {"ratio": ratio} if ratio is not None else {}
        self.frozen: list[nn.Module] = [teacher]
        self.critic_turns = settings.critic_turns if critic is not None else 0
        self.pictures = {"critic"} if discriminator is not None else set()
        self.student, self.process, self.sigma_data = student, teacher.process, teacher.denoiser.sigma_data
        self._samples: dict[int, tuple[Tensor, Condition]] = {}

    # ------------------------------------------------------------------------------------------------ student turn

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        draws = turn.draws
        cond = self.conditions.sample(draws)
        z = draws.normal(*self.shape)
        u = draws.uniform()
        noise = draws.normal(*self.shape)
        x0, regression = self._student_samples(z, cond, turn)
        self._samples[turn.micro] = (x0.detach(), cond)
        loss, logs = self.matching(x0, cond, u, noise)
        if self.pairs is not None:
            logs["regression"] = regression.detach()
        return loss + regression, logs

    def matching(self, x0: Tensor, cond: Condition, u: Tensor, noise: Tensor) -> tuple[Tensor, Logs]:
        """The row's loss for samples ``x0`` (B, C, H, W), noised with ``noise`` to the levels at ``u`` (B,)."""
        settings = self.settings
        t = settings.noise_levels.times(u, self.process)
        x_t = self.process.add_noise(x0, noise, t)
        teacher_x0, critic_x0, logit = self._judge(x0, x_t, t, cond)

        logs: Logs = {}
        r, scale = torch.ones_like(u), 1.0
        if self.ratio is not None and logit is not None:
            estimate = self.ratio.ratio(logit.detach())
            r, scale = self.ratio(estimate, u)
            logs["ratio"] = self._binned(estimate, u)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        with torch.set_grad_enabled(self.row.second_order):
            products = losses.score_products(x0, teacher_x0, critic_x0, alpha, sigma)
            coefficients = self.row.coefficients(r, *products, alpha / sigma**2)
        k0, k1, k2 = (k / scale if isinstance(k, Tensor) else k for k in coefficients)
        weight, normalizer = self._time_weight(u, alpha, sigma), settings.normalizer
        matching = losses.score_surrogate(
            x0, teacher_x0, critic_x0, alpha, sigma, k0, k1, k2, weight=weight, normalizer=normalizer
        ).mean()
        loss = matching
        logs["matching"] = matching.detach()
        logs["teacher_critic_distance"] = self._binned((teacher_x0 - critic_x0).detach().flatten(1).norm(dim=1), u)
        logs["sample_mean"], logs["sample_std"] = x0.detach().mean(), x0.detach().std()
        if self.gan is not None and logit is not None and self.gan.weight > 0:
            adversarial = losses.generator_loss(logit).mean()
            loss = loss + self.gan.weight * adversarial
            logs["adversarial"] = adversarial.detach()
        return loss, logs

    def _student_samples(self, z: Tensor, cond: Condition, turn: Turn) -> tuple[Tensor, Tensor]:
        """Samples for ``z``, and the regression term of the pairs, from one call of the student."""
        if self.later:
            return self.networks["student"](*self._simulated(z, cond, turn.draws)), z.new_zeros(())
        if self.pairs is None or self.settings.regression is None:
            return self.networks["student"](z, cond), z.new_zeros(())
        pair_z, pair_cond, target = self.pairs.sample(turn.draws)
        both = self.networks["student"](torch.cat([z, pair_z]), Condition.cat([cond, pair_cond]))
        x0, predicted = both.split([len(z), len(pair_z)])
        return x0, self.settings.regression.weight * losses.regression_loss(predicted, target).mean()

    @torch.no_grad()
    def _simulated(self, z: Tensor, cond: Condition, draws: Draws) -> tuple[Tensor, Condition, Tensor]:
        """Each sample's input at one of the steps, as the student itself comes to it (DMD2, Sec. 4.5), and its time."""
        u = draws.uniform()
        step, t = (u * (1 + len(self.later))).long(), torch.full_like(u, self.student.t_init)
        x_t = z if self.student.unit_noise else expand_to(self.process.sigma(t), z) * z
        chosen, times = x_t, t
        for index, time in enumerate(self.later, 1):
            x0 = self.student(x_t, cond, t)
            t = torch.full_like(t, time)
            x_t = self.process.add_noise(x0, draws.normal(*self.shape), t)
            own = step == index
            chosen, times = torch.where(expand_to(own, x_t), x_t, chosen), torch.where(own, t, times)
        return chosen, cond, times

    def _judge(self, x0: Tensor, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """The teacher's and the critic's x0, with gradients if the row needs them, and the logit, always with one."""
        through, logit = self.row.second_order, None
        if self.gan is None:
            with torch.set_grad_enabled(through):
                teacher_x0 = self.teacher.denoise(x_t, t, cond)
        else:
            unused = self.gan.weight == 0 and not through
            inputs = x_t.detach() if unused else x_t
            teacher_x0, features = self.teacher.denoise_and_features(inputs, t, cond, self.gan.taps, through)
            logit = self.networks["discriminator"](features)
        if not self.row.critic:
            return teacher_x0, x0.detach(), logit
        with torch.set_grad_enabled(through):
            return teacher_x0, self.networks["critic"](x_t, t, cond), logit

    def _time_weight(self, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.settings.time_weight == "half_g2":
            return half_g2(self.settings.noise_levels, u, self.process)
        return (sigma**2 / alpha) ** self.row.degree if self.row.second_order else (sigma / alpha) ** 2

    # ------------------------------------------------------------------------------------------------- critic turn

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        draws = turn.draws
        u = draws.uniform()
        noise = draws.normal(*self.shape)
        x0, cond = self._fakes(turn)
        t = (self.settings.critic_noise_levels or self.settings.noise_levels).times(u, self.process)
        x_t = self.process.add_noise(x0, noise, t)
        predicted = self.networks["critic"](x_t, t, cond)
        score = losses.denoising_loss(predicted, x0, self.process.ratio(t), self.sigma_data).mean()
        logs: Logs = {"critic_loss": score.detach()}
        if self.gan is None or turn.real is None:
            return score, logs

        real = turn.real
        real_t = self.process.add_noise(real.images, draws.normal(*self.shape), t)
        inputs, conds = [x_t, real_t], [cond, real.cond]
        if self.gan.r1_weight > 0:
            spread = ((self.process.alpha(t) * self.sigma_data) ** 2 + self.process.sigma(t) ** 2).sqrt()
            inputs.append(real_t + expand_to(self.gan.r1_scale * spread, real_t) * draws.normal(*self.shape))
            conds.append(real.cond)
        parts = len(inputs)
        with torch.no_grad():
            features = self.teacher.denoiser.features(
                torch.cat(inputs), t.repeat(parts), Condition.cat(conds), self.gan.taps
            )
        logits = self.networks["discriminator"](features).chunk(parts)
        fake_logit, real_logit = logits[:2]
        loss = score + losses.discriminator_loss(real_logit, fake_logit).mean()
        if self.gan.r1_weight > 0:
            penalty = losses.approximate_r1(real_logit, logits[2]).mean()
            loss = loss + self.gan.r1_weight * penalty
            logs["r1"] = penalty.detach()
        logs["d_real"], logs["d_fake"] = real_logit.detach().sigmoid().mean(), fake_logit.detach().sigmoid().mean()
        return loss, logs

    def _fakes(self, turn: Turn) -> tuple[Tensor, Condition]:
        """The student's samples of this step, or new ones."""
        if self.settings.reuse_samples and turn.micro in self._samples:
            return self._samples[turn.micro]
        cond = self.conditions.sample(turn.draws)
        with torch.no_grad():
            z = turn.draws.normal(*self.shape)
            inputs = self._simulated(z, cond, turn.draws) if self.later else (z, cond)
            return self.networks["student"](*inputs), cond

    # ------------------------------------------------------------------------------------------------------ common

    def _binned(self, values: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts of ``values`` per noise-level bin."""
        return losses.bin_sums(values.detach().float(), u, self.settings.bins)

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        with torch.no_grad():
            return self.student(z, cond)

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor:
        return heun(self.teacher, z, cond, steps)

    def diagnose(self) -> Logs:
        return {}

    def exported(self) -> nn.Module:
        return self.student.denoiser.network
