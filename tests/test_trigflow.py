"""The TrigFlow view of a teacher: conversion, ODE endpoints, time range and derivatives."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser, Guided, Reparameterized
from models.derivatives import disagreement, jvp
from models.parameterization import from_x0
from models.process import EDM, DiscreteVP, Process, RectifiedFlow, TrigFlow, expand_to
from models.student import OneStepStudent, heun
from models.trigflow import FlowStudent, LogVariance, TrigFlowView, trigflow_for
from tests.analytic import ExactNetwork, Mixture, vector

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
TEACHERS: list[tuple[Process, str]] = [
    (RectifiedFlow(), "velocity"),
    (VP, "eps"),
    (VP, "v"),
    (EDM(), "x0"),
    (RectifiedFlow(), "x0"),
    (EDM(), "edm"),
]
SIGMA_DATA = 0.5
every_teacher = pytest.mark.parametrize(
    ("inner", "kind"), TEACHERS, ids=[f"{type(process).__name__}-{kind}" for process, kind in TEACHERS]
)
both_conventions = pytest.mark.parametrize("scale", [1.0, SIGMA_DATA], ids=["x0=y0", "x0=sd*y0"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Field(nn.Module):
    """A random smooth network, float64: no denoiser of anything."""

    def __init__(self, seed: int = 0, dimensions: int = 4):
        super().__init__()
        self.enter, self.leave = noise(dimensions + 1, 48, seed=seed) / 3, noise(48, dimensions, seed=seed + 1) / 7
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.seen.append(t)
        shift = 0 if cond.class_ids is None else expand_to(0.3 * cond.class_ids.to(x), x)
        time = t if float(t.max()) < 2 else (t + 1).log() / 3
        inputs = torch.cat([x.flatten(1), time[:, None]], 1)
        return (torch.tanh(inputs @ self.enter.to(x)) @ self.leave.to(x)).reshape(x.shape) + shift


class Answer(nn.Module):
    """Says of every input what a network of ``kind`` says of one pair of data and noise."""

    def __init__(self, process: Process, kind: str, x0: Tensor, eps: Tensor):
        super().__init__()
        self.process, self.kind, self.x0, self.eps = process, kind, x0, eps

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if self.kind == "edm":
            r, sd = expand_to((4 * t).exp(), x), SIGMA_DATA
            y = self.x0 + r * self.eps
            total = r**2 + sd**2
            return (self.x0 - sd**2 / total * y) / (r * sd / total.sqrt())
        a, s = expand_to(self.process.alpha(t), x), expand_to(self.process.sigma(t), x)
        assert torch.allclose(x, a * self.x0 + s * self.eps, rtol=1e-9, atol=1e-10)
        return from_x0(self.kind, self.x0, x, a, s)  # type: ignore[arg-type]


def view_of(inner: Process, kind: str, scale: float, network: nn.Module) -> TrigFlowView:
    return TrigFlowView(Denoiser(network, inner, kind, SIGMA_DATA), SIGMA_DATA, scale)  # type: ignore[arg-type]


def times(view: TrigFlowView, count: int = 33) -> Tensor:
    return torch.linspace(view.process.t_min, view.process.t_max, count, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- conversion


@both_conventions
@every_teacher
def test_f_is_exact_over_the_whole_range(inner: Process, kind: str, scale: float) -> None:
    x0, eps = noise(33, 4, 1, 1), noise(33, 4, 1, 1, seed=1)
    view = view_of(inner, kind, scale, Answer(inner, kind, x0, eps))
    t = times(view)
    x_t = view.process.add_noise(x0, eps, t)
    sine, cosine = expand_to(t.sin(), x0), expand_to(t.cos(), x0)
    assert torch.allclose(x_t, cosine * scale * x0 + sine * SIGMA_DATA * eps, rtol=1e-14)
    f = view.velocity(x_t, t, Condition())
    expected = cosine * eps - sine * scale / SIGMA_DATA * x0
    assert float((f - expected).abs().max()) <= 1e-10
    found = view.denoise(x_t, t, Condition())
    assert float((found - x0).abs().max()) <= 1e-10


@both_conventions
@every_teacher
def test_of_any_prediction_it_denoises_as_the_teacher_does(inner: Process, kind: str, scale: float) -> None:
    view = view_of(inner, kind, scale, Field())
    t, x = times(view), noise(33, 4, 1, 1, seed=2)
    expected = Reparameterized(view.denoiser, view.process).denoise(x, t, Condition())
    size = 1 / view.process.alpha(t).min() if kind == "eps" else 1.0
    assert float((view.denoise(x, t, Condition()) - expected).abs().max()) <= 1e-10 * size


def test_sanas_proposition_3_1() -> None:
    """``F = [(1 - 2s) y + (1 - 2s + 2s^2) v(y, s)] / sqrt(s^2 + (1-s)^2)``, s = sin t / (sin t + cos t)."""
    network = Field()
    view = view_of(RectifiedFlow(), "velocity", SIGMA_DATA, network)
    t, x_t = times(view), noise(33, 4, 1, 1, seed=3)
    s = expand_to(t.sin() / (t.sin() + t.cos()), x_t)
    root = (s**2 + (1 - s) ** 2).sqrt()
    y = root * x_t / SIGMA_DATA
    v = network(y, s.flatten(), Condition())
    expected = ((1 - 2 * s) * y + (1 - 2 * s + 2 * s**2) * v) / root
    assert float((view.velocity(x_t, t, Condition()) - expected).abs().max()) <= 1e-12


def test_v_prediction_of_a_variance_preserving_teacher_is_f() -> None:
    network = Field()
    view = view_of(VP, "v", SIGMA_DATA, network)
    t, x_t = times(view), noise(33, 4, 1, 1, seed=3)
    index = VP.time_from_ratio(t.tan())
    assert torch.allclose(view.velocity(x_t, t, Condition()), network(x_t / SIGMA_DATA, index, Condition()), rtol=1e-9)


def runge_kutta(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: float, end: float, steps: int) -> Tensor:
    h = (end - start) / steps
    for i in range(steps):
        t = torch.full((len(x),), start + i * h, dtype=torch.float64)
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, t + h))
    return x


@both_conventions
@pytest.mark.parametrize(("inner", "kind"), TEACHERS[:1] + TEACHERS[4:])
def test_ode_endpoints_agree_for_a_random_field(inner: Process, kind: str, scale: float) -> None:
    """The teacher's own equation and TrigFlow's, from the same noise to the same noise level, in each's own time."""
    view = view_of(inner, kind, scale, Field())
    start, end = vector(0.3, 1.3)
    first, last = inner.time_from_ratio(view.process.ratio(torch.stack([start, end]))).tolist()
    z = noise(6, 4, 1, 1, seed=4)

    def own(y: Tensor, s: Tensor) -> Tensor:
        a, b = expand_to(inner.alpha(s), y), expand_to(inner.sigma(s), y)
        x0 = view.denoiser.denoise(y, s, Condition())
        eps = (y - a * x0) / b
        return eps - x0 if isinstance(inner, RectifiedFlow) else eps

    trig = lambda x, t: SIGMA_DATA * view.velocity(x, t, Condition())
    through = runge_kutta(trig, view.process.sigma(end) * z, float(end), float(start), 400)
    within = runge_kutta(own, inner.sigma(vector(last)) * z, last, first, 400)
    back = view.process.alpha(start) / inner.alpha(vector(first)) * within
    assert float((through - back).abs().max()) <= 1e-10


