"""Distribution matching: DMD2, Diff-Instruct and f-distill are rows of one table.

=============  ===================  ==================================  ==========================================
method         k0 of the surrogate  adversarial term                    exact gradient of (normalizer "none")
=============  ===================  ==================================  ==========================================
diff_instruct  1                    none                                int w(t) KL(p_t || q_t) dt
dmd2           1                    weight x softplus(-logit)           the same + softened reverse KL
f_distill      h(r)                 weight x softplus(-logit)           int w(t) D_f(q_t || p_t) dt + the same
=============  ===================  ==================================  ==========================================

What a turn must cost, in passes of the network size (F forward without gradient, G forward + backward), and does cost:

=======================  =========================================================================================
student turn             student G, critic F, teacher F; with a GAN, inside that same teacher pass, gradients up to
                         the last tapped block (one backward through that part, to the input only)
critic turn              critic G; with a GAN, teacher's encoder F on fakes and reals in one call (+ R1: a third
                         part); without ``reuse_samples`` also student F
=======================  =========================================================================================
"""

import torch
from torch import Tensor, nn

from distill import losses
from distill.data import Classes
from distill.methods.base import Logs, Turn
from distill.pairs import Pairs
from distill.ratio import RatioWeight
from distill.settings import DMD2, DiffInstruct, FDistill
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import expand_to
from models.student import OneStepStudent, heun

DistributionSettings = DMD2 | DiffInstruct | FDistill


class DistributionMatching:
    """Student against a frozen teacher, with a critic (fake score) that follows the student.

    ``ratio`` weights the score difference by h(r) (f-distill); without it the weight is 1. ``discriminator`` reads the
    frozen teacher's features; it is needed for ``ratio`` and for the adversarial term.
    """

    def __init__(
        self,
        settings: DistributionSettings,
        teacher: Guided,
        student: OneStepStudent,
        critic: Denoiser,
        conditions: Classes,
        shape: tuple[int, int, int],
        discriminator: nn.Module | None = None,
        ratio: RatioWeight | None = None,
        pairs: Pairs | None = None,
    ):
        self.settings, self.teacher, self.conditions, self.shape = settings, teacher, conditions, shape
        self.ratio, self.pairs = ratio, pairs
        self.gan = None if isinstance(settings, DiffInstruct) else settings.gan
        self.networks: dict[str, nn.Module] = {"student": student, "critic": critic}
        if discriminator is not None:
            self.networks["discriminator"] = discriminator
        self.buffers: dict[str, nn.Module] = {"ratio": ratio} if ratio is not None else {}
        self.frozen: list[nn.Module] = [teacher]
        self.critic_turns = settings.critic_turns
        self.pictures = {"critic"} if discriminator is not None else set()
        self.student, self.process, self.sigma_data = student, teacher.process, critic.sigma_data
        self._samples: dict[int, tuple[Tensor, Condition]] = {}

    # ------------------------------------------------------------------------------------------------ student turn

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        draws, settings = turn.draws, self.settings
        cond = self.conditions.sample(draws)
        z = draws.normal(*self.shape)
        u = draws.uniform()
        noise = draws.normal(*self.shape)
        x0, regression = self._student_samples(z, cond, turn)
        self._samples[turn.micro] = (x0.detach(), cond)

        t = settings.noise_levels.times(u, self.process)
        x_t = self.process.add_noise(x0, noise, t)
        teacher_x0, logit = self._teacher(x_t, t, cond)
        with torch.no_grad():
            critic_x0 = self.networks["critic"](x_t, t, cond)

        k0: Tensor | float = 1.0
        logs: Logs = {}
        if self.ratio is not None and logit is not None:
            r = self.ratio.ratio(logit.detach())
            k0 = self.ratio(r, u)
            logs["ratio"] = self._binned(r, u)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        matching = losses.score_surrogate(
            x0, teacher_x0, critic_x0, alpha, sigma, k0, weight=(sigma / alpha) ** 2, normalizer=settings.normalizer
        ).mean()
        loss = matching + regression
        logs["matching"] = matching.detach()
        logs["teacher_critic_distance"] = self._binned((teacher_x0 - critic_x0).flatten(1).norm(dim=1), u)
        logs["sample_mean"], logs["sample_std"] = x0.detach().mean(), x0.detach().std()
        if self.pairs is not None:
            logs["regression"] = regression.detach()
        if self.gan is not None and logit is not None and self.gan.weight > 0:
            adversarial = losses.generator_loss(logit).mean()
            loss = loss + self.gan.weight * adversarial
            logs["adversarial"] = adversarial.detach()
        return loss, logs

    def _student_samples(self, z: Tensor, cond: Condition, turn: Turn) -> tuple[Tensor, Tensor]:
        """Samples for ``z``, and the regression term of the pairs, from one call of the student."""
        if self.pairs is None or self.settings.regression is None:
            return self.networks["student"](z, cond), z.new_zeros(())
        pair_z, pair_cond, target = self.pairs.sample(turn.draws)
        both = self.networks["student"](torch.cat([z, pair_z]), Condition.cat([cond, pair_cond]))
        x0, predicted = both.split([len(z), len(pair_z)])
        return x0, self.settings.regression.weight * losses.regression_loss(predicted, target).mean()

    def _teacher(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """The teacher's x0 without gradient, and the discriminator's logit with one, from one pass."""
        discriminator = self.networks.get("discriminator")
        if discriminator is None or self.gan is None:
            with torch.no_grad():
                return self.teacher.denoise(x_t, t, cond), None
        if self.gan.weight == 0:
            x_t = x_t.detach()
        teacher_x0, features = self.teacher.denoise_and_features(x_t, t, cond, self.gan.taps)
        return teacher_x0, discriminator(features)

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
        if self.settings.reuse_samples:
            return self._samples[turn.micro]
        cond = self.conditions.sample(turn.draws)
        with torch.no_grad():
            return self.networks["student"](turn.draws.normal(*self.shape), cond), cond

    # ------------------------------------------------------------------------------------------------------ common

    def _binned(self, values: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts of ``values`` per noise-level bin."""
        return losses.bin_sums(values.detach().float(), u, self.settings.bins)

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        with torch.no_grad():
            return self.student(z, cond)

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor:
        return heun(self.teacher, z, cond, steps)

    def exported(self) -> nn.Module:
        return self.student.denoiser.network
