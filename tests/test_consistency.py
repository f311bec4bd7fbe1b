"""sCM and LADD: the losses in closed form, the method on a mixture in the plane, and defects that others have."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill import consistency_losses as losses
from distill.data import Batch
from distill.methods.base import Turn
from distill.methods.consistency import ConsistencyDistillation
from distill.noise_levels import LogNormal
from distill.settings import LADD, Consistency
from distill.total_derivative import total_derivative
from models.condition import Condition
from models.denoiser import Denoiser
from models.derivatives import jvp
from models.discriminator import TokenDiscriminator, feature_channels
from models.errors import UserError
from models.process import RectifiedFlow, TrigFlow
from models.seeds import Draws, mix
from models.student import heun
from models.teachers.embedded import PatchUNet
from models.trigflow import FlowStudent, LogVariance, TrigFlowView
from tests.analytic import ExactNetwork, Mixture

SIGMA_DATA = 0.5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(x: Tensor, t: Tensor) -> Tensor:
    """A random smooth F of points (B, 3)."""
    return torch.tanh(torch.cat([x, t[:, None]], 1) @ randn(4, 32, seed=8)) @ randn(32, 3, seed=9) / 4


def answer(x: Tensor, t: Tensor) -> Tensor:
    """The consistency function of ``field``."""
    return t.cos()[:, None] * x - SIGMA_DATA * t.sin()[:, None] * field(x, t)


# ------------------------------------------------------------------------------------------------------------- losses


def points() -> tuple[Tensor, Tensor, Tensor]:
    return randn(64, 3), torch.linspace(1e-3, math.pi / 2 - 1e-4, 64, dtype=torch.float64), randn(64, 3, seed=1)


def test_the_whole_tangent_is_cos_t_times_the_answers_derivative() -> None:
    """At r = 1, by forward mode and by differences; at r = 0 it is the direction of plain flow matching."""
    x, t, d = points()
    value, total = total_derivative(field, x, t, d, "jvp", 0.02, 1.57)
    g = losses.tangent(x, t, value, total, d, SIGMA_DATA)
    _, exact = jvp(answer, (x, t), (d, torch.ones_like(t)))
    cosine = t.cos()[:, None]
    assert float((g - cosine * exact).abs().max()) <= 1e-13
    h = 1e-5
    central = (answer(x + h * d, t + h) - answer(x - h * d, t - h)) / (2 * h)
    assert float((g - cosine * central).abs().max()) <= 1e-8
    plain = losses.tangent(x, t, value, total, d, SIGMA_DATA, warmup=0.0)
    assert torch.allclose(plain, -(cosine**2) * (SIGMA_DATA * value - d), rtol=1e-14)
    half = losses.tangent(x, t, value, total, d, SIGMA_DATA, warmup=torch.tensor(0.5))
    assert torch.allclose(half, (g + plain) / 2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("mode", "order"), [("central", 2), ("backward", 1)])
def test_finite_difference_tangents_go_along_the_teacher(mode: str, order: int) -> None:
    x, _, d = points()
    t = torch.linspace(0.2, 1.4, 64, dtype=torch.float64)
    _, exact = total_derivative(field, x, t, d, "jvp", 0.02, 1.57)
    errors = []
    for h in (0.04, 0.02):
        _, found = total_derivative(field, x, t, d, mode, h, 1.57)  # type: ignore[arg-type]
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] <= 0.1 and errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    _, elsewhere = total_derivative(field, x, t, randn(64, 3, seed=2), mode, 0.02, 1.57)  # type: ignore[arg-type]
    assert float((elsewhere - exact).norm() / exact.norm()) >= 0.5


def test_the_training_direction_is_the_distillation_direction_on_average() -> None:
    """``E[cos t z - sin t x0 | x_t]`` is the exact teacher's velocity, for N(0, v^2) data a known line."""
    v, t = 0.7, torch.full((400_000,), 0.8, dtype=torch.float64)
    x0, z = v * randn(400_000, 1), SIGMA_DATA * randn(400_000, 1, seed=1)
    x = t.cos()[:, None] * x0 + t.sin()[:, None] * z
    d = losses.path_velocity(x0, z, t)
    assert torch.allclose(
        d, jvp(lambda t: t.cos()[:, None] * x0 + t.sin()[:, None] * z, (t,), (torch.ones_like(t),))[1]
    )
    slope = float((d * x).mean() / (x * x).mean())
    c, s = math.cos(0.8), math.sin(0.8)
    assert slope == pytest.approx(c * s * (SIGMA_DATA**2 - v**2) / ((c * v) ** 2 + (s * SIGMA_DATA) ** 2), abs=3e-3)


