"""Self-test of a teacher's TrigFlow conversion: ``python -m models.check TEACHER``.

Two equations are integrated from the same noise to the same low noise level: the teacher's own, in its own process, and
TrigFlow's, in both conventions. The conversion is exact whatever the network says, so the ends must agree up to the
integrators' own errors, which two step counts show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from models import teachers
from models.condition import Condition
from models.denoiser import Denoiser
from models.derivatives import circle_difference, disagreement, jvp
from models.errors import UserError, run_command
from models.process import Process, expand_to
from models.trigflow import TrigFlowView


@dataclass(frozen=True)
class Options:
    """Check that a teacher stays the same flow when it is seen through TrigFlow. Exit status 1 if it does not."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Folder of a teacher, or embedded:NAME."""
    steps: int = 40
    """Runge-Kutta steps, of four calls each; a second pass takes twice as many."""
    batch: int = 2
    """Pictures to follow."""
    seed: int = 0
    """Seed of their noise."""
    sigma_data: float = 0.5
    """TrigFlow's sigma_data."""
    tolerance: float = 1e-4
    """Largest relative error that counts as rounding: networks compute parts in float32 whatever they are given."""


@dataclass(frozen=True)
class Conversion:
    """Relative errors of one convention, ``data_scale`` the factor of its data.

    pointwise:  F against ``cos t eps - sin t (k / sigma_data) x0`` of the teacher's own answer, over 65 noise levels
    coarse, fine:  TrigFlow's end against the teacher's, at steps and 2 steps
    own_error:  how far both ends moved between the two step counts, together
    """

    data_scale: float
    pointwise: float
    coarse: float
    fine: float
    own_error: float

    def holds(self, tolerance: float) -> bool:
        return self.pointwise <= tolerance and self.fine <= tolerance + self.own_error


def runge_kutta(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, high: float, low: float, steps: int) -> Tensor:
    """The classical fourth-order method in ``log(sigma / alpha)``, where a teacher's noise levels lie evenly."""
    h = (low - high) / steps
    for i in tqdm(range(steps), leave=False, disable=None):
        level = torch.full((len(x),), high + i * h, dtype=torch.float64, device=x.device)
        k1 = slope(x, level)
        k2 = slope(x + h / 2 * k1, level + h / 2)
        k3 = slope(x + h / 2 * k2, level + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, level + h))
    return x


