"""Distances between sets of features beside the Fréchet distance."""

from dataclasses import dataclass

import numpy as np
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

    def total(x: Tensor, y: Tensor) -> Tensor:
        inner = torch.mm(x, y.T).div_(d).add_(1).flatten()
        return torch.dot(inner * inner, inner)

    own = sum(total(x, x) - (x.square().sum(1) / d + 1).pow(3).sum() for x in (a, b))
    return own / (n * (n - 1)) - 2 * total(a, b) / (n * len(b))


def kernel_distance(
    a: Features, b: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """KID of features (n, d) and (m, d): mean over seeded subsets; its expectation is 0 for equal distributions.

    Subsets are drawn as torch-fidelity draws them, with its default seed. They are cut to half of the smaller set, so
    that they differ. Raises ValueError for fewer than 4 pictures, NaN or infinity, something other than a matrix, and
    different dimensions.
    """
    first, second = as_features(a), as_features(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of {first.shape[1]} and {second.shape[1]} dimensions cannot be compared")
    if min(len(first), len(second)) < 4:
        raise ValueError(f"a kernel distance needs at least 4 pictures a side, got {len(first)} and {len(second)}")
    size = min(subset_size, len(first) // 2, len(second) // 2)
    generator = np.random.RandomState(seed)
    pick = lambda features: features[torch.from_numpy(generator.choice(len(features), size, replace=False))]
    values = torch.stack([polynomial_mmd(pick(first), pick(second)) for _ in range(subsets)])
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, size)


def gaussian_mmd(a: Features, b: Features, sigma: float = 10.0) -> float:
    """CMMD's squared MMD of unit CLIP embeddings, times 1,000 (arXiv 2401.09603): all pairs, its own with themselves
    too, under ``exp(-|x - y|^2 / (2 sigma^2))``."""
    first, second = as_features(a), as_features(b)
    kernel = lambda x, y: torch.exp(-torch.cdist(x, y).square() / (2 * sigma * sigma)).mean()
    return float(1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)))


def inception_score(logits: Features, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` parts of exp(E KL(p(y | x) | p(y))) (arXiv 1606.03498).

    Pictures are shuffled as torch-fidelity shuffles them. ValueError for fewer pictures than parts.
    """
    rows = as_features(logits)
    if len(rows) < splits:
        raise ValueError(f"an Inception Score in {splits} parts needs as many pictures, got {len(rows)}")
    rows = rows[torch.from_numpy(np.random.RandomState(seed).permutation(len(rows)))]
    scores = []
    for part in range(splits):
        log_p = rows[part * len(rows) // splits : (part + 1) * len(rows) // splits].log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_p.exp().mean(0, keepdim=True).log())).sum(1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class Neighbours:
    """Shares of pictures that lie where the other set has some.

    precision, recall:  generated pictures in a ball of a real one, real ones in a ball of a generated one; a ball
                        reaches to its picture's third neighbour (arXiv 1904.06991)
    density, coverage:  balls of real pictures around a generated one, over 5; real pictures whose ball holds a
                        generated one; fifth neighbours (arXiv 2002.09797)
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _radii(features: Tensor, ks: tuple[int, ...], rows: int) -> list[Tensor]:
    """Distances (n,) of every picture to its k-th neighbour, for each k."""
    found = [torch.cdist(part, features).topk(max(ks) + 1, largest=False).values for part in features.split(rows)]
    distances = torch.cat(found)
    return [distances[:, k] for k in ks]


def neighbours(real: Features, generated: Features, k: int = 3, k_coverage: int = 5, rows: int = 2000) -> Neighbours:
    """Precision, recall, density and coverage of features (n, d) and (m, d); ValueError for too few pictures."""
    first, second = as_features(real), as_features(generated)
    least = max(k, k_coverage) + 1
    if min(len(first), len(second)) < least:
        raise ValueError(f"neighbours need at least {least} pictures a side, got {len(first)} and {len(second)}")
    radius, wide = _radii(first, (k, k_coverage), rows)
    (own,) = _radii(second, (k,), rows)
    precise = torch.zeros(len(second), dtype=torch.bool)
    recalled, covered, inside = [], [], 0
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        distances = torch.cdist(first[part], second)
        precise |= (distances <= radius[part, None]).any(0)
        recalled.append((distances <= own).any(1))
        covered.append((distances < wide[part, None]).any(1))
        inside += int((distances < wide[part, None]).sum())
    share = lambda hits: float(hits.double().mean())
    return Neighbours(
        share(precise), share(torch.cat(recalled)), inside / (k_coverage * len(second)), share(torch.cat(covered))
    )
