"""Pure functions between what networks predict and x0 or eps, at ``x_t = alpha x0 + sigma eps``.

All tensors broadcast: ``x_t`` (B, C, H, W), ``alpha`` and ``sigma`` (B, 1, 1, 1) or scalars. ``v`` is Salimans & Ho's
``alpha eps - sigma x0`` for alpha^2 + sigma^2 = 1 (arXiv 2202.00512); ``velocity`` is rectified flow's ``eps - x0``.
"""

from typing import Literal

from torch import Tensor

Prediction = Literal["x0", "eps", "v", "velocity"]


def to_x0(kind: Prediction, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x0 that ``prediction`` stands for."""
    match kind:
        case "x0":
            return prediction
        case "eps":
            return (x_t - sigma * prediction) / alpha
        case "v":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        case "velocity":
            return (x_t - sigma * prediction) / (alpha + sigma)


def to_eps(kind: Prediction, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that ``prediction`` stands for."""
    match kind:
        case "x0":
            return (x_t - alpha * prediction) / sigma
        case "eps":
            return prediction
        case "v":
            return (sigma * x_t + alpha * prediction) / (alpha**2 + sigma**2)
        case "velocity":
            return (x_t + alpha * prediction) / (alpha + sigma)


def from_x0(kind: Prediction, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of ``kind`` would have predicted for this x0; inverse of :func:`to_x0`."""
    eps = (x_t - alpha * x0) / sigma
    match kind:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return alpha * eps - sigma * x0
        case "velocity":
            return eps - x0


def combination_of_both(
    kind: Prediction | Literal["edm"],
    alpha: Tensor,
    sigma: Tensor,
    on_x0: Tensor,
    on_eps: Tensor,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """(a, b) such that ``on_x0 x0 + on_eps eps = a x_t + b prediction``, all (B,).

    A velocity or v has no division that could become singular here, neither has "edm" (the output of Karras et al.'s
    preconditioned network, arXiv 2206.00364, with its ``sigma_data``). eps divides by alpha and x0 by sigma, as they
    say nothing of x0 where alpha = 0, or of eps where sigma = 0.
    """
    along = on_eps * alpha - on_x0 * sigma
    match kind:
        case "x0":
            return on_eps / sigma, -along / sigma
        case "eps":
            return on_x0 / alpha, along / alpha
        case "v":
            total = alpha**2 + sigma**2
            return (on_x0 * alpha + on_eps * sigma) / total, along / total
        case "velocity":
            return (on_x0 + on_eps) / (alpha + sigma), along / (alpha + sigma)
        case "edm":
            total = sigma**2 + (sigma_data * alpha) ** 2
            return (on_x0 * sigma_data**2 * alpha + on_eps * sigma) / total, -along * sigma_data / total.sqrt()


def score_from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2`` for x0 = E[x0 | x_t] (Tweedie)."""
    return (alpha * x0 - x_t) / sigma**2
