"""Which noise levels a loss looks at: proposals for t, written as quantile functions of u ~ U(0, 1).

Anything binned over time is binned over u, where every bin is equally populated. (Bins of equal width in an EDM sigma
put two thirds of the usual draws into the first of ten.)

These are settings too, so torch is imported where it computes: a command line is read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from distill.schema import Schema

if TYPE_CHECKING:
    from torch import Tensor

    from models.process import Process

Levels = TypeVar("Levels", "Grid", "LogUniform")


def _ascending(levels: Levels) -> Levels:
    if levels.low >= levels.high:
        raise ValueError(f"low {levels.low:g} is not below high {levels.high:g}")
    return levels


class Grid(Schema):
    """Uniform on a part of the process's own grid: Karras for EDM, the index for discrete VP, shifted for flows."""

    kind: Literal["grid"] = "grid"
    low: float = Field(default=0.0, ge=0, le=1)
    """Start of the part, 0 = least noise."""
    high: float = Field(default=1.0, ge=0, le=1)
    """End of the part, 1 = most noise."""
    _order = model_validator(mode="after")(_ascending)

    def times(self, u: Tensor, process: Process) -> Tensor:
        return process.spaced(self.low + u * (self.high - self.low))


class LogNormal(Schema):
    """``log(sigma / alpha) ~ N(mean, std^2)``, as EDM trains; the tails are clamped to the process's range."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    """Mean of log(sigma / alpha)."""
    std: float = Field(default=1.2, gt=0)
    """Standard deviation of log(sigma / alpha)."""

    def times(self, u: Tensor, process: Process) -> Tensor:
        import torch

        log_ratio = self.mean + self.std * torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
        return process.time_from_ratio(log_ratio.exp()).clamp(process.t_min, process.t_max).to(u.dtype)


class LogUniform(Schema):
    """``log(sigma / alpha)`` uniform between two ratios."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(default=0.02, gt=0)
    """Smallest sigma / alpha."""
    high: float = Field(default=50.0, gt=0)
    """Largest sigma / alpha."""
    _order = model_validator(mode="after")(_ascending)

    def times(self, u: Tensor, process: Process) -> Tensor:
        ratio = self.low * (self.high / self.low) ** u
        return process.time_from_ratio(ratio).clamp(process.t_min, process.t_max)


NoiseLevels = Annotated[Grid | LogNormal | LogUniform, Field(discriminator="kind")]


def half_g2(levels: Grid | LogNormal | LogUniform, u: Tensor, process: Process) -> Tensor:
    """Uni-Instruct's time weight (B,) for noise levels drawn by ``u``: its mean over u ~ U(0, 1) is ``int g^2/2 dt``.

    For every process ``g^2/2 dt = alpha^2 rho d rho`` with ``rho = sigma / alpha``, so the weight is ``alpha^2 rho
    d rho / du``; 0 where the levels are clamped. Few draws carry most of it unless log rho is drawn uniformly.
    """
    import torch

    with torch.enable_grad():
        v = u.detach().double().requires_grad_()
        t = levels.times(v, process)
        rho = process.ratio(t)
        (slope,) = torch.autograd.grad(rho.sum(), v)
    return (process.alpha(t) ** 2 * rho * slope).detach().to(u.dtype)
