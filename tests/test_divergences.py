"""The table of f-divergences against its definitions: f(1) = 0, h = f'' r^2 and the derivatives of h."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, Divergence, alpha
from distill.settings import DivergenceName
from tests.analytic import NAMES, by_autograd

RATIOS = torch.logspace(-3, 3, 121, dtype=torch.float64)
ORDERS = (-1.0, -0.3, 0.0, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 3.0)
ALL = [pytest.param(DIVERGENCES[name], id=name) for name in NAMES] + [
    pytest.param(alpha(order), id=f"alpha({order})") for order in ORDERS
]


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error, relative where the value exceeds 1."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


def test_the_names_are_exactly_the_eight() -> None:
    assert set(DIVERGENCES) == set(NAMES)
    assert set(get_args(DivergenceName)) == {*NAMES, "alpha"}


@pytest.mark.parametrize("divergence", ALL)
def test_f_vanishes_at_one_and_is_strictly_convex(divergence: Divergence) -> None:
    assert float(divergence.f(torch.ones(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-15)
    assert bool((divergence.h(RATIOS) > 0).all())


@pytest.mark.parametrize("divergence", ALL)
def test_h_and_its_derivatives_are_those_of_f(divergence: Divergence) -> None:
    second = RATIOS.clone().requires_grad_()
    (first,) = torch.autograd.grad(divergence.f(second).sum(), second, create_graph=True)
    (second_derivative,) = torch.autograd.grad(first.sum(), second)
    h = divergence.h(RATIOS)
    assert worst(h, second_derivative * RATIOS**2) <= 1e-10
    dh, d2h = divergence.dh(RATIOS), divergence.d2h(RATIOS)
    assert worst(dh, by_autograd(divergence.h, RATIOS)) <= 1e-10
    assert worst(d2h, by_autograd(divergence.dh, RATIOS)) <= 1e-10
    assert h.shape == dh.shape == d2h.shape == RATIOS.shape


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(divergence: Divergence, dtype: torch.dtype) -> None:
    r = torch.full((3, 2), 0.7, dtype=dtype)
    for function in (divergence.f, divergence.h, divergence.dh, divergence.d2h):
        assert function(r).shape == r.shape and function(r).dtype == dtype


@pytest.mark.parametrize(("order", "name"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_at_its_limits_is_a_kl_divergence(order: float, name: str) -> None:
    member, expected, near = alpha(order), DIVERGENCES[name], alpha(order + 1e-6)
    for mine, theirs in ((member.h, expected.h), (member.dh, expected.dh), (member.d2h, expected.d2h)):
        assert worst(mine(RATIOS), theirs(RATIOS)) <= 1e-12
    # f may differ by a multiple of r - 1, whose mean under p is zero.
    affine = (member.f(RATIOS) - expected.f(RATIOS)) / (RATIOS - 1)
    away = (RATIOS - 1).abs() > 1e-6
    assert float(affine[away].std()) <= 1e-10
    inner = RATIOS[(RATIOS > 0.1) & (RATIOS < 10)]
    assert worst(near.f(inner), member.f(inner)) <= 1e-4


@pytest.mark.parametrize(
    ("order", "name", "factor"),
    [(0.5, "squared_hellinger", 4.0), (2.0, "pearson_chi2", 0.5), (-1.0, "neyman_chi2", 0.5)],
)
def test_alpha_contains_hellinger_and_both_chi_squares(order: float, name: str, factor: float) -> None:
    assert worst(alpha(order).h(RATIOS), factor * DIVERGENCES[name].h(RATIOS)) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_behaviour_at_both_ends(name: str) -> None:
    """The table's limits of h for small and large r: what seeks modes and what covers them."""
    limits = {
        "reverse_kl": (1, 1),
        "softened_reverse_kl": (1, 0),
        "jensen_shannon": (0, 1),
        "squared_hellinger": (0, torch.inf),
        "forward_kl": (0, torch.inf),
        "jeffreys": (1, torch.inf),
        "pearson_chi2": (0, torch.inf),
        "neyman_chi2": (torch.inf, 0),
    }
    for end, expected in zip((1e-12, 1e12), limits[name], strict=True):
        value = float(DIVERGENCES[name].h(torch.tensor([end], dtype=torch.float64)))
        assert value > 1e5 if expected == torch.inf else value == pytest.approx(expected, abs=1e-5)