def test_norms() -> None:
    g = randn(4, 3, 2, 2)
    g[3] = 0
    length = g.flatten(1).norm(dim=1).reshape(4, 1, 1, 1)
    assert torch.allclose(losses.normalize_tangent(g), g / (length + 0.1))
    assert torch.allclose(losses.normalize_tangent(g, 0.3, "rms"), g / (length / math.sqrt(12) + 0.3))
    assert torch.equal(losses.normalize_tangent(g, norm="none"), g)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_heads_gradient(adaptive: bool) -> None:
    """``<-2 w e^-nu g, grad F> / D`` for the network, ``1 - w e^-nu mean g^2`` for nu; the value is mean g^2."""
    weights, x, t = randn(4, 3, seed=3).requires_grad_(), randn(6, 3), torch.linspace(0.2, 1.5, 6).double()
    g, w = randn(6, 3, seed=4), losses.prior_weight(t, SIGMA_DATA)
    nu = randn(6, seed=5).requires_grad_() if adaptive else None
    f = torch.tanh(torch.cat([x, t[:, None]], 1) @ weights)
    loss = losses.consistency_loss(f, g, w, nu)
    scale = w * (-nu).exp().detach() if nu is not None else w
    assert torch.allclose(loss.detach(), scale * (g**2).mean(1) + (nu.detach() if nu is not None else 0))
    found = torch.autograd.grad(loss.sum(), [weights] + ([nu] if nu is not None else []), retain_graph=True)
    (expected,) = torch.autograd.grad((-2 * scale[:, None] * g * f).sum() / 3, weights)
    assert torch.allclose(found[0], expected, rtol=1e-12)
    if nu is not None:
        assert torch.allclose(found[1], 1 - scale * (g**2).mean(1), rtol=1e-12)
    assert torch.allclose(w, 1 / (SIGMA_DATA * t.tan()), rtol=1e-12)


@pytest.mark.parametrize(("norm", "bound"), [("l2", -math.log(12)), ("rms", 0.0)])
def test_the_floor_of_nu_lies_below_what_a_bad_student_needs(norm: losses.Norm, bound: float) -> None:
    """nu's optimum is ``ln(w mean g^2)``; a tangent far from zero has it at -ln D or 0, the floor is e^2 below."""
    floor = losses.nu_floor(norm, 12)
    g = losses.normalize_tangent(1e6 * randn(5, 12), norm=norm)
    assert torch.allclose((g**2).mean(1).log(), torch.tensor(bound).double(), atol=1e-6)
    assert floor == pytest.approx(bound - 2)
    nu = LogVariance(floor)
    optimizer = torch.optim.Adam(nu.parameters(), 0.5)
    t = torch.linspace(0.1, 1.5, 5)
    for _ in range(100):
        optimizer.zero_grad()
        losses.consistency_loss(torch.zeros(5, 12), 1e-6 * randn(5, 12).float(), 1.0, nu(t)).mean().backward()
        optimizer.step()
    assert bool((nu(t).detach() >= floor).all()) and float(nu(t).detach().max()) <= floor + 1


def test_hinge() -> None:
    real, fake, counts = torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.0], [3.0, 1.0]]), torch.tensor([1.0, 0.0])
    assert losses.hinge_generator(fake).tolist() == [1.0, -2.0]
    assert float(losses.hinge_discriminator(real, fake, counts)) == pytest.approx(0.5 * (0.25 + 0.5))
    assert float(losses.hinge_discriminator(real, fake, torch.ones(2))) == pytest.approx(0.5 * (0.25 + 1.75))
    assert float(losses.hinge_discriminator(real, fake, torch.zeros(2))) == pytest.approx(0.125)