@both_conventions
def test_the_flow_through_the_view_is_what_heun_finds(scale: float) -> None:
    """Samplers of the house take the view as any other denoiser; the solution for a Gaussian is known."""
    exact = ExactNetwork(Mixture.gaussian(0.3, 0.6), RectifiedFlow())
    view = TrigFlowView(Denoiser(exact, RectifiedFlow(), "x0"), SIGMA_DATA, scale)
    z = noise(32, 1, 1, 1, seed=5)
    low, high = view.process.ratio(vector(view.process.t_min, view.process.t_max)).tolist()
    expected = 0.3 + (high * z - 0.3) * 0.36 / math.sqrt((0.36 + low**2) * (0.36 + high**2))
    errors = [float((heun(view, z, Condition(), steps) - expected).abs().max()) for steps in (32, 64)]
    assert errors[1] <= 1e-3 and errors[0] / errors[1] >= 3


# ---------------------------------------------------------------------------------------------- times and their range


def test_the_range_is_the_teachers() -> None:
    assert trigflow_for(VP, 0.5, 0.5).t_max == pytest.approx(math.atan(14.6146), abs=1e-4)
    assert trigflow_for(VP, 0.5, 1.0).t_max == pytest.approx(math.atan(2 * 14.6146), abs=1e-4)
    assert trigflow_for(EDM(), 0.5).t_max == pytest.approx(math.atan(160), abs=1e-9)
    whole = trigflow_for(RectifiedFlow(t_min=0.0, t_max=1.0), 0.5, 0.5)
    assert (whole.t_min, whole.t_max) == (1e-3, math.pi / 2 - 1e-4)
    with pytest.raises(ValueError, match="positive"):
        TrigFlow(0.5, data_scale=0.0)


