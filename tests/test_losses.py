"""The production losses against closed forms and quadrature: exact networks in float64, no training.

The expectation over (z, eps) is a tensor trapezoid rule, so gradients are compared to 1e-8 and not within noise.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import losses, rows
from distill.data import Batch, Classes
from distill.divergences import DIVERGENCES, Divergence, alpha
from distill.methods.base import Turn
from distill.methods.distribution_matching import DistributionMatching
from distill.noise_levels import Grid, LogNormal, LogUniform, half_g2
from distill.settings import DMD2, GAN
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import EDM, Process, RectifiedFlow
from models.seeds import Draws
from models.student import OneStepStudent
from tests.analytic import (
    NAMES,
    ExactNetwork,
    Mixture,
    Pair,
    divergence_by_quadrature,
    expanded_by_quadrature,
    gradient,
    line_nodes,
    log_ratio,
    normal_grid,
    relative_error,
    student_nodes,
    vector,
)

TOLERANCE = 1e-8
PASTED = Pair(mu=0.7, s=0.6)
LEVELS = [(1.0, 1.0), (1.0, 0.4), (0.8, 0.6), (0.5, 0.9)]
TEACHER = Mixture.line(vector(0.3, 0.45, 0.25), vector(-1.3, 0.2, 1.6), vector(0.5, 0.3, 0.6))
STUDENT = Mixture.line(vector(0.4, 0.6), vector(-0.8, 0.9), vector(0.7, 0.5))

# (dD/d mu, dD/d s), (dJ/d mu, dJ/d s) at sigma = 1 for PASTED, J = E_p[h |Delta|^2].
CONSTANTS = {
    "reverse_kl": ((0.350000000000, -0.141176470588), (0.350000000000, -0.348788927336)),
    "forward_kl": ((0.514705882353, -0.366565743945), (0.756920415225, -1.078134541014)),
    "jeffreys": ((0.864705882353, -0.507742214533), (1.106920415225, -1.426923468349)),
    "squared_hellinger": ((0.099513659937, -0.052579171164), (0.111919475533, -0.132971863262)),
    "jensen_shannon": ((0.187156124340, -0.091772520171), (0.193993614237, -0.219421172845)),
    "softened_reverse_kl": ((0.162843875660, -0.049403950418), (0.156006385763, -0.129367754491)),
    "neyman_chi2": ((0.673892114881, -0.164611920346), (0.682159696936, -0.485149945252)),
}


def columns(a: float, sigma: float, count: int) -> tuple[Tensor, Tensor]:
    return vector(a).expand(count), vector(sigma).expand(count)


def first_order(row: rows.Row, teacher: Mixture, student: Mixture, a: float, sigma: float) -> Tensor:
    """Expected gradient of a row's surrogate, all networks exact and without gradient."""
    x0, x_t, mass = student_nodes(student, a, sigma)
    x_t, level = x_t.detach(), columns(a, sigma, len(x0))
    r = log_ratio(teacher, student.frozen(), x_t, a, sigma).exp()
    fake, real = student.frozen().denoise(x_t, a, sigma), teacher.denoise(x_t, a, sigma)
    ks = row.coefficients(r, r, r, level[0])
    return gradient((mass * losses.score_surrogate(x0, real, fake, *level, *ks)).sum(), student)


def second_order(row: rows.Row, teacher: Mixture, student: Mixture, a: float, sigma: float) -> Tensor:
    """The same with the gradient through x_t into the frozen networks."""
    x0, x_t, mass = student_nodes(student, a, sigma)
    critic, level = student.frozen(), columns(a, sigma, len(x0))
    fake, real = critic.denoise(x_t, a, sigma), teacher.denoise(x_t, a, sigma)
    r = log_ratio(teacher, critic, x_t, a, sigma).exp().detach()
    ks = row.coefficients(r, *losses.score_products(x0, real, fake, *level), level[0] / level[1] ** 2)
    return gradient((mass * losses.score_surrogate(x0, real, fake, *level, *ks)).sum(), student)


def other(coefficients: Callable[[Tensor, Tensor, Tensor, Tensor], rows.Coefficients]) -> rows.Row:
    """A row that is in no table, for what must not hold."""
    return rows.Row(coefficients, second_order=True)


