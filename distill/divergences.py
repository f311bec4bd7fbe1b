"""The f-divergences ``D_f(q || p) = E_p[f(r)]``, ``r = q / p``: q the teacher's density, p the student's.

What a gradient needs of f is ``h(r) = f''(r) r^2`` (f-distill, arXiv 2502.15681, Theorem 1) and, for the expanded
divergences of Uni-Instruct (arXiv 2505.20755), its first two derivatives.

=====================  ================================  ==========  ==============================
name                   f(r)                              h(r)        behaviour
=====================  ================================  ==========  ==============================
reverse_kl             -log r                            1           mode seeking, no ratio needed
softened_reverse_kl    (r+1) log(1/2 + 1/(2r))           1/(1+r)     mode seeking, low variance
jensen_shannon         r log r - (r+1) log((r+1)/2)      r/(1+r)     between, saturates
squared_hellinger      1 - sqrt r                        sqrt(r)/4   between
forward_kl             r log r                           r           covers modes, high variance
jeffreys               (r-1) log r                       1+r         covers modes, high variance
pearson_chi2           (r-1)^2                           2 r^2       covers modes, very high variance
neyman_chi2            1/r - 1                           2/r         mode seeking, variance at small r
alpha(a)               (r^a - 1 - a(r-1)) / (a(a-1))     r^a         a: 0 reverse KL, 1 forward KL
=====================  ================================  ==========  ==============================

Jensen-Shannon and its relative are sums of two KL terms, as in f-distill's Table 1, not their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings take the names from the table, without torch
    from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """``f`` with ``f(1) = 0``, ``h = f'' r^2``, ``dh = h'`` and ``d2h = h''``, all of positive tensors of any shape."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    dh: Callable[[Tensor], Tensor]
    d2h: Callable[[Tensor], Tensor]


def constant(value: float) -> Callable[[Tensor], Tensor]:
    """The function that is ``value`` everywhere."""
    return lambda r: r.new_full(r.shape, value)


def alpha(a: float) -> Divergence:
    """The alpha family, ``h = r^a``; its limits at 0 and 1 are the two KL divergences (up to terms of mean zero)."""

    def f(r: Tensor) -> Tensor:
        if a == 0:
            return -r.log() + r - 1
        if a == 1:
            return r * r.log() - r + 1
        return (r**a - 1 - a * (r - 1)) / (a * (a - 1))

    return Divergence(f, lambda r: r**a, lambda r: a * r ** (a - 1), lambda r: a * (a - 1) * r ** (a - 2))


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(lambda r: -r.log(), constant(1.0), constant(0.0), constant(0.0)),
    "softened_reverse_kl": Divergence(
        lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
        lambda r: 1 / (1 + r),
        lambda r: -1 / (1 + r) ** 2,
        lambda r: 2 / (1 + r) ** 3,
    ),
    "jensen_shannon": Divergence(
        lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        lambda r: r / (1 + r),
        lambda r: 1 / (1 + r) ** 2,
        lambda r: -2 / (1 + r) ** 3,
    ),
    "squared_hellinger": Divergence(
        lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4, lambda r: r**-0.5 / 8, lambda r: -(r**-1.5) / 16
    ),
    "forward_kl": Divergence(lambda r: r * r.log(), lambda r: r, constant(1.0), constant(0.0)),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r, constant(1.0), constant(0.0)),
    "pearson_chi2": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: 4 * r, constant(4.0)),
    "neyman_chi2": Divergence(lambda r: 1 / r - 1, lambda r: 2 / r, lambda r: -2 / r**2, lambda r: 4 / r**3),
}