def own_flow(denoiser: Denoiser, cond: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """``dy = x0 d alpha + eps d sigma`` per unit of ``log(sigma / alpha)``, in the teacher's own process."""
    inner = denoiser.process

    def slope(y: Tensor, level: Tensor) -> Tensor:
        scales = lambda level: torch.stack(_scales(inner, level))
        values, slopes = torch.func.jvp(scales, (level,), (torch.ones_like(level),))  # type: ignore[misc]
        alpha, sigma, d_alpha, d_sigma = (expand_to(value, y).to(y.dtype) for value in (*values, *slopes))
        x0 = denoiser.denoise(y, inner.time_from_ratio(level.exp()), cond)
        return d_alpha * x0 + d_sigma * (y - alpha * x0) / sigma

    return slope


def trig_flow(view: TrigFlowView, cond: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """``dx = sigma_data F dt`` per unit of ``log(sigma / alpha)``: ``dt = sin t cos t d log tan t``."""

    def slope(x: Tensor, level: Tensor) -> Tensor:
        t = view.process.time_from_ratio(level.exp())
        return expand_to(view.process.sigma_data * t.sin() * t.cos(), x).to(x.dtype) * view.velocity(x, t, cond)

    return slope


def _scales(process: Process, level: Tensor) -> tuple[Tensor, Tensor]:
    t = process.time_from_ratio(level.exp())
    return process.alpha(t), process.sigma(t)


@torch.no_grad()
def check(denoiser: Denoiser, z: Tensor, cond: Condition, steps: int, sigma_data: float = 0.5) -> list[Conversion]:
    """Both conventions, from unit noise ``z`` (B, C, H, W) in the dtype of the network."""

    def ends(process: Process, slope: Callable[[Tensor, Tensor], Tensor], low: float, high: float) -> list[Tensor]:
        """x0 at the end of the flow from ``sigma z``, at both step counts."""
        levels = torch.tensor([low, high], dtype=torch.float64, device=z.device)
        alphas, sigmas = _scales(process, levels)
        return [runge_kutta(slope, float(sigmas[1]) * z, high, low, n) / float(alphas[0]) for n in (steps, 2 * steps)]

    found = []
    for scale in dict.fromkeys([1.0, sigma_data]):
        view = TrigFlowView(denoiser, sigma_data, scale)
        limits = torch.tensor([view.process.t_min, view.process.t_max], dtype=torch.float64)
        low, high = view.process.ratio(limits).log().tolist()
        own = ends(denoiser.process, own_flow(denoiser, cond), low, high)
        trig = ends(view.process, trig_flow(view, cond), low, high)
        moved = float(disagreement(own[0], own[1]) + disagreement(trig[0], trig[1]))
        coarse, fine = (float(disagreement(*pair)) for pair in zip(trig, own, strict=True))
        found.append(Conversion(scale, pointwise(view, z, cond), coarse, fine, moved))
    return found


@torch.no_grad()
def pointwise(view: TrigFlowView, z: Tensor, cond: Condition) -> float:
    """Largest relative error of F at points where x0 and eps of the teacher are both well defined."""
    inner, worst = view.denoiser.process, 0.0
    share = view.process.data_scale / view.process.sigma_data
    for t in torch.linspace(view.process.t_min, view.process.t_max, 65, dtype=torch.float64, device=z.device)[1:-1]:
        times = t.expand(len(z))
        alpha, sigma = (expand_to(value, z).to(z.dtype) for value in _scales(inner, view.process.ratio(times).log()))
        y = (alpha**2 * view.process.sigma_data**2 / view.process.data_scale**2 + sigma**2).sqrt() * z
        x_t = expand_to(view.process.alpha(times), z).to(z.dtype) / alpha * y
        x0 = view.denoiser.denoise(y, inner.time_from_ratio(view.process.ratio(times)), cond)
        expected = t.cos() * (y - alpha * x0) / sigma - share * t.sin() * x0
        worst = max(worst, float(disagreement(view.velocity(x_t, times, cond), expected)))
    return worst


@torch.no_grad()
def time_roughness(view: TrigFlowView, z: Tensor, cond: Condition, step: float = 0.02) -> float:
    """Relative error of a central difference of ``step`` radians for dF/dt: near or above 1 if time is not dense.

    Consistency training fails with such a network (SANA-Sprint, Sec. 3.2). UserError if it has no derivative.
    """
    t = torch.linspace(0.2, 0.9, len(z), dtype=torch.float64, device=z.device) * view.process.t_max
    field = lambda x, t: view.velocity(x, t, cond)
    x_t = view.process.sigma_data * z
    value = field(x_t, t)
    dx_dt = view.process.sigma_data * value
    exact = jvp(field, (x_t, t), (dx_dt, torch.ones_like(t)))[1]
    return float(disagreement(circle_difference(field, value, x_t, t, dx_dt, step, view.process.t_max, True), exact))


def main(options: Options) -> None:
    """Load, check, print; exit status 1 if the conversion does not hold."""
    if options.steps < 1 or options.batch < 1 or options.sigma_data <= 0 or options.seed < 0:
        raise UserError("steps and batch must be at least 1, sigma_data positive, seed not negative")
    denoiser, spec = teachers.load(options.teacher)
    denoiser.double()
    generator = torch.Generator().manual_seed(options.seed)
    z = torch.randn(options.batch, spec.channels, spec.size, spec.size, generator=generator, dtype=torch.float64)
    cond = Condition(class_ids=torch.arange(options.batch) % spec.num_classes)
    found = check(denoiser, z, cond, options.steps, options.sigma_data)
    print(f"{options.teacher}: {denoiser.prediction} in {type(denoiser.process).__name__}, relative errors")
    print(f"{'data':>12} {'F':>9} {'end':>9} {'end, 2x':>9} {'integrators':>12}   ({options.steps} steps, 2x: twice)")
    for row in found:
        name = "x0 = y0" if row.data_scale == 1 else f"x0 = {row.data_scale:g} y0"
        print(f"{name:>12} {row.pointwise:9.1e} {row.coarse:9.1e} {row.fine:9.1e} {row.own_error:12.1e}")
    roughness = time_roughness(TrigFlowView(denoiser, options.sigma_data), z, cond)
    dense = "dense" if roughness < 0.5 else "not dense: consistency training will likely fail"
    print(f"time embedding: {dense} (a difference of 0.02 rad is {roughness:.0%} off dF/dt)")
    if not all(row.holds(options.tolerance) for row in found):
        print("verdict: the conversion does NOT hold")
        raise SystemExit(1)
    largest = max(row.own_error for row in found)
    note = "" if largest <= 0.01 else f", but the integrators themselves are {largest:.0%} off: give more --steps"
    print(f"verdict: the conversion holds{note}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