def without_cross_term(divergence: Divergence) -> rows.Row:
    """Uni-Instruct's k's without the part 2 r h' <Delta, e>, which released code leaves out."""
    exact = rows.uni_instruct(divergence)
    return other(lambda r, square, product, unit: exact.coefficients(r, square, 0 * product, unit))


# ------------------------------------------------------------------------------------------- first order: f-distill


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_surrogate_is_the_gradient_of_the_divergence(name: str, level: tuple[float, float]) -> None:
    pair = Pair(0.7, 0.9, -0.2, 1.1, *level)
    found = first_order(rows.f_distill(DIVERGENCES[name]), pair.teacher, pair.student, *level)
    assert relative_error(found, pair.reference(name)) <= TOLERANCE


@pytest.mark.parametrize("order", [0.0, 0.3, 0.5, 0.75, 1.0, 1.5])
def test_surrogate_of_the_alpha_family(order: float) -> None:
    closed = {0.0: PASTED.reverse_kl, 1.0: PASTED.forward_kl}.get(order, lambda: PASTED.alpha(order))()
    found = first_order(rows.f_distill(alpha(order)), PASTED.teacher, PASTED.student, 1.0, 1.0)
    assert relative_error(found, closed.gradient) <= TOLERANCE


@pytest.mark.parametrize("name", CONSTANTS)
def test_surrogate_gives_the_pasted_constants(name: str) -> None:
    found = first_order(rows.f_distill(DIVERGENCES[name]), PASTED.teacher, PASTED.student, 1.0, 1.0)
    assert float((found - vector(*CONSTANTS[name][0])).abs().max()) <= 1e-11


@pytest.mark.parametrize("level", [(1.0, 0.8), (0.8, 0.6)])
@pytest.mark.parametrize("name", NAMES)
def test_surrogate_between_mixtures(name: str, level: tuple[float, float]) -> None:
    student = STUDENT.student()
    expected = gradient(divergence_by_quadrature(DIVERGENCES[name], TEACHER, student, *level), student)
    found = first_order(rows.f_distill(DIVERGENCES[name]), TEACHER, student, *level)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_where_the_student_is_the_teacher(name: str) -> None:
    student = TEACHER.student()
    assert float(first_order(rows.f_distill(DIVERGENCES[name]), TEACHER, student, 0.8, 0.6).abs().max()) <= 1e-12
    assert float(second_order(rows.uni_instruct(DIVERGENCES[name]), TEACHER, student, 0.8, 0.6).abs().max()) <= 1e-12


def test_forward_kl_is_at_rest_at_the_matched_moments_and_reverse_kl_is_not() -> None:
    mean = (TEACHER.weights * TEACHER.means[:, 0]).sum()
    spread = (TEACHER.weights * (TEACHER.stds**2 + TEACHER.means[:, 0] ** 2)).sum() - mean**2
    student = Mixture.gaussian(float(mean), float(spread.sqrt())).student()
    pull = lambda name: float(first_order(rows.f_distill(DIVERGENCES[name]), TEACHER, student, 1.0, 0.5).abs().max())
    assert pull("forward_kl") <= 1e-10 and pull("reverse_kl") >= 1e-2


def test_weight_multiplies_and_pixels_add_up() -> None:
    """Vectors of pixels: the value per sample is the sum over pixels, times the weight of the sample."""
    generator = torch.Generator().manual_seed(0)
    x0, real, fake = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    a, sigma, k0, weight = vector(1, 0.8, 0.6), vector(0.5, 0.6, 0.8), vector(2, 0.5, 1), vector(1, 3, 0.25)
    found = losses.score_surrogate(x0, real, fake, a, sigma, k0, weight=weight)
    expected = [float(w * k * (b / s) ** 2 * ((f - t) * x).sum()) for w, k, b, s, f, t, x in zip(
        weight, k0, a, sigma, fake, real, x0, strict=True)]  # fmt: skip
    assert found.shape == (3,) and found.dtype == torch.float64
    assert relative_error(found, vector(*expected)) <= 1e-12


# --------------------------------------------------------------------------------- second order: Uni-Instruct, SIM, SiD


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_expanded_surrogate_is_the_gradient_of_j(name: str, level: tuple[float, float]) -> None:
    pair = Pair(0.7, 0.9, -0.2, 1.1, *level)
    student = pair.student
    expected = gradient(expanded_by_quadrature(DIVERGENCES[name], pair.teacher, student, *level), student)
    found = second_order(rows.uni_instruct(DIVERGENCES[name]), pair.teacher, student, *level)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", CONSTANTS)
