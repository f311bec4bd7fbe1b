"""The density ratio's weight h(r): calibration, moving averages per noise level, normalisation over the batch."""

import math

import pytest
import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, alpha
from distill.losses import bin_index, bin_sums
from distill.noise_levels import Grid, LogNormal, LogUniform
from distill.ratio import Ratio
from models.process import EDM
from tests.analytic import NAMES, Mixture, log_ratio

BINS = 10
EVERYTHING = (1e-9, 1e9)
LEVELS = [
    pytest.param(Grid(), id="grid"),
    pytest.param(Grid(low=0.1, high=0.7), id="part of the grid"),
    pytest.param(LogNormal(), id="lognormal"),
    pytest.param(LogUniform(), id="loguniform"),
]


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weigh(weight: Ratio, r: Tensor, u: Tensor) -> Tensor:
    """h of the calibrated ratio, normalised."""
    calibrated, scale = weight(r, u)
    return weight.divergence.h(calibrated) / scale


def stage_one(decay: float = 0.9) -> Ratio:
    """Only stage 1, with h = r: what comes out is the normalised ratio."""
    return Ratio(DIVERGENCES["forward_kl"], BINS, decay, EVERYTHING, (True, False))


# ----------------------------------------------------------------------------------------------------------- the ratio


def test_logits_are_clamped_and_ratios_clipped() -> None:
    logit = torch.tensor([-100.0, -10.0, math.log(0.1), -1.0, 0.0, 2.0, math.log(20.0), 10.0, 100.0])
    clipped = Ratio(DIVERGENCES["forward_kl"]).ratio(logit)
    expected = torch.tensor([0.1, 0.1, 0.1, math.exp(-1), 1.0, math.exp(2), 20.0, 20.0, 20.0])
    assert torch.allclose(clipped, expected, rtol=1e-5)
    wide = Ratio(DIVERGENCES["forward_kl"], clip=EVERYTHING).ratio(logit)
    assert torch.allclose(wide, logit.clamp(-10, 10).exp())
    assert float(wide.max()) == pytest.approx(math.exp(10), rel=1e-5)


def test_nothing_carries_a_gradient() -> None:
    logit = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = Ratio(DIVERGENCES["jensen_shannon"])
    r = weight.ratio(logit)
    assert not r.requires_grad and not any(part.requires_grad for part in weight(r, uniform(8).float()))


@pytest.mark.parametrize("name", NAMES)
def test_without_stages_the_weight_is_h(name: str) -> None:
    r = torch.logspace(-1, 1, 9, dtype=torch.float64)
    weight = Ratio(DIVERGENCES[name], stages=(False, False))
    assert torch.equal(weigh(weight, r, uniform(9)), DIVERGENCES[name].h(r))
    assert torch.equal(weight.means, torch.ones(BINS)) and float(weight.seen.sum()) == 0


# ------------------------------------------------------------------------------------------------------------- stage 1


def test_exact_logits_are_calibrated_and_stage_one_leaves_them() -> None:
    """``E_p[r] = 1`` at every noise level, so the correction is within the Monte Carlo error of each bin."""
    count, generator, process = 400_000, torch.Generator().manual_seed(1), EDM()
    teacher, student = Mixture.gaussian(0.1, 1.1), Mixture.gaussian(-0.2, 1.0)
    u = uniform(count)
    sigma = process.sigma(LogNormal(mean=0.0).times(u, process))
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x_t = student.samples(count, generator) + sigma[:, None] * noise
    weight = stage_one()
    r = weight.ratio(log_ratio(teacher, student, x_t, 1.0, sigma))

    index = bin_index(u, BINS)
    error = torch.stack([r[index == k].std() / (index == k).sum() ** 0.5 for k in range(BINS)])
    assert float(error.max()) < 0.01
    total, number = bin_sums(r, u, BINS)
    assert bool(((total / number - 1).abs() < 4.5 * error).all())
    corrected = weigh(weight, r, u)
    assert bool(((corrected / r - 1).abs() < 4.6 * error[index] + 2e-6).all())
    assert torch.allclose(weight.means.double(), total / number, rtol=1e-4)


