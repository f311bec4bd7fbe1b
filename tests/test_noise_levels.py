"""Proposals of noise levels: quantile functions of u, the same noise-to-signal ratios whatever the process."""

import math

import pytest
import torch
from torch import Tensor

from distill.noise_levels import Grid, LogNormal, LogUniform
from models.process import EDM, DiscreteVP, Process, RectifiedFlow, TrigFlow

U = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)
PROCESSES: list[Process] = [
    EDM(),
    DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)),
    RectifiedFlow(shift=3.0),
    TrigFlow(),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def bounded(ratio: Tensor, process: Process) -> Tensor:
    ends = process.ratio(torch.tensor([process.t_min, process.t_max], dtype=torch.float64))
    return ratio.clamp(float(ends[0]), float(ends[1]))


@every_process
def test_lognormal_has_the_normal_quantiles(process: Process) -> None:
    mean, std = -0.6, 1.2
    found = process.ratio(LogNormal(mean=mean, std=std).times(U, process)).log()
    quantiles = math.sqrt(2) * torch.erfinv(2 * U - 1)
    expected = bounded((mean + std * quantiles).exp(), process).log()
    assert float((found - expected).abs().max()) <= 1e-9


@every_process
def test_loguniform_is_linear_in_log_ratio(process: Process) -> None:
    low, high = 0.05, 8.0
    found = process.ratio(LogUniform(low=low, high=high).times(U, process)).log()
    expected = math.log(low) + U * (math.log(high) - math.log(low))
    assert float((found - expected).abs().max()) <= 1e-9


@every_process
def test_grid_is_a_part_of_the_processs_own(process: Process) -> None:
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    found = Grid(low=0.2, high=0.8).times(ends, process)
    assert torch.allclose(found, process.spaced(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)), rtol=1e-12)
    whole = Grid().times(ends, process)
    assert float(whole[0]) == pytest.approx(process.t_min) and float(whole[2]) == pytest.approx(process.t_max)


@every_process
@pytest.mark.parametrize("levels", [Grid(), LogNormal(), LogNormal(mean=6, std=3), LogUniform(low=1e-6, high=1e6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_stay_in_range_and_never_fall(
    process: Process, levels: Grid | LogNormal | LogUniform, dtype: torch.dtype
) -> None:
    """Also at u = 0, at the largest float32 below 1, and at 1 itself."""
    u = torch.cat([torch.zeros(1), torch.linspace(0.01, 0.99, 99), torch.tensor([1 - 2**-24, 1.0])]).to(dtype)
    t = levels.times(u, process)
    assert t.dtype == dtype and t.shape == u.shape and bool(t.isfinite().all())
    slack = 1e-6 * process.t_max
    assert float(t.min()) >= process.t_min - slack and float(t.max()) <= process.t_max + slack
    assert bool((t.diff() >= 0).all()) and float(t[-1]) > float(t[0])


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="low"):
        Grid(low=-0.1)
    with pytest.raises(ValueError, match="high"):
        Grid(high=1.1)
    with pytest.raises(ValueError, match="std"):
        LogNormal(std=0)
