"""Pure tensor functions: each takes tensors and returns one loss per sample, (B,), in the dtype it was given.

The average over the batch is the caller's. Notation as in design: q teacher, p student, ``x_t = a x0 + sigma eps``.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def per_sample(values: Tensor) -> Tensor:
    """Sum of (B, ...) over everything but the batch."""
    return values.flatten(1).sum(1)


def score_surrogate(
    x0: Tensor,
    teacher_x0: Tensor,
    critic_x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    k0: Tensor | float = 1.0,
    k1: Tensor | float = 0.0,
    k2: Tensor | float = 0.0,
    weight: Tensor | float = 1.0,
    normalizer: Literal["none", "dmd"] = "none",
) -> Tensor:
    """A scalar per sample whose gradient is that of a divergence between the student and the teacher at ``x_t``::

        w c [ k0 <sg(Delta), x_t> + k1 |Delta|^2 - k2 <Delta, e> ]

    with ``Delta = s_p - s_q = (a / sigma^2)(critic_x0 - teacher_x0)`` and ``e = (a / sigma^2)(critic_x0 - x0)``; the
    k's of each method are in ``distill.rows``. With ``w`` the time weight of the objective, ``normalizer="none"`` and
    exact networks the mean over samples has the gradient of the row's objective.

    x0:          (B, ...) student samples, carry the gradient
    teacher_x0:  (B, ...) the teacher's denoising of x_t; detached by the caller unless k1 or k2 is used
    critic_x0:   (B, ...) the fake score's denoising of x_t; likewise
    alpha, sigma, k0, k1, k2, weight: (B,) or numbers; detached by the caller unless they belong to the objective
    normalizer:  "dmd" divides by ``sum |x0 - teacher_x0|`` (DMD, arXiv 2311.18828, Eq. 8, summed over pixels); with it
                 the fixed point p = q stays but the objective is no longer a divergence
    """
    delta, error = critic_x0 - teacher_x0, critic_x0 - x0
    to_score = alpha / sigma**2
    value = k0 * alpha * to_score * per_sample(delta.detach() * x0)
    if isinstance(k1, Tensor) or isinstance(k2, Tensor) or k1 or k2:
        value = value + to_score**2 * (k1 * per_sample(delta**2) - k2 * per_sample(delta * error))
    if normalizer == "dmd":
        distance = (x0 - teacher_x0).detach().abs()
        value = value / (per_sample(distance) + 1e-6 * distance[0].numel())
    return weight * value


def score_products(
    x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """``|Delta|^2`` and ``<Delta, e>`` (B,) of :func:`score_surrogate`, with their gradients."""
    delta, scale = critic_x0 - teacher_x0, (alpha / sigma**2) ** 2
    return scale * per_sample(delta**2), scale * per_sample(delta * (critic_x0 - x0))


def denoising_loss(predicted_x0: Tensor, x0: Tensor, ratio: Tensor, sigma_data: float) -> Tensor:
    """Mean squared error with EDM's weight ``(r^2 + sigma_data^2) / (r sigma_data)^2``, r = sigma / alpha (B,).

    Denoising score matching (arXiv 2206.00364, Eq. 2 and Table 1); its optimum is the score of ``x0``'s distribution.
    """
    weight = (ratio**2 + sigma_data**2) / (ratio * sigma_data) ** 2
    return weight * ((predicted_x0 - x0) ** 2).flatten(1).mean(1)


def generator_loss(fake_logit: Tensor) -> Tensor:
    """Non-saturating ``softplus(-l)``; at the optimal discriminator the gradient of the softened reverse KL."""
    return F.softplus(-fake_logit)


def discriminator_loss(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """``softplus(-l_real) + softplus(l_fake)``; optimum ``l = log q_t / p_t``."""
    return F.softplus(-real_logit) + F.softplus(fake_logit)


def approximate_r1(real_logit: Tensor, perturbed_logit: Tensor) -> Tensor:
    """``(l(x) - l(x + s n))^2``: a gradient penalty without second derivatives (APT, arXiv 2501.08316, Eq. 3).

    Both logits must come from the same noised picture, one of them perturbed by small noise.
    """
    return (real_logit - perturbed_logit) ** 2


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error against the teacher's own sample from the same noise (DMD's regression term)."""
    return ((predicted - target) ** 2).flatten(1).mean(1)


def bin_index(u: Tensor, bins: int) -> Tensor:
    """Index of the bin of ``u`` in [0, 1), bins of equal width."""
    return (u * bins).long().clamp(0, bins - 1)


def bin_sums(values: Tensor, u: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sum and count of ``values`` (B,) in each of ``bins`` equal bins of ``u`` in [0, 1)."""
    index = bin_index(u, bins)
    zeros = torch.zeros(bins, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, index, values), zeros.index_add(0, index, torch.ones_like(values))
