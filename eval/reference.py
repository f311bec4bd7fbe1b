"""A reference set as it is shipped: statistics, a few features for the kernel distance, and the real-vs-real floor."""

import hashlib
import json
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from eval.features import REFERENCES
from eval.frechet import Statistics
from models.errors import UserError


@dataclass(frozen=True)
class Floor:
    """The distance that real pictures have from the reference at this number of pictures.

    ``basis`` is "measured", "interpolated" between measured numbers, or "extrapolated" as 1 / n beyond them.
    """

    value: float
    basis: str


@dataclass(frozen=True)
class Reference:
    """``statistics`` of the whole set, ``features`` (m, d) of some of it, ``floors`` measured with held-out pictures.

    ``sha256`` is that of the file, or empty before it is written.
    """

    name: str
    statistics: Statistics
    features: Tensor
    floors: dict[int, float]
    sha256: str = ""

    def floor(self, n: int) -> Floor:
        """The floor for n pictures, on straight lines of log(distance) over log(n)."""
        if n in self.floors:
            return Floor(self.floors[n], "measured")
        known = sorted(self.floors)
        if n < known[0] or n > known[-1]:
            nearest = known[0] if n < known[0] else known[-1]
            return Floor(self.floors[nearest] * nearest / n, "extrapolated")
        low, high = max(k for k in known if k < n), min(k for k in known if k > n)
        share = log(n / low) / log(high / low)
        return Floor(exp((1 - share) * log(self.floors[low]) + share * log(self.floors[high])), "interpolated")

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without pickle: ``mu`` (d,), ``sigma`` (d, d), ``n``, ``provenance`` (a JSON string),
        ``floors`` (k, 2) and ``features`` (m, d) float16.

        Above 256 dimensions ``sigma_upper`` takes the place of ``sigma``: its upper triangle row by row in float32, a
        quarter of the size, which moves a distance by less than 1e-5 of itself.
        """
        statistics, d = self.statistics, self.statistics.dim
        covariance = statistics.covariance
        if d > 256:
            second = {"sigma_upper": covariance[tuple(torch.triu_indices(d, d))].float().numpy()}
        else:
            second = {"sigma": covariance.numpy()}
        temporary = path.with_suffix(".partial.npz")
        np.savez_compressed(
            temporary,
            mu=statistics.mean.numpy(),
            n=np.array(statistics.n),
            provenance=np.array(json.dumps(statistics.provenance, sort_keys=True)),
            floors=np.array(sorted(self.floors.items()), dtype=np.float64),
            features=self.features.to(torch.float16).numpy(),
            **second,  # pyright: ignore[reportArgumentType]
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what ``save`` wrote; never runs code from the file. UserError if it is missing or something else."""
        if not path.is_file():
            raise UserError(f"{path} is missing: make it with `python -m distill.references`")
        try:
            with np.load(path, allow_pickle=False) as stored:
                if "sigma" in stored:
                    sigma = torch.from_numpy(stored["sigma"])
                else:
                    d = len(stored["mu"])
                    sigma = torch.zeros(d, d, dtype=torch.float64)
                    sigma[tuple(torch.triu_indices(d, d))] = torch.from_numpy(stored["sigma_upper"]).double()
                    sigma = sigma + sigma.triu(1).T
                provenance = json.loads(str(stored["provenance"]))
                statistics = Statistics.from_moments(stored["mu"], sigma, int(stored["n"]), provenance)
                floors = {int(n): float(value) for n, value in stored["floors"]}
                features = torch.from_numpy(stored["features"]).float()
        except (KeyError, OSError, ValueError, BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): make it with `python -m distill.references`") from error
        return cls(path.stem, statistics, features, floors, hashlib.sha256(path.read_bytes()).hexdigest())


def load_reference(name: str) -> Reference:
    """The shipped reference set that belongs to the extractor of that name."""
    return Reference.load(REFERENCES / f"{name}.npz")