@pytest.mark.parametrize("count", [2, 3, 9, 11, 17])
def test_misaligned_pairs_of_odd_and_even_batches(count: int) -> None:
    x0, text = randn(count, 1, 2, 2), randn(count, 3, 4)
    rolled, differs = losses.misaligned(x0, Condition(text=text))
    assert torch.equal(rolled[0], x0[-1]) and torch.equal(rolled[1:], x0[:-1]) and bool((differs == 1).all())
    same = Condition(class_ids=torch.zeros(count).long())
    assert not losses.misaligned(x0, same)[1].any() and not losses.misaligned(x0, Condition())[1].any()
    same.class_ids[0] = 1  # type: ignore[index]
    assert losses.misaligned(x0, same)[1].tolist() == [1.0, 1.0, *[0.0] * (count - 2)]


def test_separation_is_the_area_under_the_curve():
    column = lambda *values: torch.tensor(values)[:, None].expand(-1, 3)
    assert losses.separation(column(1.0, 2.0), column(-1.0, 0.0)) == 1
    assert losses.separation(column(1.0, 2.0), column(1.0, 2.0)) == 0.5
    assert losses.separation(column(0.0, 3.0), column(1.0, 2.0, 4.0, -1.0)) == pytest.approx(0.5)
    assert losses.separation(column(0.0), column(1.0)) == 0