def test_expanded_surrogate_gives_the_pasted_constants(name: str) -> None:
    found = second_order(rows.uni_instruct(DIVERGENCES[name]), PASTED.teacher, PASTED.student, 1.0, 1.0)
    assert float((found - vector(*CONSTANTS[name][1])).abs().max()) <= 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_expanded_surrogate_between_mixtures(name: str) -> None:
    student = STUDENT.student()
    expected = gradient(expanded_by_quadrature(DIVERGENCES[name], TEACHER, student, 1.0, 0.8), student)
    found = second_order(rows.uni_instruct(DIVERGENCES[name]), TEACHER, student, 1.0, 0.8)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("level", LEVELS)
def test_fisher_divergence_is_sid_with_one_half(level: tuple[float, float]) -> None:
    pair = Pair(0.7, 0.6, 0.1, 0.9, *level)
    fisher = pair.fisher().gradient
    sim = second_order(rows.sim(None), pair.teacher, pair.student, *level)
    assert relative_error(sim, fisher) <= TOLERANCE
    assert relative_error(second_order(rows.sid(0.5), pair.teacher, pair.student, *level), fisher / 2) <= TOLERANCE


@pytest.mark.parametrize("al", [1.0, 1.2])
def test_sid_with_its_usual_alpha_is_not_the_fisher_gradient(al: float) -> None:
    pair = Pair(mu=0.7, s=0.6, sigma=0.5)
    found = second_order(rows.sid(al), pair.teacher, pair.student, pair.a, pair.sigma)
    assert relative_error(found, pair.sid(al)) <= TOLERANCE
    assert relative_error(found, pair.fisher().gradient / 2) >= 0.2


def test_forward_kl_without_the_cross_term_is_wrong_in_the_spread_only() -> None:
    found = second_order(without_cross_term(DIVERGENCES["forward_kl"]), PASTED.teacher, PASTED.student, 1.0, 1.0)
    expected = vector(*CONSTANTS["forward_kl"][1])
    error = (found / expected - 1).abs()
    assert float(error[0]) <= TOLERANCE and float(error[1]) >= 0.2


@pytest.mark.parametrize(
    ("name", "least"), [("forward_kl", 0.1), ("jeffreys", 0.05), ("jensen_shannon", 0.05), ("pearson_chi2", 0.1)]
)
def test_leaving_out_the_cross_term_shows_on_mixtures(name: str, least: float) -> None:
    student = STUDENT.student()
    expected = gradient(expanded_by_quadrature(DIVERGENCES[name], TEACHER, student, 1.0, 1.0), student)
    found = second_order(without_cross_term(DIVERGENCES[name]), TEACHER, student, 1.0, 1.0)
    assert relative_error(found, expected) >= least


def test_a_detached_weight_on_sim_is_not_forward_kl() -> None:
    found = second_order(
        other(lambda r, square, product, unit: (0.0, r, 2 * r)), PASTED.teacher, PASTED.student, 1.0, 1.0
    )
    assert relative_error(found, vector(*CONSTANTS["forward_kl"][1])) >= 0.1


@pytest.mark.parametrize("level", LEVELS)
def test_sds_lacks_the_entropy_that_vsd_has(level: tuple[float, float]) -> None:
    """SDS puts the score of p(x_t | x0) where VSD has the student's: same in the mean, it shrinks the spread."""
    pair = Pair(0.7, 0.6, 0.1, 0.9, *level)
    student, teacher = pair.student, pair.teacher
    x0, x_t, mass = student_nodes(student, *level)
    real = teacher.denoise(x_t.detach(), *level)
    value = losses.score_surrogate(x0, real, x0.detach(), *columns(*level, len(x0)))
    sds, vsd = gradient((mass * value).sum(), student), pair.reverse_kl().gradient
    assert relative_error(sds, pair.sds()) <= TOLERANCE
    assert float((sds[0] / vsd[0] - 1).abs()) <= TOLERANCE
    assert float(sds[1]) > 0 > float(vsd[1])