def test_a_miscalibrated_discriminator_is_corrected_bin_by_bin() -> None:
    u = uniform(20_000)
    true = torch.exp(0.4 * torch.randn(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.08)
    factor = torch.linspace(0.2, 5, BINS, dtype=torch.float64)[bin_index(u, BINS)]
    found = weigh(stage_one(), true * factor, u)
    assert float((found / true - 1).abs().max()) < 0.05
    total, number = bin_sums(found, u, BINS)
    assert torch.allclose(total / number, torch.ones(BINS, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_moving_average_decays_exactly(decay: float) -> None:
    weight = stage_one(decay)
    first = (torch.arange(BINS) + 0.5) / BINS
    start = torch.linspace(0.5, 5, BINS)
    weight(start, first)
    assert torch.allclose(weight.means, start)
    expected = start.clone()
    for value in (2.0, 3.0, 0.25):
        weight(torch.full((6,), value), torch.tensor([0.31, 0.35, 0.39, 0.71, 0.75, 0.79]))
        expected[[3, 7]] = decay * expected[[3, 7]] + (1 - decay) * value
        assert torch.allclose(weight.means, expected, rtol=1e-6)
    assert bool((weight.seen == 1).all())


def test_a_bin_takes_its_first_mean_whole_and_empty_bins_stay() -> None:
    weight = stage_one()
    weight(torch.tensor([2.0, 4.0]), torch.tensor([0.05, 0.06]))
    assert float(weight.means[0]) == 3 and torch.equal(weight.means[1:], torch.ones(BINS - 1))
    assert weight.seen.tolist() == [1.0] + [0.0] * (BINS - 1)


def test_a_lone_sample_keeps_its_ratio_once_the_bin_has_history() -> None:
    """Dividing by this batch's own mean alone would make every lone ratio 1."""
    weight = stage_one(0.9)
    u = torch.tensor([0.55])
    assert float(weigh(weight, torch.tensor([1.0]), u)) == pytest.approx(1, rel=1e-5)
    assert float(weigh(weight, torch.tensor([5.0]), u)) == pytest.approx(5 / 1.4, rel=1e-5)
    assert float(weigh(stage_one(0.0), torch.tensor([5.0]), u)) == pytest.approx(1, rel=1e-5)


def test_history_belongs_to_a_checkpoint() -> None:
    weight, other = stage_one(), stage_one()
    weight(torch.tensor([3.0]), torch.tensor([0.2]))
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other.means, weight.means) and torch.equal(other.seen, weight.seen)
    assert float(other.means[2]) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_stay_in_the_averages(bad: float) -> None:
    weight, u = stage_one(), torch.tensor([0.05, 0.55])
    weight(torch.tensor([bad, 2.0]), u)
    assert torch.equal(weight.means, torch.tensor([1.0] * 5 + [2.0] + [1.0] * 4)) and weight.seen.sum() == 1
    weight(torch.tensor([3.0, 2.0]), u)
    weight(torch.tensor([bad, bad]), u)
    assert float(weight.means[0]) == 3 and float(weight.means[5]) == 2


# ------------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize("stages", [(False, True), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_stage_two_gives_the_weights_mean_one(name: str, stages: tuple[bool, bool]) -> None:
    r = torch.logspace(-1, 1, 64, dtype=torch.float64)
    weight = Ratio(DIVERGENCES[name], stages=stages)
    h = weigh(weight, r, uniform(64))
    assert h.shape == r.shape and float(h.mean()) == pytest.approx(1, abs=2e-5)
    if stages == (False, True):
        raw = DIVERGENCES[name].h(r)
        assert torch.allclose(h / h[0], raw / raw[0], rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("stages", [(True, True), (True, False), (False, True)])
def test_reverse_kl_gives_one_weight_per_sample(count: int, stages: tuple[bool, bool]) -> None:
    for divergence in (DIVERGENCES["reverse_kl"], alpha(0.0)):
        h = weigh(Ratio(divergence, stages=stages), torch.linspace(0.2, 3, count), uniform(count).float())
        assert h.shape == (count,)
        assert torch.allclose(h, torch.ones(count), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize("levels", LEVELS)
def test_bins_in_u_are_equally_populated_intervals_of_noise(levels: Grid | LogNormal | LogUniform) -> None:
    count, process = 100_000, EDM()
    u = uniform(count, 3)
    t = levels.times(u, process)
    edges = levels.times(torch.linspace(0, 1, BINS + 1, dtype=torch.float64), process)
    assert bool((edges.diff() > 0).all())
    by_time = torch.bucketize(t, edges[1:-1], right=True)
    assert torch.equal(by_time, bin_index(u, BINS))
    spread = (count * 0.1 * 0.9) ** 0.5
    assert float((torch.bincount(by_time, minlength=BINS) - count / BINS).abs().max()) < 4.5 * spread


def test_bins_of_equal_width_in_sigma_would_not_be() -> None:
    process = EDM()
    t = Grid(low=0.002, high=0.998).times(uniform(100_000, 4), process)
    share = (t < process.t_min + (process.t_max - process.t_min) / BINS).double().mean()
    assert 0.6 < float(share) < 0.7
