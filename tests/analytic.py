"""Exact references for the tests: Gaussian mixtures under noise, quadrature over a student's noise, closed forms.

Notation of the code: q teacher, p student, ``x_t = a x0 + sigma eps``, ``r = q_t / p_t``, ``Delta = s_p - s_q``. The
closed forms are for a student ``x0 = mu + s z`` and a teacher N(m, v^2); with ``P = a^2 s^2 + sigma^2``,
``Q = a^2 v^2 + sigma^2``, ``d = mu - m`` and ``A = a^2 d^2``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.divergences import DIVERGENCES, Divergence
from models.condition import Condition
from models.process import Process

NAMES = (
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "pearson_chi2",
    "neyman_chi2",
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """``sum_k weights_k N(means_k, stds_k^2 I)``: weights (K,), means (K, D), stds (K,); points x are (B, D).

    ``alpha`` and ``sigma`` are numbers or (B,). As a student it is reparameterised component by component,
    ``x0 = means_k + stds_k z``, with constant weights.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    @staticmethod
    def gaussian(mean: float, std: float) -> "Mixture":
        return Mixture(vector(1.0), vector(mean)[:, None], vector(std))

    @staticmethod
    def line(weights: Tensor, means: Tensor, stds: Tensor) -> "Mixture":
        """One-dimensional: three vectors (K,)."""
        return Mixture(weights, means[:, None], stds)

    def student(self) -> "Mixture":
        """A copy whose means and stds are leaves with a gradient."""
        return Mixture(self.weights, self.means.clone().requires_grad_(), self.stds.clone().requires_grad_())

    def frozen(self) -> "Mixture":
        """A copy without gradients: the exact critic of this student."""
        return Mixture(self.weights, self.means.detach(), self.stds.detach())

    @property
    def parameters(self) -> list[Tensor]:
        return [self.means, self.stds]

    def _components(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Log of weight times density of each component (B, K); variance (B or 1, K); a (B or 1, 1)."""
        a, s = (torch.as_tensor(value, dtype=x.dtype).reshape(-1, 1) for value in (alpha, sigma))
        variance = (a * self.stds) ** 2 + s**2
        squares = ((x[:, None] - a[..., None] * self.means) ** 2).sum(-1)
        log = self.weights.log() - squares / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log()
        return log, variance, a

    def log_density(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """``log p_t(x)``, (B,)."""
        return self._components(x, alpha, sigma)[0].logsumexp(1)

    def score(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """``grad log p_t(x)``, (B, D)."""
        log, variance, a = self._components(x, alpha, sigma)
        pull = (a[..., None] * self.means - x[:, None]) / variance[..., None]
        return (log.softmax(1)[..., None] * pull).sum(1)

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """``E[x0 | x_t = x]``, (B, D)."""
        log, variance, a = self._components(x, alpha, sigma)
        gain = (a * self.stds**2 / variance)[..., None]
        return (log.softmax(1)[..., None] * (self.means + gain * (x[:, None] - a[..., None] * self.means))).sum(1)

    def samples(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) independent draws."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * z


def log_ratio(teacher: Mixture, student: Mixture, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """``log q_t(x) / p_t(x)``, (B,): the optimal discriminator's logit."""
    return teacher.log_density(x, alpha, sigma) - student.log_density(x, alpha, sigma)


class ExactNetwork(nn.Module):
    """A mixture's exact denoiser as a network that predicts x0 of pictures (B, C, H, W), D = C H W.

    ``features`` passes on ``(c_in x_t, log ratio)``, (B, D + 1), for discriminators to tap. With ``shift`` the
    unconditional features and answer (null class) are larger by that much, for tests of guidance.
    """

    def __init__(self, mixture: Mixture, process: Process, shift: float = 0.0):
        super().__init__()
        self.mixture, self.process, self.shift = mixture, process, shift
        self.features = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        x, time = x_t.flatten(1).double(), t.double()
        alpha, sigma = self.process.alpha(time), self.process.sigma(time)
        total = (alpha**2 + sigma**2).sqrt()
        extra = torch.zeros_like(time) if cond.class_ids is None else self.shift * (cond.class_ids < 0).to(time)
        features = torch.cat([x / total[:, None], (sigma / alpha).log()[:, None]], 1) + extra[:, None]
        self.features(features.to(x_t.dtype))
        x0 = self.mixture.denoise(x, alpha, sigma) + extra[:, None]
        return x0.reshape(x_t.shape).to(x_t.dtype)


# ---------------------------------------------------------------------------------------------------------- quadrature


def normal_grid(reach: float = 14.0, step: float = 0.1) -> tuple[Tensor, Tensor]:
    """Nodes (N,) and weights (N,) of the trapezoid rule for a standard normal variable."""
    nodes = torch.arange(-round(reach / step), round(reach / step) + 1, dtype=torch.float64) * step
    return nodes, step * (-(nodes**2) / 2).exp() / math.sqrt(2 * math.pi)


def student_nodes(student: Mixture, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """x0 (B, 1), x_t (B, 1) and weights (B,) of a student on the line: the tensor trapezoid rule over (k, z, eps)."""
    nodes, weights = normal_grid()
    z, eps = (axis.reshape(-1, 1) for axis in torch.meshgrid(nodes, nodes, indexing="ij"))
    x0 = torch.cat([mean + std * z for mean, std in zip(student.means, student.stds, strict=True)])
    mass = torch.cat([w * (weights[:, None] * weights).flatten() for w in student.weights])
    return x0, alpha * x0 + sigma * eps.repeat(len(student.weights), 1), mass


def line_nodes(student: Mixture, alpha: float, sigma: float) -> tuple[Tensor, float]:
    """Points (N, 1) that cover x_t of a one-dimensional student, and their spacing."""
    still = student.frozen()
    spread = (alpha * still.stds.max() ** 2 * alpha + sigma**2) ** 0.5
    low, high = float(alpha * still.means.min() - 16 * spread), float(alpha * still.means.max() + 16 * spread)
    x = torch.linspace(low, high, 16001, dtype=torch.float64)[:, None]
    return x, (high - low) / 16000


def divergence_by_quadrature(
    divergence: Divergence, teacher: Mixture, student: Mixture, alpha: float, sigma: float
) -> Tensor:
    """``D_f(q_t || p_t) = int p f(q / p) dx``, differentiable in the student's parameters."""
    x, step = line_nodes(student, alpha, sigma)
    r = log_ratio(teacher, student, x, alpha, sigma).exp()
    return (student.log_density(x, alpha, sigma).exp() * divergence.f(r)).sum() * step


def expanded_by_quadrature(
    divergence: Divergence, teacher: Mixture, student: Mixture, alpha: float, sigma: float
) -> Tensor:
    """``J = E_p[h(r) |Delta|^2]`` (Uni-Instruct's integrand), differentiable in the student's parameters."""
    x, step = line_nodes(student, alpha, sigma)
    r = log_ratio(teacher, student, x, alpha, sigma).exp()
    delta = (student.score(x, alpha, sigma) - teacher.score(x, alpha, sigma)).squeeze(1)
    return (student.log_density(x, alpha, sigma).exp() * divergence.h(r) * delta**2).sum() * step


def gradient(value: Tensor, student: Mixture) -> Tensor:
    """Gradient by the student's means and stds, one vector (2 K,)."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, student.parameters)])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry of what is expected."""
    return float((found - expected).abs().max() / expected.abs().max())


# -------------------------------------------------------------------------------------------------------- closed forms


@dataclass(frozen=True)
class Closed:
    """A divergence between two Gaussians at one noise level: value, d/d mu, d/d s."""

    value: float
    d_mu: float
    d_s: float

    @property
    def gradient(self) -> Tensor:
        return vector(self.d_mu, self.d_s)

    def __add__(self, other: "Closed") -> "Closed":
        return Closed(self.value + other.value, self.d_mu + other.d_mu, self.d_s + other.d_s)

    def times(self, factor: float) -> "Closed":
        return Closed(factor * self.value, factor * self.d_mu, factor * self.d_s)


@dataclass(frozen=True)
class Pair:
    """The two Gaussians: student N(mu, s^2), teacher N(m, v^2), at noise (a, sigma)."""

    mu: float
    s: float
    m: float = 0.0
    v: float = 1.0
    a: float = 1.0
    sigma: float = 1.0

    @property
    def student(self) -> Mixture:
        return Mixture.gaussian(self.mu, self.s).student()

    @property
    def teacher(self) -> Mixture:
        return Mixture.gaussian(self.m, self.v)

    @property
    def symbols(self) -> tuple[float, float, float, float]:
        """P, Q, d, A."""
        big_p, big_q = self.a**2 * self.s**2 + self.sigma**2, self.a**2 * self.v**2 + self.sigma**2
        return big_p, big_q, self.mu - self.m, self.a**2 * (self.mu - self.m) ** 2

    def reverse_kl(self) -> Closed:
        p, q, d, gap = self.symbols
        value = (p / q - 1 - math.log(p / q) + gap / q) / 2
        return Closed(value, self.a**2 * d / q, self.a**2 * self.s * (1 / q - 1 / p))

    def forward_kl(self) -> Closed:
        p, q, d, gap = self.symbols
        value = (q / p - 1 - math.log(q / p) + gap / p) / 2
        return Closed(value, self.a**2 * d / p, self.a**2 * self.s * (1 / p - (q + gap) / p**2))

    def alpha(self, al: float) -> Closed:
        """The alpha family for orders other than 0 and 1; needs ``al P + (1 - al) Q > 0``."""
        p, q, d, gap = self.symbols
        mixed = al * p + (1 - al) * q
        if mixed <= 0:
            raise ValueError(f"alpha divergence of order {al} is infinite here")
        m = q ** ((1 - al) / 2) * p ** (al / 2) * mixed**-0.5 * math.exp(-al * (1 - al) * gap / (2 * mixed))
        inner = al / (2 * p) - al / (2 * mixed) + al**2 * (1 - al) * gap / (2 * mixed**2)
        factor = 1 / (al * (al - 1))
        return Closed((m - 1) * factor, m * self.a**2 * d / mixed, m * factor * 2 * self.a**2 * self.s * inner)

    def divergence(self, name: str) -> Closed | None:
        """By the name in DIVERGENCES; None where there is no closed form."""
        match name:
            case "reverse_kl":
                return self.reverse_kl()
            case "forward_kl":
                return self.forward_kl()
            case "jeffreys":
                return self.reverse_kl() + self.forward_kl()
            case "squared_hellinger":
                return self.alpha(0.5).times(0.25)
            case "pearson_chi2":
                return self.alpha(2.0).times(2.0)
            case "neyman_chi2":
                return self.alpha(-1.0).times(2.0)
            case _:
                return None

    def reference(self, name: str) -> Tensor:
        """(d/d mu, d/d s) of a divergence: closed form if there is one, else autograd through quadrature."""
        closed = self.divergence(name)
        if closed is not None:
            return closed.gradient
        student = self.student
        value = divergence_by_quadrature(DIVERGENCES[name], self.teacher, student, self.a, self.sigma)
        return gradient(value, student)

    def fisher(self) -> Closed:
        """``E_p |Delta|^2``."""
        p, q, d, gap = self.symbols
        k = 1 / q - 1 / p
        return Closed(k**2 * p + gap / q**2, 2 * self.a**2 * d / q**2, 2 * self.a**2 * self.s * (k**2 + 2 * k / p))

    def sid(self, al: float) -> Tensor:
        """Expected gradient of SiD's surrogate, ``(1 - al) |Delta|^2 - <Delta, e>``."""
        p, q, d, _ = self.symbols
        k = 1 / q - 1 / p
        g_mu = self.a**2 * d / q * (2 * (1 - al) * k + 1 / p)
        return vector(g_mu, 2 * self.a**2 * self.s * k * ((1 - al) * k + 1 / p))

    def sds(self) -> Tensor:
        """Expected gradient of score distillation sampling: reverse KL without the student's entropy."""
        _, q, d, _ = self.symbols
        return vector(self.a**2 * d / q, self.a**2 * self.s / q)


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function at ``x``."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum() + 0 * x.sum(), x)[0]