def test_gradient_of_second_order_terms_flows_through_x_t() -> None:
    """Negative: with networks cut off from x_t, k1 and k2 no longer give the Fisher gradient."""
    student = PASTED.student
    x0, x_t, mass = student_nodes(student, 1.0, 1.0)
    fake, real = student.frozen().denoise(x_t.detach(), 1.0, 1.0), PASTED.teacher.denoise(x_t.detach(), 1.0, 1.0)
    value = losses.score_surrogate(x0, real, fake, *columns(1.0, 1.0, len(x0)), 0.0, 1.0, 2.0)
    assert relative_error(gradient((mass * value).sum(), student), PASTED.fisher().gradient) >= 0.1


@pytest.mark.parametrize("width", [0.1, 0.5, 20.0])
@pytest.mark.parametrize("level", LEVELS)
def test_pseudo_huber_is_the_gradient_of_its_distance(level: tuple[float, float], width: float) -> None:
    a, sigma = level
    student, c = STUDENT.student(), width * a / sigma**2
    x, step = line_nodes(student, a, sigma)
    delta = (student.score(x, a, sigma) - TEACHER.score(x, a, sigma)).squeeze(1)
    distance = (student.log_density(x, a, sigma).exp() * ((delta**2 + c**2).sqrt() - c)).sum() * step
    found = second_order(rows.sim(width), TEACHER, student, a, sigma)
    assert relative_error(found, gradient(distance, student)) <= TOLERANCE


def integrated(name: str, levels: LogUniform, process: Process, pair: Pair, count: int = 96) -> Tensor:
    """Uni-Instruct's gradient over all noise levels: Gauss-Legendre over u with the production time weight."""
    nodes, masses = np.polynomial.legendre.leggauss(count)
    u = torch.from_numpy((nodes + 1) / 2)
    t, weight = levels.times(u, process), half_g2(levels, u, process)
    row, total = rows.uni_instruct(DIVERGENCES[name]), torch.zeros(2, dtype=torch.float64)
    for time, mass in zip(t, weight * torch.from_numpy(masses / 2), strict=True):
        level = float(process.alpha(time)), float(process.sigma(time))
        total += mass * second_order(row, pair.teacher, pair.student, *level)
    return total


@pytest.mark.parametrize(
    ("name", "s", "expected"),
    [
        ("reverse_kl", 0.6, (0.696508728, -1.056666281)),
        ("forward_kl", 0.6, (1.929286056, -5.159567708)),
        ("squared_hellinger", 0.6, (0.219859515, -0.401156978)),
        ("neyman_chi2", 0.6, (1.488828658, -1.876727922)),
        ("pearson_chi2", 0.9, (5.078732971, -11.814934416)),
    ],
)
def test_uni_instruct_between_two_noise_levels(name: str, s: float, expected: tuple[float, float]) -> None:
    found = integrated(name, LogUniform(low=0.05, high=20.0), EDM(), Pair(0.7, s), 64)
    assert relative_error(found, vector(*expected)) <= TOLERANCE


