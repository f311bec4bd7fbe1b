"""Several scenes of one prompt: how many different ones there are among them.

A claim about diversity needs many seeds: below :data:`FEWEST` there is a count and no interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST = 8
"""Seeds below which no interval is given."""


@dataclass(frozen=True)
class Seed:
    """One run of a prompt: the nearest variant of each of its particles, None where it is no solid, and their
    ``pictures`` (n, V, 3, H, W) in [0, 1] from the same V cameras."""

    variants: Sequence[str | None]
    pictures: Tensor


def distinct(seeds: Sequence[Seed]) -> float:
    """Different variants among all particles."""
    return float(len({variant for seed in seeds for variant in seed.variants}))


def pairwise_distance(seeds: Sequence[Seed]) -> float:
    """Root mean squared difference of two particles' pictures, in [0, 1], mean over all pairs; 0 for a single one."""
    flat = torch.cat([seed.pictures for seed in seeds]).flatten(1)
    count = len(flat)
    if count < 2:
        return 0.0
    return float((torch.cdist(flat, flat) / flat.shape[1] ** 0.5).sum() / (count * (count - 1)))


def interval(statistic: Callable[[Sequence[Seed]], float], seeds: Sequence[Seed]) -> float:
    """Two standard errors by the jackknife (Efron and Stein 1981), seed by seed: a bootstrap would draw a seed twice
    and find fewer variants and smaller distances than there are."""
    left = torch.tensor([statistic([*seeds[:i], *seeds[i + 1 :]]) for i in range(len(seeds))], dtype=torch.float64)
    return 2 * float(((len(seeds) - 1) * (left - left.mean()).square().mean()).sqrt())


def mean_interval(values: Sequence[float]) -> float:
    """Two standard errors of the mean."""
    return 2 * float(torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5)


def diversity(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Variants with their numbers, how many are different, and the pictures' mean distance; from 8 seeds on with two
    standard errors."""
    named = [variant for seed in seeds for variant in seed.variants if variant is not None]
    counts = {variant: named.count(variant) for variant in sorted(set(named))}
    found: dict[str, Any] = {
        "seeds": len(seeds),
        "particles": sum(len(seed.variants) for seed in seeds),
        "variants": counts,
        "modes": len(counts) if counts else None,
        "picture_distance": pairwise_distance(seeds),
    }
    if len(seeds) < FEWEST:
        return found | {"claim": f"no claim below {FEWEST} seeds"}
    if counts:
        found["modes_interval"] = interval(distinct, seeds)
    return found | {"picture_distance_interval": interval(pairwise_distance, seeds)}


def means(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the scores that are numbers, over scenes (a scene's particles are averaged before), with two standard errors
    where there are eight scenes or more."""
    table: dict[str, float] = {}
    for key in dict.fromkeys(key for result in results for key in result):
        scenes: dict[str, list[float]] = {}
        for result in results:
            if isinstance(result.get(key), int | float):
                scenes.setdefault(result["scene"], []).append(float(result[key]))
        values = [sum(each) / len(each) for each in scenes.values()]
        if values:
            table[key] = sum(values) / len(values)
            if len(values) >= FEWEST:
                table[f"{key}_interval"] = mean_interval(values)
    return table