@every_teacher
def test_no_network_is_asked_outside_its_own_range(inner: Process, kind: str) -> None:
    network = Field()
    view = view_of(inner, kind, SIGMA_DATA, network)
    x, t = noise(3, 4, 1, 1), torch.tensor([0.0, 1.5707964, 3.0])
    f, x0 = view.velocity(x.float(), t, Condition()), view.denoise(x.float(), t, Condition())
    assert bool(f.isfinite().all()) and torch.allclose(x0[0], x[0].float() / SIGMA_DATA)
    asked = network.seen[0].exp().pow(4) if kind == "edm" else network.seen[0]
    slack = 1e-5 * inner.t_max
    assert inner.t_min - slack <= float(asked.min()) and float(asked.max()) <= inner.t_max + slack
    assert torch.equal(f[1:2], view.velocity(x[1:2].float(), torch.tensor([view.process.t_max]), Condition()))


def test_times_are_never_less_than_float32() -> None:
    """Neither lower types nor a network in low precision may round a time: 1.5683 and pi / 2 are one in bfloat16."""
    network = Field()
    view = view_of(RectifiedFlow(t_max=1.0), "velocity", SIGMA_DATA, network)
    x = noise(2, 4, 1, 1)
    for low in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match="float32 or float64"):
            view.velocity(x, torch.tensor([1.5683, 1.57], dtype=low), Condition())
    t = torch.tensor([1.5683, 1.57])
    with torch.autocast("cpu", torch.bfloat16):
        view.velocity(x.bfloat16(), t, Condition())
    view.velocity(x.float(), t, Condition())
    for seen in network.seen:
        assert seen.dtype == torch.float32
        assert torch.allclose(seen, t.sin() / (t.sin() + t.cos()), rtol=1e-6) and seen[0] != seen[1]


@both_conventions
@every_teacher
def test_forward_derivatives_are_those_of_differences(inner: Process, kind: str, scale: float) -> None:
    """Also at the last time, where a clamp would lose the tangent; of a discrete table between two entries."""
    view = view_of(inner, kind, scale, Field())
    p = view.process
    t = torch.cat([torch.linspace(max(0.1, 2 * p.t_min), 0.97 * p.t_max, 9, dtype=torch.float64), vector(p.t_max)])
    if isinstance(inner, DiscreteVP):
        index = inner.time_from_ratio(p.ratio(t)).floor().clamp(max=998) + 0.5
        t = torch.cat([p.time_from_ratio(inner.ratio(index[:-1])), vector(p.t_max)])
    x, dx, dt = noise(10, 4, 1, 1), noise(10, 4, 1, 1, seed=1), noise(10, seed=2)
    field = lambda x, t: view.velocity(x, t, Condition())
    value, derivative = jvp(field, (x, t), (dx, dt))
    h = 1e-6 if kind != "edm" else 1e-7
    moved = lambda k: field(x + k * dx, t + k * dt)
    central, ahead = (moved(h) - moved(-h)) / (2 * h), (moved(0) - moved(-h * dt.sign()[-1])) / (h * dt.sign()[-1])
    assert torch.equal(value, field(x, t))
    for i in range(10):
        assert float(disagreement(derivative[i], central[i] if i < 9 else ahead[i])) <= (1e-5 if i < 9 else 1e-3), i