@pytest.mark.parametrize("process", [EDM(1e-9, 1e9), RectifiedFlow(t_min=1e-9, t_max=1 - 1e-9)], ids=["edm", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_uni_instruct_over_all_noise_levels_is_the_divergence_of_the_data(name: str, process: Process) -> None:
    """D_f(q_0 || p_0), whatever the process: what is left at the ends is of the order of 1e-7."""
    pair = Pair(0.4, 0.9)
    clean = Pair(0.4, 0.9, sigma=0.0)
    found = integrated(name, LogUniform(low=1e-4, high=1e4), process, pair)
    assert relative_error(found, clean.reference(name)) <= 1e-6


def test_half_g2_is_g_squared_over_two() -> None:
    """Drawn uniformly in t, a straight flow's weight is t / (1 - t); with EDM on any draw it is sigma d sigma / du."""
    flow, u = RectifiedFlow(t_min=0.1, t_max=0.9), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    t = flow.spaced(u)
    torch.testing.assert_close(half_g2(Grid(), u, flow), 0.8 * t / (1 - t))
    sigma = LogUniform(low=0.1, high=10.0).times(u, EDM())
    torch.testing.assert_close(half_g2(LogUniform(low=0.1, high=10.0), u, EDM()), sigma**2 * math.log(100))
    beyond = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)
    assert half_g2(LogNormal(std=3.0), beyond, EDM(0.1, 10.0)).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------- stochastic


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger"])
def test_surrogate_on_random_samples_is_unbiased(name: str) -> None:
    count, pair = 400_000, Pair(0.7, 0.9, -0.2, 1.1, 0.8, 0.6)
    generator = torch.Generator().manual_seed(NAMES.index(name))
    z, eps = (torch.randn(count, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    still = pair.student.frozen()
    x0 = (still.means + still.stds * z).requires_grad_()
    x_t = (pair.a * x0 + pair.sigma * eps).detach()
    r = log_ratio(pair.teacher, still, x_t, pair.a, pair.sigma).exp()
    fake, real = still.denoise(x_t, pair.a, pair.sigma), pair.teacher.denoise(x_t, pair.a, pair.sigma)
    value = losses.score_surrogate(
        x0, real, fake, *columns(pair.a, pair.sigma, count), k0=DIVERGENCES[name].h(r), normalizer="none"
    )
    (each,) = torch.autograd.grad(value.sum(), x0)
    parts = torch.cat([each, each * z], 1)
    error = parts.std(0) / math.sqrt(count)
    assert float((error / parts.mean(0)).abs().max()) < 0.05, "too noisy to tell"
    assert float(((parts.mean(0) - pair.reference(name)) / error).abs().max()) < 4.5


# ------------------------------------------------------------------------------------------------------ the normalizer


@pytest.mark.parametrize("k", [(1.0, 0.0, 0.0), (0.7, 0.5, 1.5)])
def test_dmd_normalizer_scales_each_row_by_its_own_factor(k: tuple[float, float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, real, fake = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_()
    a, sigma, weight = vector(1, 1, 0.8, 0.6, 0.3), vector(0.5, 3, 0.6, 0.8, 0.9), vector(1, 2, 3, 4, 5)

    def rows(normalizer: Literal["none", "dmd"]) -> Tensor:
        value = losses.score_surrogate(x0, real, fake, a, sigma, *k, weight=weight, normalizer=normalizer)
        return torch.autograd.grad(value.sum(), x0)[0]

    plain, scaled = rows("none"), rows("dmd")
    pixels = x0[0].numel()
    for i in range(5):
        factor = 1 / (float((x0[i] - real[i]).detach().abs().sum()) + 1e-6 * pixels)
        assert relative_error(scaled[i], factor * plain[i]) <= 1e-12


def test_dmd_normalizer_changes_the_objective() -> None:
    """Its expectation is no multiple of the divergence's gradient: tests of gradients must run without it."""
    student = PASTED.student
    x0, x_t, mass = student_nodes(student, 1.0, 1.0)
    still = student.frozen()
    fake, real = still.denoise(x_t.detach(), 1.0, 1.0), PASTED.teacher.denoise(x_t.detach(), 1.0, 1.0)
    value = losses.score_surrogate(x0, real, fake, *columns(1.0, 1.0, len(x0)), normalizer="dmd")
    found, exact = gradient((mass * value).sum(), student), vector(*CONSTANTS["reverse_kl"][0])
    assert abs(float(found[1] / found[0] / (exact[1] / exact[0])) - 1) >= 0.05


# ------------------------------------------------------------------------------------------------ score matching, GAN


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_denoising_loss_has_its_optimum_at_the_posterior_mean(sigma: float) -> None:
    """A linear student fitted to Gaussian data: slope v^2 / (v^2 + sigma^2), intercept m (1 - slope)."""
    mean, std = 0.4, 0.7
    x0, x_t, mass = student_nodes(Mixture.gaussian(mean, std), 1.0, sigma)
    line = vector(0.0, 0.0).requires_grad_()
    optimizer = torch.optim.LBFGS([line], max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-16)
    ratio = vector(sigma).expand(len(x0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (mass * losses.denoising_loss(line[0] * x_t + line[1], x0, ratio, std)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    slope = std**2 / (std**2 + sigma**2)
    assert relative_error(line.detach(), vector(slope, mean * (1 - slope))) <= 1e-6


def test_denoising_loss_has_unit_weight_on_edms_network() -> None:
    """EDM's weight is 1 / c_out^2: the loss is the mean over pixels of the network's own squared error."""
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    ratio, sigma_data = vector(0.01, 0.3, 2, 50), 0.5
    c_out = ratio * sigma_data / (ratio**2 + sigma_data**2).sqrt()
    found = losses.denoising_loss(x0 + c_out.reshape(4, 1, 1, 1) * noise, x0, ratio, sigma_data)
    assert relative_error(found, (noise**2).flatten(1).mean(1)) <= 1e-12


@pytest.mark.parametrize("mixtures", [False, True], ids=["gaussians", "mixtures"])
def test_generator_loss_is_the_softened_reverse_kl(mixtures: bool) -> None:
    """At the exact logit, with the discriminator frozen, gradient through x_t."""
    a, sigma = 0.8, 0.6
    teacher, student = (TEACHER, STUDENT.student()) if mixtures else (Pair(0, 1).teacher, Pair(0.7, 0.6).student)
    _, x_t, mass = student_nodes(student, a, sigma)
    logit = log_ratio(teacher, student.frozen(), x_t, a, sigma)
    found = gradient((mass * losses.generator_loss(logit)).sum(), student)
    for name in ("softened_reverse_kl", "reverse_kl"):
        expected = gradient(divergence_by_quadrature(DIVERGENCES[name], teacher, student, a, sigma), student)
        error = relative_error(found, expected)
        assert error <= TOLERANCE if name == "softened_reverse_kl" else error >= 0.1


def test_logistic_discriminator_recovers_the_log_ratio() -> None:
    """Features (1, x, x^2) hold log q_t / p_t of two Gaussians exactly; the loss must be smallest there."""
    pair = Pair(0.7, 0.6, -0.1, 1.1, 0.9, 0.5)
    p, q, _, _ = pair.symbols
    nodes, mass = normal_grid(10.0)
    fake, real = pair.a * pair.mu + p**0.5 * nodes, pair.a * pair.m + q**0.5 * nodes
    weights = vector(0, 0, 0).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def logit(x: Tensor) -> Tensor:
        return weights[0] + weights[1] * x + weights[2] * x**2

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (mass * losses.discriminator_loss(logit(real), logit(fake))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fake_mean, real_mean = pair.a * pair.mu, pair.a * pair.m
    constant = 0.5 * math.log(p / q) + fake_mean**2 / (2 * p) - real_mean**2 / (2 * q)
    expected = vector(constant, real_mean / q - fake_mean / p, 1 / (2 * p) - 1 / (2 * q))
    assert relative_error(weights.detach(), expected) <= 1e-6


def test_optimal_discriminator_loss_is_two_log_two_less_jensen_shannon() -> None:
    pair = Pair(0.7, 0.6, -0.1, 1.1, 0.9, 0.5)
    nodes, mass = normal_grid(10.0)
    p, q, _, _ = pair.symbols
    real, fake = (
        log_ratio(pair.teacher, pair.student.frozen(), x[:, None], pair.a, pair.sigma)
        for x in (pair.a * pair.m + q**0.5 * nodes, pair.a * pair.mu + p**0.5 * nodes)
    )
    found = float((mass * losses.discriminator_loss(real, fake)).sum())
    js = divergence_by_quadrature(DIVERGENCES["jensen_shannon"], pair.teacher, pair.student, pair.a, pair.sigma)
    assert found == pytest.approx(2 * math.log(2) - float(js.detach()), abs=1e-11)


# ------------------------------------------------------------------------------------------------------- approximate R1


def test_approximate_r1_is_zero_without_perturbation_and_a_squared_slope_with_it() -> None:
    generator = torch.Generator().manual_seed(3)
    x, unit = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    logit = lambda x: 1.5 * x + 0.3
    assert float(losses.approximate_r1(logit(x), logit(x)).abs().max()) == 0
    penalty = losses.approximate_r1(logit(x), logit(x + 0.1 * unit))
    assert penalty.shape == x.shape
    assert float(penalty.mean()) == pytest.approx((1.5 * 0.1) ** 2, rel=0.02)


class RecordingDraws(Draws):
    """Draws that keep every normal tensor they gave out."""

    def __init__(self, count: int):
        super().__init__(range(count))
        self.given: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        self.given.append(super().normal(*shape))
        return self.given[-1]


class RecordingDenoiser(Denoiser):
    """A teacher that keeps what its features were asked for."""

    calls: list[tuple[Tensor, Tensor, Condition]]

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: object) -> list[Tensor]:  # type: ignore[override]
        self.calls.append((x_t, t, cond))
        return super().features(x_t, t, cond, ["features"])


class SumOfSquares(nn.Module):
    """A discriminator without parameters."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[0].square().sum(1)


def recording_method(process: Process, sigma_data: float, gan: GAN) -> tuple[DistributionMatching, RecordingDenoiser]:
    def denoiser(kind: type[Denoiser]) -> Denoiser:
        pair = Mixture(vector(0.5, 0.5), torch.eye(2, dtype=torch.float64), vector(0.3, 0.3))
        return kind(ExactNetwork(pair, process), process, "x0", sigma_data)

    teacher = denoiser(RecordingDenoiser)
    assert isinstance(teacher, RecordingDenoiser)
    teacher.calls = []
    method = DistributionMatching(
        DMD2(gan=gan),
        rows.reverse_kl(),
        Guided(teacher, 1.0),
        OneStepStudent(denoiser(Denoiser), 0.9),
        denoiser(Denoiser),
        Classes(2),
        (2, 1, 1),
        SumOfSquares(),
    )
    return method, teacher


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=["edm", "flow"])
def test_r1_perturbs_the_same_noised_picture(process: Process) -> None:
    """The third part of the discriminator's input is the second plus r1_scale x its standard deviation x unit noise."""
    count, sigma_data, scale = 64, 0.7, 0.05
    method, teacher = recording_method(process, sigma_data, GAN(r1_weight=2.0, r1_scale=scale, taps=["features"]))
    pictures = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    draws = RecordingDraws(count)
    loss, logs = method.critic_loss(Turn(0, draws, Batch(pictures, Condition(class_ids=torch.arange(count) % 2))))

    ((x, t, cond),) = teacher.calls
    fake, real, perturbed = x.chunk(3)
    t_fake, t_real, t_perturbed = t.chunk(3)
    assert torch.equal(t_fake, t_real) and torch.equal(t_real, t_perturbed)
    assert cond.class_ids is not None
    assert torch.equal(cond.class_ids[count : 2 * count], cond.class_ids[2 * count :])
    assert torch.equal(cond.class_ids[count : 2 * count], torch.arange(count) % 2)

    alpha_t, sigma_t = (value.reshape(-1, 1, 1, 1) for value in (process.alpha(t_real), process.sigma(t_real)))
    unit = (perturbed - real) / (scale * ((alpha_t * sigma_data) ** 2 + sigma_t**2).sqrt())
    real_noise = (real - alpha_t * pictures) / sigma_t
    matches = [i for i, given in enumerate(draws.given) if torch.allclose(given, unit, atol=1e-3)]
    used_for_real = [i for i, given in enumerate(draws.given) if torch.allclose(given, real_noise, atol=1e-2)]
    assert len(matches) == 1 and len(used_for_real) == 1 and matches != used_for_real
    assert not torch.allclose(fake, real)

    features = teacher.features(x, t, cond, ["features"])
    fake_logit, real_logit, moved_logit = SumOfSquares()(features).chunk(3)
    r1 = losses.approximate_r1(real_logit, moved_logit).mean()
    assert float(logs["r1"]) == pytest.approx(float(r1), rel=1e-5)
    expected = logs["critic_loss"] + losses.discriminator_loss(real_logit, fake_logit).mean() + 2.0 * r1
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_without_r1_there_are_two_parts() -> None:
    method, teacher = recording_method(EDM(), 0.7, GAN(r1_weight=0.0, taps=["features"]))
    pictures = torch.zeros(8, 2, 1, 1)
    _, logs = method.critic_loss(
        Turn(0, RecordingDraws(8), Batch(pictures, Condition(class_ids=torch.zeros(8).long())))
    )
    assert len(teacher.calls[0][0]) == 16 and "r1" not in logs


# -------------------------------------------------------------------------------------------------------------- others


def test_regression_loss_is_a_mean_over_pixels() -> None:
    predicted = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]])
    assert losses.regression_loss(predicted, torch.zeros_like(predicted)).tolist() == [5.0, 0.0]


def test_bins_of_equal_width_count_everything_once() -> None:
    values, u = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.249, 0.25, 0.9999999])
    total, count = losses.bin_sums(values, u, 4)
    assert total.tolist() == [3.0, 4.0, 0.0, 8.0] and count.tolist() == [2.0, 1.0, 0.0, 1.0]
    assert losses.bin_index(torch.tensor([1.0]), 4).tolist() == [3]
