"""Distances between sets of features beside the Fréchet distance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.frechet import Features, as_features


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of an unbiased squared distance over ``subsets`` of ``subset_size`` pictures."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def polynomial_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared MMD of ``a`` and ``b`` (n, d) under ``(x.y / d + 1)^3`` (arXiv 1801.01401, Eq. 3 and 4)."""
    n, d = a.shape
    kernel = lambda x, y: (x @ y.T / d + 1) ** 3
    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(a, a), kernel(b, b)))
    return within / (n * (n - 1)) - 2 * kernel(a, b).mean()


def kernel_distance(
    a: Features, b: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of features (n, d) and (m, d): mean over seeded subsets; its expectation is 0 for equal distributions.

    The subset is cut to half of the smaller set, so subsets differ. Raises ValueError for fewer than 4 pictures, NaN or
    infinity, something other than a matrix, and different dimensions.
    """
    first, second = as_features(a), as_features(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of {first.shape[1]} and {second.shape[1]} dimensions cannot be compared")
    if min(len(first), len(second)) < 4:
        raise ValueError(f"a kernel distance needs at least 4 pictures a side, got {len(first)} and {len(second)}")
    size = min(subset_size, len(first) // 2, len(second) // 2)
    generator = torch.Generator().manual_seed(seed)
    pick = lambda features: features[torch.randperm(len(features), generator=generator)[:size]]
    values = torch.stack([polynomial_mmd(pick(first), pick(second)) for _ in range(subsets)])
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, size)
