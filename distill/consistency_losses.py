"""Continuous-time consistency models (sCM, arXiv 2410.11081) and latent adversarial distillation as pure functions.

``x_t = cos t x0 + sin t z`` with data x0 and noise z of standard deviation ``sigma_data`` (scaled data, see
models.process.TrigFlow), ``F`` the student's velocity, ``f = cos t x_t - sin t sigma_data F`` its answer. All tensors
(B, ...), times and results (B,), the average over the batch is the caller's.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses import per_sample
from models.condition import Condition
from models.process import expand_to

Norm = Literal["l2", "rms", "none"]


def path_velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``dx_t/dt = cos t z - sin t x0`` of one pair: the direction of consistency training, which needs no teacher.

    Its mean given x_t is the direction of distillation, ``sigma_data F_teacher``; sample by sample they differ widely.
    """
    return expand_to(t.cos(), x0) * z - expand_to(t.sin(), x0) * x0


def tangent(
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    total_derivative: Tensor,
    dx_dt: Tensor,
    sigma_data: float,
    warmup: Tensor | float = 1.0,
) -> Tensor:
    """``g = -cos^2 t (sigma_data F - dx/dt) - r (cos t sin t x_t + sigma_data J)``, sCM's Algorithm 1.

    With ``warmup`` r = 1 it is ``cos t df/dt`` along the trajectory; with r = 0 it is the direction of plain flow
    matching. Nothing here overflows at either end of t.

    total_derivative: ``J = cos t sin t dF/dt``, the derivative of F along ``cos t sin t (dx/dt, 1)``
    """
    sine, cosine = expand_to(t.sin(), x_t), expand_to(t.cos(), x_t)
    bootstrap = cosine * sine * x_t + sigma_data * total_derivative
    return -(cosine**2) * (sigma_data * velocity - dx_dt) - warmup * bootstrap


def normalize_tangent(g: Tensor, constant: float = 0.1, norm: Norm = "l2") -> Tensor:
    """``g / (|g| + c)`` per sample.

    l2: over all D numbers of a sample (SANA-Sprint); rms: l2 / sqrt(D) (FastGen), whose gradients are sqrt(D) times
    larger. The weight of an adversarial term beside it, 0.5 in the paper, is tied to l2. none: g as it is.
    """
    if norm == "none":
        return g
    length = per_sample(g**2).sqrt()
    if norm == "rms":
        length = length / math.sqrt(g[0].numel())
    return g / (expand_to(length, g) + constant)


def prior_weight(t: Tensor, sigma_data: float) -> Tensor:
    """``1 / (sigma_data tan t)``: sCM's weight of a noise level."""
    return t.cos() / (sigma_data * t.sin())


def nu_floor(norm: Norm, dimensions: int) -> float:
    """A lower bound for the adaptive weighting's nu that never binds at the start and always ends.

    At its optimum ``e^nu = w |g|^2 / D``. A normalised tangent has ``|g|^2 / D <= 1 / D`` (l2) or 1 (rms), so nu comes
    down to -ln D (l2) or 0 (rms) even if the student does not improve at all. From there the floor lets the weight
    grow by e^2 more: without one it would keep every step's gradient at the same size however small g has become, and
    the training is limited by noise (2-D toy: sliced distance 0.08 to 0.15 instead of 0.02).
    """
    return (-math.log(dimensions) if norm == "l2" else 0.0) - 2.0


def consistency_loss(velocity: Tensor, g: Tensor, weight: Tensor | float = 1.0, nu: Tensor | None = None) -> Tensor:
    """``w e^-nu mean (F - sg(F) - g)^2 + nu`` (B,), whose gradient is ``<-2 w e^-nu g, grad F> / D``.

    Its value says nothing, it is the mean of g^2. velocity: F with its gradient; g: without; nu: (B,) or None for 0.
    """
    loss = weight * ((velocity - velocity.detach() - g.detach()) ** 2).flatten(1).mean(1)
    return loss if nu is None else (-nu).exp() * loss + nu


def hinge_generator(fake: Tensor) -> Tensor:
    """``-mean`` of logits (B, K) of all heads and places (LADD, arXiv 2403.12015; SANA-Sprint, Eq. 11)."""
    return -fake.mean(1)


def hinge_discriminator(real: Tensor, fake: Tensor, fake_weight: Tensor) -> Tensor:
    """``1/2 [mean relu(1 - real) + mean relu(1 + fake)]``, a scalar; SANA-Sprint, Eq. 12.

    Logits (B, K) of real and (M, K) of fake pictures, ``fake_weight`` (M,) 1 for those that count and 0 for others.
    """
    on_fake = F.relu(1 + fake).mean(1)
    return 0.5 * (F.relu(1 - real).mean() + (fake_weight * on_fake).sum() / fake_weight.sum().clamp_min(1))


def separation(real: Tensor, fake: Tensor) -> Tensor:
    """Area under the discriminator's ROC curve, a scalar: the share of pairs of a real and a fake picture in which the
    real one has the greater mean logit. 0.5 is chance, where an adversarial term teaches nothing; logits (B, K)."""
    gap = real.mean(1)[:, None] - fake.mean(1)
    return (gap > 0).float().mean() + 0.5 * (gap == 0).float().mean()


def misaligned(x0: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """Real pictures beside another sample's condition: ``x0`` rolled by one, and whether that condition is another.

    For any batch of two or more. (B,) floats: 0 where the neighbour has the same class or text, and without both.
    """
    differs = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    for value in (cond.class_ids, cond.text, cond.pooled):
        if value is not None:
            differs = differs | (value != value.roll(1, 0)).reshape(len(x0), -1).any(1)
    return x0.roll(1, 0), differs.float()