# ------------------------------------------------------------------------------------------------- guidance and student


def test_guidance_by_sample_commutes_with_the_conversion() -> None:
    network = Field()
    plain = Denoiser(network, RectifiedFlow(), "velocity")
    w, cond = vector(1.0, 4.0, 4.5, 5.0), Condition(class_ids=torch.tensor([0, 1, 2, 3]))
    x, t = noise(4, 4, 1, 1), vector(0.2, 0.7, 1.2, 1.5)
    single = TrigFlowView(plain, SIGMA_DATA, SIGMA_DATA)
    conditional, null = single.velocity(x, t, cond), single.velocity(x, t, cond.null())
    calls = len(network.seen)
    guided = TrigFlowView(Guided(plain, None), SIGMA_DATA, SIGMA_DATA)
    found = guided.velocity(x, t, Condition(class_ids=cond.class_ids, guidance=w))
    assert len(network.seen) == calls + 1
    assert torch.allclose(found, null + expand_to(w, x) * (conditional - null), rtol=1e-10)
    fixed = TrigFlowView(Guided(plain, 4.5), SIGMA_DATA, SIGMA_DATA).velocity(x, t, cond)
    assert torch.allclose(fixed, null + 4.5 * (conditional - null), rtol=1e-10)
    with pytest.raises(ValueError, match="no guidance scales"):
        guided.velocity(x, t, cond)


def test_the_student_steps_as_scms_scheduler() -> None:
    """``x <- cos t x0 + sin t sigma_d z`` for one to four steps, the result in the units of the data."""
    view = view_of(RectifiedFlow(), "velocity", SIGMA_DATA, Field())
    z, fresh = noise(5, 4, 1, 1), [noise(5, 4, 1, 1, seed=i) for i in (1, 2, 3)]
    for ladder in ([1.5683], [1.5683, 1.3], [1.5683, 1.3, 1.1, 0.6]):
        x, x0 = SIGMA_DATA * math.sin(ladder[0]) * z, z
        for i, t in enumerate(ladder):
            f = view.velocity(x, torch.full((5,), t), Condition())
            x0 = math.cos(t) * x - math.sin(t) * SIGMA_DATA * f
            if i + 1 < len(ladder):
                x = math.cos(ladder[i + 1]) * x0 + math.sin(ladder[i + 1]) * SIGMA_DATA * fresh[i]
        supply = iter(fresh)
        student = OneStepStudent(view, ladder[0])  # type: ignore[arg-type]
        found = student.generate(z, Condition(), ladder[1:], lambda supply=supply: next(supply))
        assert torch.allclose(found, x0 / SIGMA_DATA, atol=1e-6)


def test_nu_starts_at_zero_and_stays_above_its_floor() -> None:
    floor = -math.log(3072) - 2
    nu = LogVariance(floor)
    t = torch.tensor([1e-4, 0.5, 1.2, math.pi / 2 - 1e-4])
    assert float(nu(t).abs().max()) <= 1e-3
    nn.init.constant_(nu.linear.bias, -1e4)
    assert bool((nu(t) >= floor).all()) and bool(nu(t).isfinite().all())
    f, value = FlowStudent(view_of(RectifiedFlow(), "velocity", 1.0, Field()), nu)(
        noise(4, 4, 1, 1).float(), t, Condition()
    )
    assert f.shape == (4, 4, 1, 1) and value.shape == (4,)
