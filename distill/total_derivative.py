"""How F changes along a trajectory, exactly or by finite differences, and whether the latter can be trusted."""

import warnings
from typing import Literal

import torch
from torch import Tensor

from models.derivatives import Field, circle_difference, disagreement, jvp
from models.errors import UserError
from models.process import expand_to

Mode = Literal["jvp", "central", "backward"]
UNUSABLE, DOUBTFUL = 0.5, 0.1
"""Relative error of a finite difference that is refused, and one that is worth a warning."""


def total_derivative(
    field: Field, x_t: Tensor, t: Tensor, dx_dt: Tensor, mode: Mode, step: float, t_max: float, check: bool = False
) -> tuple[Tensor, Tensor]:
    """F and ``J = cos t sin t dF/dt`` (B, ...) along ``dx_dt``, as sCM's Algorithm 1 wants them.

    jvp is exact; central and backward are differences of ``step`` radians along the same direction, for networks
    without forward derivative. With ``check`` both are compared: UserError if the chosen difference is useless here, a
    warning if it is poor, or if ``mode`` is jvp and F does not depend smoothly on time.
    """
    pace = t.cos() * t.sin()
    spread = expand_to(pace, x_t)
    exactly = lambda: jvp(field, (x_t, t), (spread * dx_dt, pace))
    by_difference = lambda value, central: spread * circle_difference(field, value, x_t, t, dx_dt, step, t_max, central)
    if mode == "jvp":
        value, exact = exactly()
        if check:
            with torch.autocast(x_t.device.type, enabled=False):  # rounding would be all that a difference shows
                _judge_smoothness(float(disagreement(by_difference(value, True), exact)), step)
        return value, exact
    value = field(x_t, t)
    estimate = by_difference(value, mode == "central")
    if check:
        try:
            exact = exactly()[1]
        except UserError as reason:
            warnings.warn(f"method.tangent: {mode} cannot be compared with the exact one: {reason}", stacklevel=2)
        else:
            _judge_difference(float(disagreement(estimate, exact)), mode, step)
    return value, estimate


def _judge_smoothness(error: float, step: float) -> None:
    if error > UNUSABLE:
        warnings.warn(
            f"the student's velocity changes by itself within {step} rad (a finite difference is {error:.0%} off the "
            "exact derivative): its time embedding is likely not dense (1000 t); consistency then fails in most cases",
            stacklevel=3,
        )


def _judge_difference(error: float, mode: Mode, step: float) -> None:
    found = f"method.tangent: {mode} with tangent_step {step} is {error:.0%} off the exact tangent"
    if not error <= UNUSABLE:
        raise UserError(
            f"{found} and unusable: choose jvp, another step, or a network with a dense time embedding (t, not 1000 t)"
        )
    if error > DOUBTFUL:
        warnings.warn(found, stacklevel=3)