def test_noise_levels_are_the_papers_tau() -> None:
    """``t = atan(e^tau / sigma_d)``: LogNormal on the process of the scaled data, whatever the convention."""
    u = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for mean, std, quantiles in (
        (0.2, 1.6, (0.17, 0.69, 1.18, 1.43, 1.54)),
        (-0.6, 1.0, (0.21, 0.51, 0.83, 1.14, 1.40)),
    ):
        t = LogNormal(mean=mean, std=std).times(u, TrigFlow(SIGMA_DATA))
        assert t.tolist() == pytest.approx(quantiles, abs=0.01)
        tau = mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1)
        assert torch.allclose(t, (tau.exp() / SIGMA_DATA).atan(), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------- the method


class Network(nn.Module):
    """Two blocks on tokens of 4 x 4 pictures; told time, class and guidance; keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.tell, self.leave = nn.Linear(1, 8), nn.Linear(3, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(2)])
        self.seen: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.seen.append((x.detach(), t.detach(), cond))
        told = [t, torch.zeros_like(t) if cond.class_ids is None else cond.class_ids.to(t)]
        told.append(torch.zeros_like(t) if cond.guidance is None else cond.guidance)
        tokens = self.enter(x.flatten(1)[:, :, None]) + self.tell(torch.stack(told, 1))[:, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.leave(tokens).reshape(x.shape)


TAPS = ["blocks.0", "blocks.1"]


def build(batch: int = 6, **changes: object) -> tuple[ConsistencyDistillation, Network, Network, Callable[[], Turn]]:
    """The method, its teacher's and its student's network, and a supply of turns."""
    torch.manual_seed(0)
    settings = Consistency(**{"ladd": LADD(taps=TAPS, width=8), "warmup_steps": 4} | changes)  # type: ignore[arg-type]
    network, process = Network(), RectifiedFlow()
    teacher = Denoiser(network, process, "velocity").requires_grad_(False)
    own = copy.deepcopy(network)
    scale = settings.sigma_data if settings.scale_data else 1.0
    view = TrigFlowView(Denoiser(own, process, "velocity"), settings.sigma_data, scale)
    nu = LogVariance(losses.nu_floor(settings.tangent_norm, 16)) if settings.adaptive_weight else None
    channels = feature_channels(teacher, TAPS, (1, 4, 4))
    assert channels == [8, 8]
    method = ConsistencyDistillation(settings, teacher, FlowStudent(view, nu), TokenDiscriminator(channels, 8))
    network.seen.clear()
    own.requires_grad_(True)
    steps = iter(range(1000))

    def turn() -> Turn:
        number = next(steps)
        images = randn(batch, 1, 4, 4, seed=number).float()
        classes = torch.arange(batch) % 3
        return Turn(0, Draws([mix(number, i) for i in range(batch)]), Batch(images, Condition(class_ids=classes)))

    return method, network, own, turn


def test_both_terms_compose_by_their_weights_and_reach_the_student() -> None:
    grads = {}
    for name, weight, ladd in (("scm", 1.0, 0.0), ("ladd", 0.0, 0.5), ("both", 1.0, 0.5)):
        # Not quite 0, so that the same random numbers are drawn; without warm-up, as a copy of its teacher has g = 0.
        settings = LADD(taps=TAPS, width=8, weight=ladd or 1e-12)
        method, _, own, turn = build(weight=weight or 1e-12, ladd=settings, guidance=[1.0], warmup_steps=0)
        loss, logs = method.student_loss(turn())
        loss.backward()
        value = weight * logs["consistency"] + ladd * logs["adversarial"]  # type: ignore[operator]
        assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5)
        grads[name] = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
    assert float(grads["scm"].norm()) > 0 and float(grads["ladd"].norm()) > 0
    assert torch.allclose(grads["scm"] + grads["ladd"], grads["both"], rtol=1e-3, atol=1e-6)


def test_a_weight_of_zero_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method, teacher, own, turn = build(ladd=LADD(taps=TAPS, weight=0.0), guidance=[1.0])
    assert set(method.networks) == {"student"} and method.critic_turns == 0 and method.pictures == {"student"}
    method.student_loss(turn())
    teacher.seen.clear(), own.seen.clear()
    method.student_loss(turn())
    assert [len(x) for x, _, _ in teacher.seen] == [6]
    assert [len(x) for x, _, _ in own.seen] == [6, 6]  # derivative, and the pass with a gradient

    method, teacher, own, turn = build(weight=0.0)
    monkeypatch.setattr("distill.methods.consistency.total_derivative", None)
    loss, logs = method.student_loss(turn())
    assert "consistency" not in logs and loss.requires_grad
    assert [len(x) for x, _, _ in own.seen] == [6] and [len(x) for x, _, _ in teacher.seen] == [6]
    with pytest.raises(ValueError, match="both weights are 0"):
        Consistency(weight=0)
    with pytest.raises(ValueError, match="both weights are 0"):
        Consistency(weight=0, ladd=LADD(taps=TAPS, weight=0))


def test_passes_of_a_turn() -> None:
    """Guidance is one call of twice the batch; both terms are one call of the student; no block behind the last tap."""
    method, teacher, own, turn = build()
    ran: list[str] = []
    for network, name in ((teacher, "teacher"), (own, "student")):
        network.leave.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    method.student_loss(turn())
    teacher.seen.clear(), own.seen.clear(), ran.clear()
    loss, _ = method.student_loss(turn())
    assert [len(x) for x, _, _ in teacher.seen] == [12, 6] and [len(x) for x, _, _ in own.seen] == [6, 12]
    assert ran == ["teacher", "student", "student"]
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    teacher.seen.clear(), own.seen.clear()
    loss, _ = method.critic_loss(turn())
    assert [len(x) for x, _, _ in teacher.seen] == [18] and not own.seen
    loss.backward()
    assert all(p.grad is not None for p in method.networks["discriminator"].parameters())


def test_each_sample_has_one_guidance_for_teacher_and_student() -> None:
    method, teacher, own, turn = build(batch=64, guidance=[2.0, 4.5, 5.0], ladd=None)
    given = turn()
    method.student_loss(given)
    ((_, _, asked),) = teacher.seen
    assert asked.guidance is None and asked.class_ids is not None
    assert asked.class_ids.tolist() == [*(torch.arange(64) % 3).tolist(), *[-1] * 64]
    told = own.seen[-1][2].guidance
    assert told is not None and set(told.tolist()) == {2.0, 4.5, 5.0}
    counts = [int((told == w).sum()) for w in (2.0, 4.5, 5.0)]
    assert min(counts) >= 10
    x, t = randn(64, 1, 4, 4).float(), torch.full((64,), 1.0)
    cond = Condition(class_ids=torch.arange(64) % 3, guidance=told)
    plain = TrigFlowView(method.unguided.denoiser, SIGMA_DATA, SIGMA_DATA)
    bare = replace(cond, guidance=None)
    both = plain.velocity(x, t, bare), plain.velocity(x, t, bare.null())
    expected = both[1] + told.reshape(-1, 1, 1, 1) * (both[0] - both[1])
    assert torch.allclose(method.teacher.velocity(x, t, cond), expected, atol=1e-5)
    z = randn(2, 1, 4, 4).float()
    method.sample(z, Condition(class_ids=torch.tensor([0, 1])))
    assert own.seen[-1][2].guidance.tolist() == [4.5, 4.5]  # type: ignore[union-attr]


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_max_time_is_the_end_of_the_range(probability: float) -> None:
    """Not the probability itself (diffusers' script starts its discriminator's fakes at t = 0.5 rad)."""
    ladd = LADD(taps=TAPS, width=8, max_time_probability=probability, reuse_samples=False)
    method, _, own, turn = build(batch=64, ladd=ladd)
    last = method.process.t_max
    assert last == pytest.approx(math.pi / 2, abs=2e-3)
    for loss in (method.student_loss, method.critic_loss):
        own.seen.clear()
        loss(turn())
        s = own.seen[-1][1][-64:]
        share = float((s >= 0.99 * RectifiedFlow().t_max).float().mean())
        assert probability - 0.2 <= share <= probability + 0.25
        assert probability < 1 or bool((s > 0.99).all())


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_misaligned_pairs_are_real_pictures_with_another_ones_class(batch: int) -> None:
    method, teacher, _, turn = build(batch=batch)
    method.student_loss(turn())
    teacher.seen.clear()
    given = turn()
    loss, _ = method.critic_loss(given)
    assert bool(loss.isfinite()) and given.real is not None
    x, t, cond = teacher.seen[0]
    assert len(x) == (batch if batch == 1 else 3 * batch) or (batch == 1 and len(x) == 2)
    assert cond.class_ids is not None and cond.guidance is None
    if batch > 1:
        own, rolled = (t[2 * batch :], given.real.images.roll(1, 0))
        assert torch.equal(cond.class_ids[2 * batch :], given.real.cond.class_ids)
        assert torch.equal(t[:batch], t[batch : 2 * batch]) and not torch.equal(t[:batch], own)
        noise = (x[2 * batch :] - (1 - own).reshape(-1, 1, 1, 1) * rolled) / own.reshape(-1, 1, 1, 1)
        assert batch < 9 or 0.7 <= float(noise.std()) <= 1.3


def test_times_stay_in_float32_under_autocast() -> None:
    method, teacher, own, turn = build(adaptive_weight=True)
    with torch.autocast("cpu", torch.bfloat16):
        method.student_loss(turn())[0].backward()
        method.critic_loss(turn())[0].backward()
    times = [t for network in (teacher, own) for _, t, _ in network.seen]
    assert times and all(t.dtype == torch.float32 for t in times)
    rounded = torch.cat(times).bfloat16().float()
    assert float((rounded == torch.cat(times)).float().mean()) < 0.2
    assert all(p.dtype == torch.float32 and p.grad is not None for p in method.networks["student"].parameters())


@pytest.mark.filterwarnings("error")
def test_the_derivative_may_be_taken_in_the_runs_precision() -> None:
    directions = {}
    for exact in (True, False):
        method, _, own, turn = build(ladd=None, guidance=[1.0], warmup_steps=0, tangent_float32=exact)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.mul_(1.5)  # a copy of its teacher has no tangent
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = method.student_loss(turn())
        loss.backward()
        directions[exact] = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
    assert not torch.equal(directions[True], directions[False])
    assert float(torch.cosine_similarity(directions[True], directions[False], dim=0)) > 0.99


def test_nu_is_learnt_only_if_asked_for_and_survives_ladd_alone() -> None:
    method, _, _, turn = build(adaptive_weight=True, weight=0.0)
    loss, logs = method.student_loss(turn())
    loss.backward()
    assert "nu" not in logs and all(p.grad is not None for p in method.networks["student"].parameters())
    method, *_ = build()
    assert not any("log_variance" in name for name, _ in method.networks["student"].named_parameters())


def test_the_tangent_warms_up_with_student_steps_and_the_count_is_saved() -> None:
    method, _, _, turn = build(ladd=None, guidance=[1.0])
    counts = []
    for _ in range(3):
        method.student_loss(turn())
        counts.append(float(method.buffers["steps"].state_dict()["count"]))
    assert counts == [1, 2, 3]
    method.student_loss(replace(turn(), micro=1))
    assert float(method.steps.count) == 3


def test_the_adversarial_term_warms_up_with_student_steps() -> None:
    method, _, _, turn = build(ladd=LADD(taps=TAPS, width=8, weight=0.5, warmup_steps=2), guidance=[1.0])
    shares = []
    for _ in range(4):
        loss, logs = method.student_loss(turn())
        shares.append(float((loss.detach() - logs["consistency"]) / logs["adversarial"]))  # type: ignore[operator]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.5], abs=1e-3)


def test_training_needs_no_teacher() -> None:
    method, teacher, _, turn = build(target="training", ladd=None)
    loss, _ = method.student_loss(turn())
    assert not teacher.seen and bool(loss.isfinite())


def test_weights_move() -> None:
    """Three steps at a small learning rate, in float32: all but a few weights change."""
    method, _, own, turn = build()
    before = [p.detach().clone() for p in own.parameters()]
    optimizer = torch.optim.AdamW(own.parameters(), 1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        method.student_loss(turn())[0].backward()
        optimizer.step()
    moved = torch.cat([(p.detach() != b).flatten() for p, b in zip(own.parameters(), before, strict=True)])
    assert float(moved.float().mean()) > 0.99 and method.exported() is own


def test_useless_differences_are_refused_with_their_error() -> None:
    rough = lambda x, t: torch.sin(1000 * t)[:, None] * x
    x, t, d = randn(32, 3), torch.linspace(0.2, 1.4, 32, dtype=torch.float64), randn(32, 3, seed=1)
    with pytest.raises(UserError, match=r"central with tangent_step 0.02 is \d+% off .* unusable: choose jvp"):
        total_derivative(rough, x, t, d, "central", 0.02, 1.57, check=True)
    with pytest.warns(UserWarning, match="likely not dense"):
        total_derivative(rough, x, t, d, "jvp", 0.02, 1.57, check=True)
    with pytest.warns(UserWarning, match="backward with tangent_step 0.2 is .* off"):
        total_derivative(field, x, t, d, "backward", 0.2, 1.57, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total_derivative(field, x, t, d, "central", 0.02, 1.57, check=True)
        total_derivative(field, x, t, d, "jvp", 0.02, 1.57, check=True)


# -------------------------------------------------------------------------------------------- heads and the embedding


def test_heads_read_tokens_and_maps_sample_by_sample() -> None:
    torch.manual_seed(0)
    discriminator = TokenDiscriminator([8, 4], 8).eval()
    tokens, grid = torch.randn(5, 12, 8), torch.randn(5, 4, 3, 3)
    logits = discriminator([tokens, grid])
    assert logits.shape == (5, 21) and logits.dtype == torch.float32
    assert torch.allclose(discriminator([tokens[:2], grid[:2]]), logits[:2], atol=1e-5)
    for count in (1, 9, 11, 17):  # sizes that virtual batches of eight cannot divide
        assert discriminator([torch.randn(count, 12, 8), torch.randn(count, 4, 3, 3)]).shape == (count, 21)
    unet = Denoiser(PatchUNet.create(1, 16, 4, [8, 32], patch=2, layers=1), RectifiedFlow(), "velocity")
    assert feature_channels(unet, ["unet.mid_block"], (1, 16, 16)) == [32]


def test_the_guidance_embedding_learns_from_the_first_step() -> None:
    from diffusers import SanaTransformer2DModel

    from models.guidance import start_guidance_embedding

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=1, out_channels=1, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        mlp_ratio=2.0, sample_size=4, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    embedding = model.time_embed.guidance_embedder
    start_guidance_embedding(embedding)
    x, text, t = torch.randn(4, 1, 4, 4), torch.randn(4, 3, 8), torch.full((4,), 0.5)
    call = lambda w: model(x, encoder_hidden_states=text, timestep=t, guidance=torch.full((4,), 0.1 * w)).sample
    assert torch.equal(call(4.0), call(5.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    call(4.0).square().mean().backward()
    optimizer.step()
    assert not torch.equal(call(4.0), call(5.0))
    for parameter in embedding.parameters():  # what must not be: all zero, and the weights never move
        nn.init.zeros_(parameter)
    optimizer.zero_grad()
    call(4.0).square().mean().backward()
    assert not embedding.linear_1.weight.grad.any() and not embedding.linear_2.weight.grad.any()


# --------------------------------------------------------------------------------------- a mixture of four in the plane

ANGLES = torch.arange(4, dtype=torch.float64) * math.pi / 2
MIXTURE = Mixture(
    torch.full((4,), 0.25, dtype=torch.float64),
    1.2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1),
    torch.full((4,), 0.3, dtype=torch.float64),
)
BATCH = 256


class Plane(nn.Module):
    """A velocity from points (B, 2, 1, 1), with a sinusoidal embedding of ``factor`` times the flow's time."""

    def __init__(self, factor: float, width: int = 64, depth: int = 2):
        super().__init__()
        self.frequencies = factor * torch.exp(-math.log(1e4) * torch.arange(32) / 32)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, depth * width))
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        block = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([block() for _ in range(depth)])

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        angles = t[:, None] * self.frequencies
        shifts = self.time(torch.cat([angles.cos(), angles.sin()], 1)).chunk(len(self.blocks), 1)
        h = self.enter(x.flatten(1))
        for block, shift in zip(self.blocks, shifts, strict=True):
            h = h + block(h + shift)
        return self.leave(h).reshape(x.shape)


