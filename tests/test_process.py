"""Noise processes, parameterizations, changes of process and samplers against exact Gaussian denoisers in float64."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from models.condition import NULL_CLASS, Condition
from models.denoiser import Denoiser, Guided, Reparameterized
from models.parameterization import Prediction, from_x0, score_from_x0, to_eps, to_x0
from models.process import EDM, DiscreteVP, Process, RectifiedFlow, TrigFlow, expand_to
from models.student import OneStepStudent, heun
from tests.analytic import ExactNetwork, Mixture, vector

SCALED_LINEAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
VP = DiscreteVP(SCALED_LINEAR)
PROCESSES: list[Process] = [EDM(), VP, RectifiedFlow(), RectifiedFlow(shift=3.0), TrigFlow(), TrigFlow(sigma_data=1.0)]
KINDS: tuple[Prediction, ...] = get_args(Prediction)
MEAN, STD = 0.3, 0.6

every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def grid(process: Process, count: int = 201) -> Tensor:
    return process.spaced(torch.linspace(0, 1, count, dtype=torch.float64))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(dimensions: int = 1) -> Mixture:
    """N(MEAN, STD^2 I)."""
    return Mixture(vector(1.0), torch.full((1, dimensions), MEAN, dtype=torch.float64), vector(STD))


def classes(count: int, value: int = 0) -> Condition:
    return Condition(class_ids=torch.full((count,), value))


# ----------------------------------------------------------------------------------------------------------- processes


def test_definitions() -> None:
    t = vector(0.1, 0.5, 0.9)
    edm, flow, trig = EDM(), RectifiedFlow(shift=3), TrigFlow(sigma_data=0.7)
    assert torch.equal(edm.alpha(t), torch.ones(3).double()) and torch.equal(edm.sigma(t), t)
    assert torch.equal(flow.alpha(t), 1 - t) and torch.equal(flow.sigma(t), t)
    assert torch.allclose(trig.alpha(t), t.cos()) and torch.allclose(trig.sigma(t), 0.7 * t.sin())
    for index in (0, 1, 500, 999):
        at = vector(index)
        assert float(VP.alpha(at)) == pytest.approx(math.sqrt(float(SCALED_LINEAR[index])), rel=1e-12)
        assert float(VP.sigma(at)) == pytest.approx(math.sqrt(1 - float(SCALED_LINEAR[index])), rel=1e-12)


@every_process
def test_add_noise_is_the_definition(process: Process) -> None:
    t = grid(process, 5)
    x0, eps = noise(5, 2, 3, 3), noise(5, 2, 3, 3, seed=1)
    a, s = process.alpha(t), process.sigma(t)
    found = process.add_noise(x0, eps, t)
    for i in range(5):
        assert torch.allclose(found[i], a[i] * x0[i] + s[i] * eps[i], rtol=1e-14, atol=1e-14)
    assert process.add_noise(x0.float(), eps.float(), t).dtype == torch.float32


@every_process
def test_time_and_ratio_are_inverse(process: Process) -> None:
    t = grid(process, 1501)
    ratio = process.ratio(t)
    assert bool((ratio.diff() > 0).all())
    assert torch.allclose(ratio, process.sigma(t) / process.alpha(t), rtol=1e-14)
    back = process.time_from_ratio(ratio)
    assert float(((back - t).abs() / process.t_max).max()) <= 1e-10
    assert float((process.ratio(back) / ratio - 1).abs().max()) <= 1e-10


@every_process
def test_the_grid_reaches_both_ends(process: Process) -> None:
    ends = process.spaced(vector(0, 1))
    assert float(ends[0]) == pytest.approx(process.t_min, rel=1e-9, abs=1e-12)
    assert float(ends[1]) == pytest.approx(process.t_max, rel=1e-9)
    assert bool((grid(process).diff() > 0).all())


def test_discrete_vp_between_entries() -> None:
    """Log of the ratio is linear between two entries, variance is preserved, gradients are those of the line."""
    t = vector(0.0, 0.25, 17.75, 500.5, 998.999, 999.0).requires_grad_()
    log_ratio = VP.log_ratio(t)
    low = t.detach().floor().clamp(max=998).long()
    share = t.detach() - low
    table = VP.log_ratios
    assert torch.allclose(log_ratio.detach(), (1 - share) * table[low] + share * table[low + 1], rtol=1e-12)
    assert torch.allclose(VP.alpha(t.detach()) ** 2 + VP.sigma(t.detach()) ** 2, torch.ones(6).double(), rtol=1e-14)
    (slope,) = torch.autograd.grad(log_ratio.sum(), t)
    assert torch.allclose(slope[1:-1], (table[low + 1] - table[low])[1:-1], rtol=1e-10)
    inner = vector(0.25, 17.75, 500.5).requires_grad_()
    (round_trip,) = torch.autograd.grad(VP.time_from_ratio(VP.ratio(inner)).sum(), inner)
    assert torch.allclose(round_trip, torch.ones(3).double(), rtol=1e-9)


@every_process
def test_sigma_and_ratio_are_differentiable(process: Process) -> None:
    t = grid(process, 7)[1:-1] + 1e-3 * process.t_max / 1000
    for function in (process.sigma, process.ratio):
        assert torch.autograd.gradcheck(function, (t.clone().requires_grad_(),), eps=1e-7, atol=1e-5, rtol=1e-5)


def test_discrete_vp_refuses_a_bad_table() -> None:
    for bad in (vector(0.9), vector(0.9, 0.95), vector(1.0, 0.5), vector(0.5, 0.0), vector(0.5, 0.5)):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            DiscreteVP(bad)


def test_discrete_vp_keeps_to_its_table() -> None:
    assert VP.time_from_ratio(vector(1e-9, 1e9)).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_multiplies_the_ratio(shift: float) -> None:
    """``t = s u / (1 + (s - 1) u)`` is the time whose ratio is s times that of u; the process is unchanged."""
    flow = RectifiedFlow(shift=shift, t_min=0.0, t_max=1.0)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(flow.ratio(flow.spaced(u)), shift * u / (1 - u), rtol=1e-12)
    assert torch.equal(flow.sigma(u), RectifiedFlow().sigma(u))
    with pytest.raises(ValueError, match="shift"):
        RectifiedFlow(shift=0)


def test_karras_grid() -> None:
    """Eq. 5 with rho = 7 at N = 4, from the largest noise down."""
    found = EDM().spaced(torch.tensor([1, 2 / 3, 1 / 3, 0], dtype=torch.float64))
    n = torch.arange(4, dtype=torch.float64)
    expected = (80 ** (1 / 7) + n / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(found, expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- parameterization


@every_process
@pytest.mark.parametrize("kind", KINDS)
def test_parameterizations_round_trip(kind: Prediction, process: Process) -> None:
    t = process.spaced(torch.linspace(0.2, 0.8, 6, dtype=torch.float64))
    x0, eps = noise(6, 2, 3, 3, seed=2), noise(6, 2, 3, 3, seed=3)
    a, s = expand_to(process.alpha(t), x0), expand_to(process.sigma(t), x0)
    x_t = process.add_noise(x0, eps, t)
    prediction = from_x0(kind, x0, x_t, a, s)
    scale = 1 + s / a + a / s  # what one rounding can be magnified by
    assert float(((to_x0(kind, prediction, x_t, a, s) - x0).abs() / scale).max()) <= 1e-12
    assert float(((to_eps(kind, prediction, x_t, a, s) - eps).abs() / scale).max()) <= 1e-12
    wanted = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": eps - x0}[kind]
    assert float(((prediction - wanted).abs() / scale**2).max()) <= 1e-12


@every_process
@pytest.mark.parametrize("kind", KINDS)
def test_any_prediction_reads_as_an_x0_and_an_eps_that_make_x_t(kind: Prediction, process: Process) -> None:
    """Also for predictions that are wrong, ``alpha x0 + sigma eps = x_t``."""
    t = process.spaced(torch.linspace(0.2, 0.8, 6, dtype=torch.float64))
    x_t, prediction = noise(6, 2, 3, 3, seed=4), noise(6, 2, 3, 3, seed=5)
    a, s = expand_to(process.alpha(t), x_t), expand_to(process.sigma(t), x_t)
    x0, eps = to_x0(kind, prediction, x_t, a, s), to_eps(kind, prediction, x_t, a, s)
    scale = 1 + s / a + a / s
    assert float(((a * x0 + s * eps - x_t).abs() / scale**2).max()) <= 1e-12


def test_score_is_the_gradient_of_the_log_density() -> None:
    """Tweedie's formula, and a check of the tests' own mixtures."""
    mixture = Mixture.line(vector(0.3, 0.7), vector(-1, 0.6), vector(0.2, 0.5))
    x = noise(50, 1, seed=6).requires_grad_()
    a, s = torch.full((50,), 0.8).double(), torch.linspace(0.1, 3, 50, dtype=torch.float64)
    (expected,) = torch.autograd.grad(mixture.log_density(x, a, s).sum(), x)
    x = x.detach()
    found = score_from_x0(mixture.denoise(x, a, s), x, a[:, None], s[:, None])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.allclose(mixture.score(x, a, s), expected, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ denoisers


class Predicting(nn.Module):
    """The exact denoiser of N(MEAN, STD^2), in the form that a network of this kind predicts."""

    def __init__(self, process: Process, kind: Prediction) -> None:
        super().__init__()
        self.exact, self.process = ExactNetwork(gaussian(), process), process
        self.kind: Prediction = kind

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        a, s = expand_to(self.process.alpha(t), x_t), expand_to(self.process.sigma(t), x_t)
        return from_x0(self.kind, self.exact(x_t, t, cond), x_t, a, s)


@every_process
@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_reads_every_kind(kind: Prediction, process: Process) -> None:
    t = process.spaced(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    x_t = process.add_noise(MEAN + STD * noise(9, 1, 1, 1), noise(9, 1, 1, 1, seed=1), t)
    found = Denoiser(Predicting(process, kind), process, kind).denoise(x_t, t, Condition())
    expected = gaussian().denoise(x_t.flatten(1), process.alpha(t), process.sigma(t))
    assert torch.allclose(found.flatten(1), expected, rtol=1e-8, atol=1e-9)


class Recording(nn.Module):
    """Returns a fixed answer and keeps its inputs."""

    def __init__(self, answer: float):
        super().__init__()
        self.answer, self.seen = answer, list[tuple[Tensor, Tensor, Condition]]()

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.seen.append((x, t, cond))
        return torch.full_like(x, self.answer)


@every_process
def test_edm_preconditioning(process: Process) -> None:
    """Table 1 of Karras et al. at the ratio sigma / alpha, whatever the process."""
    sigma_data, network = 0.7, Recording(0.4)
    t = process.spaced(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    x_t = noise(9, 1, 2, 2)
    found = Denoiser(network, process, "edm", sigma_data).denoise(x_t, t, Condition())
    ((seen_x, seen_t, _),) = network.seen
    y, r = x_t / expand_to(process.alpha(t), x_t), expand_to(process.ratio(t), x_t)
    c_skip, c_out = sigma_data**2 / (r**2 + sigma_data**2), r * sigma_data / (r**2 + sigma_data**2).sqrt()
    assert torch.allclose(seen_x, y / (r**2 + sigma_data**2).sqrt(), rtol=1e-12)
    assert torch.allclose(seen_t, process.ratio(t).log() / 4, rtol=1e-12)
    assert torch.allclose(found, c_skip * y + c_out * 0.4, rtol=1e-12)


@pytest.mark.parametrize("outer", [TrigFlow(), TrigFlow(sigma_data=1.0), EDM()], ids=["trig", "trig1", "edm"])
@pytest.mark.parametrize(
    ("inner", "kind"),
    [(RectifiedFlow(), "velocity"), (VP, "eps"), (VP, "v"), (EDM(), "x0")],
    ids=lambda value: str(value) if isinstance(value, str) else type(value).__name__,
)
def test_a_teacher_seen_through_another_process_stays_exact(inner: Process, kind: Prediction, outer: Process) -> None:
    t = outer.time_from_ratio(torch.logspace(-1, 1, 21, dtype=torch.float64))
    x_t = outer.add_noise(MEAN + STD * noise(21, 1, 1, 1), noise(21, 1, 1, 1, seed=1), t)
    teacher = Reparameterized(Denoiser(Predicting(inner, kind), inner, kind), outer)
    expected = gaussian().denoise(x_t.flatten(1), outer.alpha(t), outer.sigma(t))
    assert float((teacher.denoise(x_t, t, Condition()).flatten(1) - expected).abs().max()) <= 1e-8


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.75, 5.0])
def test_guidance_combines_both_answers(scale: float) -> None:
    """``x0(null) + scale (x0(cond) - x0(null))``; the unconditional answer here is larger by 0.25."""
    network = ExactNetwork(gaussian(), EDM(), shift=0.25)
    denoiser = Denoiser(network, EDM(), "x0")
    x_t, t = noise(4, 1, 1, 1), vector(0.1, 1, 2, 5)
    calls: list[int] = []
    network.features.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    found = Guided(denoiser, scale).denoise(x_t, t, classes(4))
    assert calls == ([4] if scale == 1 else [8])
    plain, null = denoiser.denoise(x_t, t, classes(4)), denoiser.denoise(x_t, t, classes(4, NULL_CLASS))
    assert torch.allclose(null - plain, torch.full_like(plain, 0.25), rtol=1e-12)
    assert torch.allclose(found, null + scale * (plain - null), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_features_are_the_conditional_ones_and_carry_the_gradient(scale: float) -> None:
    guided = Guided(Denoiser(ExactNetwork(gaussian(2), EDM(), shift=0.25), EDM(), "x0"), scale)
    x_t, t = noise(4, 2, 1, 1).requires_grad_(), vector(0.1, 1, 2, 5)
    x0, (features,) = guided.denoise_and_features(x_t, t, classes(4), ["features"])
    assert not x0.requires_grad and torch.allclose(x0, guided.denoise(x_t, t, classes(4)).detach())
    expected = torch.cat([x_t.flatten(1) / (1 + t[:, None] ** 2).sqrt(), t.log()[:, None]], 1)
    assert features.shape == (4, 3) and torch.allclose(features, expected)
    (slope,) = torch.autograd.grad(features[:, :2].sum(), x_t)
    assert torch.allclose(slope.flatten(1), (1 / (1 + t**2).sqrt())[:, None].expand(4, 2))
    assert torch.is_grad_enabled()


def test_features_stop_behind_the_last_tap_and_unknown_taps_are_named() -> None:
    denoiser = Denoiser(ExactNetwork(gaussian(2), EDM()), EDM(), "x0")
    (features,) = denoiser.features(noise(3, 2, 1, 1), vector(1, 1, 1), Condition(), ["features"])
    assert features.shape == (3, 3)
    with pytest.raises(ValueError, match="nowhere"):
        denoiser.features(noise(3, 2, 1, 1), vector(1, 1, 1), Condition(), ["nowhere"])


# ------------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    "process",
    [EDM(), EDM(sigma_max=20), RectifiedFlow(t_max=0.98), TrigFlow(t_max=1.5)],
    ids=lambda process: type(process).__name__,
)
def test_heun_converges_to_the_exact_map_with_second_order(process: Process) -> None:
    """The flow of N(m, v^2) keeps ``(y - m) / sqrt(v^2 + rho^2)``; the last step denoises at rho_min."""
    denoiser = Denoiser(ExactNetwork(gaussian(2), process), process, "x0")
    z = noise(64, 2, 1, 1, seed=7)
    ends = process.ratio(vector(process.t_min, process.t_max))
    low, high = float(ends[0]), float(ends[1])
    exact = MEAN + (high * z - MEAN) * STD**2 / math.sqrt((STD**2 + low**2) * (STD**2 + high**2))
    errors = [float((heun(denoiser, z, Condition(), steps) - exact).abs().max()) for steps in (16, 32, 64)]
    assert errors[-1] <= 0.01
    for coarse, fine in pairwise(errors):
        assert 3.2 <= coarse / fine <= 5.5, errors


def test_heun_with_one_step_denoises_at_the_highest_noise() -> None:
    process = EDM()
    denoiser = Denoiser(ExactNetwork(gaussian(2), process), process, "x0")
    z = noise(8, 2, 1, 1)
    expected = gaussian(2).denoise(80 * z.flatten(1), 1.0, 80.0)
    assert torch.allclose(heun(denoiser, z, Condition(), 1).flatten(1), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_heun_calls_the_network_twice_a_step_less_one(steps: int) -> None:
    network = Recording(0.5)
    heun(Denoiser(network, RectifiedFlow(), "x0"), noise(2, 1, 1, 1), Condition(), steps)
    assert len(network.seen) == 2 * steps - 1


def test_heun_through_another_process_ends_at_the_same_place() -> None:
    flow = RectifiedFlow(t_max=0.98)
    teacher = Denoiser(ExactNetwork(gaussian(2), flow), flow, "x0")
    trig = TrigFlow(t_min=math.atan(0.001 / 0.5), t_max=math.atan(49 / 0.5))
    z = noise(16, 2, 1, 1, seed=8)
    found, expected = heun(Reparameterized(teacher, trig), z, Condition(), 128), heun(teacher, z, Condition(), 128)
    assert float((found - expected).abs().max()) <= 5e-3


@pytest.mark.parametrize("times", [(), (1.0,), (1.0, 0.4), (1.0, 0.4, 0.1)])
def test_a_perfect_student_stays_at_its_point(times: tuple[float, ...]) -> None:
    network = Recording(0.37)
    student = OneStepStudent(Denoiser(network, EDM(), "x0"), 2.5)
    z, fresh = noise(3, 1, 2, 2).float(), [noise(3, 1, 2, 2, seed=10 + i).float() for i in range(3)]
    supply = iter(fresh)
    found = student.generate(z, classes(3), times, lambda: next(supply))
    assert torch.equal(found, torch.full_like(z, 0.37))
    assert len(network.seen) == 1 + len(times) and len(list(supply)) == 3 - len(times)
    assert torch.allclose(network.seen[0][0], 2.5 * z) and torch.equal(student(z, classes(3)), found)
    for (x_t, t, cond), time, eps in zip(network.seen[1 : 1 + len(times)], times, fresh, strict=False):
        assert torch.allclose(x_t, 0.37 + time * eps) and torch.allclose(t, torch.full((3,), time))
        assert cond.class_ids is not None


def test_steps_use_fresh_noise_of_their_own_by_default() -> None:
    network = Recording(0.0)
    OneStepStudent(Denoiser(network, EDM(), "x0"), 2.5).generate(torch.ones(2, 1, 8, 8), classes(2), (1.0, 0.5))
    first, second = network.seen[1][0], network.seen[2][0] / 0.5
    assert not torch.allclose(first, second) and not torch.allclose(first, torch.ones_like(first))


@pytest.mark.parametrize("times", [(2.5,), (3.0,), (1.0, 1.0), (0.5, 1.0)])
def test_step_times_must_fall(times: tuple[float, ...]) -> None:
    network = Recording(0.0)
    student = OneStepStudent(Denoiser(network, EDM(), "x0"), 2.5)
    with pytest.raises(ValueError, match="must fall"):
        student.generate(torch.zeros(2, 1, 1, 1), classes(2), times)
    assert not network.seen


def test_the_student_scales_its_noise_by_its_processs_sigma() -> None:
    make: list[Callable[[], Process]] = [EDM, RectifiedFlow, TrigFlow]
    for process in (build() for build in make):
        network = Recording(0.0)
        OneStepStudent(Denoiser(network, process, "x0"), 0.9)(torch.ones(2, 1, 1, 1), classes(2))
        sigma = process.sigma(torch.tensor([0.9, 0.9])).reshape(2, 1, 1, 1)
        assert torch.allclose(network.seen[0][0], sigma)
        assert network.seen[0][1].dtype == torch.float32


def test_clipped_samples_take_the_gradient_that_leads_back() -> None:
    """Above 1 only a gradient that lowers the sample passes, below -1 only one that raises it; inside all do."""
    offset = torch.nn.Parameter(torch.tensor([-1.5, -1.5, -1.0, 0.3, 1.0, 1.5, 1.5]).view(7, 1, 1, 1))
    denoiser = Denoiser(lambda x, t, cond: 0 * x + offset, RectifiedFlow(), "x0")  # type: ignore[arg-type]
    z, push = torch.zeros(7, 1, 1, 1), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0]).view(7, 1, 1, 1)
    x0 = OneStepStudent(denoiser, 0.9, clip=True)(z, Condition())
    assert x0.flatten().tolist() == pytest.approx([-1, -1, -1, 0.3, 1, 1, 1])
    (x0 * push).sum().backward()
    assert offset.grad is not None and offset.grad.flatten().tolist() == [0, -1, 1, 1, -1, 1, 0]
    assert OneStepStudent(denoiser, 0.9)(z, Condition()).flatten()[0] == -1.5
