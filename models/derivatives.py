"""Directional derivatives of networks: exact ones by forward mode, and differences along TrigFlow's circle."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.errors import UserError
from models.process import expand_to

Field = Callable[[Tensor, Tensor], Tensor]
"""``F(x_t, t)`` (B, ...) for ``x_t`` (B, ...) and ``t`` (B,), the condition fixed."""


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``function(*primals)`` and its derivative along ``tangents``; 2 to 5 times the cost of the value alone.

    Attention runs on the math backend meanwhile, as no fused one has a forward derivative; nothing global is changed
    for longer than the call. Under ``no_grad`` nothing is recorded for a backward pass.

    primals, tangents: tensors of floating point, each tangent of its primal's shape. Integer times have no derivative:
    TypeError. UserError if a network insists on an attention without forward derivative.
    """
    for place, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        if not primal.is_floating_point() or tangent.dtype != primal.dtype:
            raise TypeError(
                f"jvp: argument {place} is {primal.dtype} with a tangent of {tangent.dtype}; both must be the same "
                "floating-point type (a time given as an integer index has no derivative: use .float())"
            )
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value, derivative = torch.func.jvp(function, tuple(primals), tuple(tangents))  # type: ignore[misc]
            return value, derivative
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise UserError(
            "an operation of this network has no forward derivative: choose its native (not fused) attention, or a "
            f"finite-difference tangent; {' '.join(str(error).split())[:160]}"
        ) from error


def circle_difference(
    field: Field, value: Tensor, x_t: Tensor, t: Tensor, dx_dt: Tensor, step: float, t_max: float, central: bool
) -> Tensor:
    """Finite-difference estimate of ``dF/dt`` along the trajectory with velocity ``dx_dt``, (B, ...).

    Neighbours lie on TrigFlow's circle through x_t, ``x_{t-h} = cos h x_t - sin h dx_dt``: for the velocity of a
    teacher this is the tangent of distillation (dsCD, rCM), for that of a pair of data and noise the one of training.

    value: ``F(x_t, t)``. step: h in radians, at most t / 2 is used, and nothing is asked behind ``t_max``.
    central: two more calls of the field, error O(h^2); else one, ``(cos h F(t) - F(t-h)) / sin h``, error O(h).
    """

    def neighbour(h: Tensor) -> Tensor:
        at = expand_to(h, x_t).to(x_t.dtype)
        return field(at.cos() * x_t + at.sin() * dx_dt, t + h)

    back = (t / 2).clamp(max=step)
    sine = expand_to(back.sin(), x_t).to(x_t.dtype)
    if not central:
        return (expand_to(back.cos(), x_t).to(x_t.dtype) * value - neighbour(-back)) / sine
    ahead = (t_max - t).clamp(0, step)
    return (neighbour(ahead) - neighbour(-back)) / (expand_to(ahead.sin(), x_t).to(x_t.dtype) + sine)


def disagreement(estimate: Tensor, exact: Tensor) -> Tensor:
    """``|estimate - exact| / |exact|`` over a whole batch, a scalar."""
    return (estimate - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