class BatchDraws(Draws):
    """One generator for the whole batch: a generator a row would cost more than the network."""

    def normal(self, *shape: int) -> Tensor:
        return super().normal(BATCH, *shape)[0]

    def uniform(self) -> Tensor:
        return torch.rand(BATCH, generator=self._generators[0])


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 averaged over 64 directions, of point sets of equal size."""
    directions = nn.functional.normalize(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
    return float(((a @ directions.T).sort(0)[0] - (b @ directions.T).sort(0)[0]).abs().mean())


def distil(factor: float, steps: int) -> tuple[list[float], list[float], float]:
    """Sliced distances of 1-step pictures before, of 1, 2 and 4 steps after, and of the teacher's own flow."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    pictures = lambda count, g=generator: MIXTURE.samples(count, g).float().reshape(count, 2, 1, 1)
    flow = RectifiedFlow()
    teacher = Denoiser(ExactNetwork(MIXTURE, flow), flow, "x0")
    view = TrigFlowView(Denoiser(Plane(factor), flow, "velocity"), SIGMA_DATA, SIGMA_DATA)
    levels = LogNormal(mean=-1.0, std=1.4)
    settings = Consistency(noise_levels=levels, warmup_steps=steps // 6, guidance=[1.0])
    method = ConsistencyDistillation(settings, teacher, FlowStudent(view))
    z, real = randn(4000, 2, 1, 1, seed=5).float(), pictures(4000, torch.Generator().manual_seed(6))

    def distances(*ladders: Sequence[float]) -> list[float]:
        fresh = torch.Generator().manual_seed(9)
        noise = lambda: torch.randn(z.shape, generator=fresh)
        with torch.no_grad():
            samples = [method.one_step.generate(z, Condition(), times, noise) for times in ladders]
        return [sliced_distance(x.flatten(1), real.flatten(1)) for x in samples]

    optimizer = torch.optim.Adam(view.parameters(), 2e-3)
    for _ in range(400):  # the student starts as a network that has learnt the teacher's flow
        x0 = pictures(BATCH)
        t = levels.times(torch.rand(BATCH, generator=generator), method.clock)
        x_t = method.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        with torch.no_grad():
            target = method.teacher.velocity(x_t, t, Condition())
        optimizer.zero_grad()
        ((view.velocity(x_t, t, Condition()) - target) ** 2).mean().backward()
        optimizer.step()
    before = distances(())
    optimizer = torch.optim.RAdam(view.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        turn = Turn(0, BatchDraws([mix(0, step)]), Batch(pictures(BATCH), Condition()))
        optimizer.zero_grad()
        method.student_loss(turn)[0].backward()
        nn.utils.clip_grad_norm_(view.parameters(), 1.0)
        optimizer.step()
    ode = sliced_distance(heun(method.teacher, z, Condition(), 30).flatten(1), real.flatten(1))
    return before, distances((), (1.1,), (1.3, 1.1, 0.6)), ode


def test_a_student_of_a_mixture_learns_it_in_one_step() -> None:
    before, after, teacher = distil(factor=1.0, steps=600)
    assert before[0] == pytest.approx(0.79, abs=0.08) and teacher < 0.03
    assert after[0] < 0.05 and after[1] < 0.05 and after[2] < 0.05, after


@pytest.mark.filterwarnings("ignore:the student's velocity")
def test_without_a_dense_time_embedding_it_does_not() -> None:
    before, after, _ = distil(factor=1000.0, steps=300)
    assert before[0] == pytest.approx(0.79, abs=0.08) and after[0] > 0.3
