"""The distribution-matching family as one table: a method is a row ``(k0, k1, k2)`` of ``losses.score_surrogate``.

With ``r = q_t / p_t`` (teacher over student), ``Delta = s_p - s_q``, ``e = s_p - grad log p(x_t | x_0)``::

    w c [ k0 <sg(Delta), x_t> + k1 |Delta|^2 - k2 <Delta, e> ]  +  lambda phi(logit)

==============  =============================  ===========  =====  ===========  ===================================
method          k0                             k1           k2     adversarial  exact gradient of (c = 1)
==============  =============================  ===========  =====  ===========  ===================================
sds             1, with s_p -> grad log p(x_t  0            0      none         int w (KL(p_t || q_t) + H(p_t)): the
                | x_0)                                                          student's entropy is missing
diff_instruct   1                              0            0      none         int w KL(p_t || q_t)
dmd2            1                              0            0      softplus     the same + lambda softened reverse KL
f_distill       h(r)                           0            0      softplus     int w D_f(q_t || p_t) + the same
sim (l2)        0                              1            2      none         int w E|Delta|^2 (Fisher divergence)
sim (huber)     0                              d / |Delta|^2  d'/|Delta|  none  int w E d(Delta), d = sqrt(|Delta|^2 +
                                                                                c^2) - c
sid             0                              1 - alpha    1      none         half of sim (l2) where alpha = 1/2; the
                                                                                paper's 1.2 is no gradient
sida            0                              0            1      softplus     sid at alpha = 1 with a GAN term: no
                                                                                gradient of one divergence
uni_instruct    r^2 h'' |Delta|^2              h - r h'     2 h    optional     int g^2/2 E[h |Delta|^2] dt
                + 2 r h' <Delta, e>                                             = D_f(q_0 || p_0) - D_f(q_T || p_T)
==============  =============================  ===========  =====  ===========  ===================================

The time weight w is a setting: ``denoiser`` counts every noise level alike in units of x0, which is ``sigma^2 /
alpha^2`` for rows with k0 alone, ``sigma^4 / alpha^2`` for the others and ``sigma^2 / alpha`` for pseudo-Huber;
``half_g2`` is Uni-Instruct's ``g^2 / 2``.
The normalizer c is 1 or DMD's ``1 / |x0 - teacher|``, which keeps the fixed point p = q but is no gradient any more.

Sources: Diff-Instruct 2305.18455, DMD2 2405.14867, f-distill 2502.15681, SIM 2410.16794, SiD 2404.04057, SiDA
2410.14919, Uni-Instruct 2505.20755. By parts in t, ``int w D_f = W(T) D_f(T) + int g^2/2 W E[h |Delta|^2]`` with ``W
= int_0^t w``: f-distill and Uni-Instruct differ in the time weight and in the estimator.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distill.divergences import Divergence

Coefficients = tuple[Tensor | float, Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Row:
    """``coefficients(r, delta2, cross, unit)`` gives (k0, k1, k2) from r, ``|Delta|^2``, ``<Delta, e>`` and ``unit =
    alpha / sigma^2``, the factor from x0 to score, all (B,). ``delta2`` and ``cross`` carry gradients.

    second_order: k1 or k2 is not 0, so gradients flow through the frozen networks into x_t
    degree: power of Delta in a second-order row's objective, 2 or 1
    critic: the student's score is learned; without it (SDS) it is replaced by that of one sample
    """

    coefficients: Callable[[Tensor, Tensor, Tensor, Tensor], Coefficients]
    second_order: bool
    critic: bool = True
    degree: int = 2


def reverse_kl() -> Row:
    """Diff-Instruct, DMD2."""
    return Row(lambda r, delta2, cross, unit: (1.0, 0.0, 0.0), second_order=False)


def sds() -> Row:
    """Score distillation sampling (DreamFusion, arXiv 2209.14988)."""
    return Row(lambda r, delta2, cross, unit: (1.0, 0.0, 0.0), second_order=False, critic=False)


def f_distill(divergence: Divergence) -> Row:
    """f-distill, Theorem 1."""
    return Row(lambda r, delta2, cross, unit: (divergence.h(r), 0.0, 0.0), second_order=False)


def sim(huber: float | None) -> Row:
    """Score implicit matching with the squared distance, or with a pseudo-Huber one of width ``huber`` in units of x0.

    The pseudo-Huber k's carry a gradient: ``d(Delta) - <d'(Delta), e>`` depends on x_t through them as well.
    """
    if huber is None:
        return Row(lambda r, delta2, cross, unit: (0.0, 1.0, 2.0), second_order=True)

    def coefficients(r: Tensor, delta2: Tensor, cross: Tensor, unit: Tensor) -> Coefficients:
        c = huber * unit
        root = (delta2 + c**2).sqrt()
        return 0.0, 1 / (root + c), 1 / root

    return Row(coefficients, second_order=True, degree=1)


def sid(alpha: float) -> Row:
    """SiD(alpha), Eq. 23; alpha = 1/2 is half the Fisher divergence's gradient, other values are biased."""
    return Row(lambda r, delta2, cross, unit: (0.0, 1 - alpha, 1.0), second_order=True)


def uni_instruct(divergence: Divergence) -> Row:
    """The exact gradient of Uni-Instruct's expanded divergence with r detached."""

    def coefficients(r: Tensor, delta2: Tensor, cross: Tensor, unit: Tensor) -> Coefficients:
        h, slope = divergence.h(r), r * divergence.dh(r)
        k0 = r**2 * divergence.d2h(r) * delta2.detach() + 2 * slope * cross.detach()
        return k0, h - slope, 2 * h

    return Row(coefficients, second_order=True)
