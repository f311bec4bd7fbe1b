"""What pictures are compared with: statistics of a reference set, some of its features, and the real-vs-real floor.

    python -m eval.reference PICTURES OUTPUT.npz --protocol clean --weights weights-inception-2015-12-05-6726825d.pth

makes one of a folder. Files of other projects are read too, none of them by running code: EDM's .npz, ADM's .npz and
EDM2's .pkl.
"""

import hashlib
import json
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import tyro
from torch import Tensor

from eval.features import REFERENCES, Extractor, extract, file_digest, load_extractor
from eval.frechet import Statistics
from eval.machine import place_of
from eval.pictures import batches, picture_files
from eval.protocols import ProtocolName
from models import unpickle
from models.errors import UserError, run_command

KEPT = 10_000


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

    ``features`` have no rows and ``floors`` no entries where the source has none. ``sha256`` is that of the file, or
    of the names and contents of a folder's pictures. ``size`` is the number of pictures, None where the file does not
    say.
    """

    name: str
    statistics: Statistics
    features: Tensor
    floors: dict[int, float]
    sha256: str = ""

    @property
    def size(self) -> int | None:
        return self.statistics.n if self.statistics.provenance.get("counted", True) else None

    def floor(self, n: int) -> Floor | None:
        """The floor for n pictures, on straight lines of log(distance) over log(n); None if none was measured."""
        if not self.floors:
            return None
        if n in self.floors:
            return Floor(self.floors[n], "measured")
        known = sorted(self.floors)
        if n < known[0] or n > known[-1]:
            nearest = known[0] if n < known[0] else known[-1]
            return Floor(self.floors[nearest] * nearest / n, "extrapolated")
        low, high = max(k for k in known if k < n), min(k for k in known if k > n)
        share = log(n / low) / log(high / low)
        return Floor(exp((1 - share) * log(self.floors[low]) + share * log(self.floors[high])), "interpolated")

    def save(self, path: Path, features: type[np.floating[Any]] = np.float16) -> None:
        """Write an ``.npz`` without pickle: ``mu`` (d,), ``sigma`` (d, d), ``n``, ``provenance`` (a JSON string),
        ``floors`` (k, 2) and ``features`` (m, d) in that type.

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
            floors=np.array(sorted(self.floors.items()), dtype=np.float64).reshape(-1, 2),
            features=self.features.numpy().astype(features),
            **second,  # pyright: ignore[reportArgumentType]
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what ``save`` wrote; never runs code from the file. UserError if it is missing or something else."""
        if not path.is_file():
            raise UserError(f"{path} is missing: make it with `python -m distill.workshop.references`")
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
            raise UserError(
                f"{path} is damaged ({error}): make it with `python -m distill.workshop.references`"
            ) from error
        return cls(path.stem, statistics, features, floors, hashlib.sha256(path.read_bytes()).hexdigest())


def load_reference(name: str) -> Reference:
    """The shipped reference set that belongs to the extractor of that name."""
    return Reference.load(REFERENCES / f"{name}.npz")


# --------------------------------------------------------------------------------------------- other projects' files


def _foreign(path: Path, mu: Any, sigma: Any, pictures: Any, source: str) -> Reference:
    provenance = {"data": f"{source} {path.name}", "counted": False}
    statistics = Statistics.from_moments(np.asarray(mu), np.asarray(sigma), 2, provenance)
    if statistics.mean.shape != (2048,) or statistics.covariance.shape != (2048, 2048):
        raise UserError(f"--reference: {path} has a mean of {tuple(np.shape(mu))}, not Inception's 2,048")
    features = torch.zeros(0, 2048) if pictures is None else pictures
    return Reference(path.stem, statistics, features, {}, file_digest(path))


def open_reference(path: Path, extractor: Extractor, batch: int = 50) -> Reference:
    """The reference in ``path`` for ``extractor``: a folder of pictures, or a file that this or another project wrote.

    Files of other projects do not say whose weights made them: they are for the published Inception. UserError for
    anything else.
    """
    if path.is_dir():
        return of_pictures(path, extractor, batch)
    if not path.is_file():
        raise UserError(f"--reference: there is no file or folder {path}")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as stored:
                names = set(stored.files)
        except (OSError, ValueError, BadZipFile) as error:
            raise UserError(f"--reference: {path} is no .npz file: {error}") from error
        if "provenance" in names:
            return Reference.load(path)
    if not extractor.name.startswith("fid "):
        raise UserError(
            f"--reference: {path} was made by the published Inception, these features are {extractor.name}'s"
        )
    try:
        if path.suffix == ".pkl":
            stored = unpickle.load(path, "--reference")
            stored = stored.get("fid", stored)
            return _foreign(path, stored["mu"], stored["sigma"], None, "EDM2's")
        with np.load(path, allow_pickle=False) as stored:
            if "arr_0" not in stored.files:
                return _foreign(path, stored["mu"], stored["sigma"], None, "EDM's")
            pictures = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2)
            features = extract(extractor, pictures.split(batch))
            return _foreign(path, stored["mu"], stored["sigma"], features, "ADM's")
    except (KeyError, OSError, ValueError, AttributeError, TypeError, BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--reference: {path} holds no statistics (mu, sigma) that can be read: {reason}") from error


def of_pictures(folder: Path, extractor: Extractor, batch: int = 50, keep: int = KEPT) -> Reference:
    """The reference that a folder of pictures is, with the features of ``keep`` of them, drawn without replacement.

    Of all of them for cmmd, which is no distance of statistics.
    """
    files = picture_files(folder)
    keep = len(files) if extractor.name == "cmmd" else min(keep, len(files))
    chosen = torch.zeros(len(files), dtype=torch.bool)  # by chance: sorted names begin with the first classes alone
    chosen[torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:keep]] = True
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file_digest(file)}\n".encode())
    statistics, kept = Statistics(), []
    for images in batches(files, batch, f"reference {folder.name}"):
        features = extract(extractor, [images])
        kept.append(features[chosen[statistics.n : statistics.n + len(features)]])
        statistics.update(features)
    if statistics.n < 2:
        raise UserError(f"--reference: {folder} has {statistics.n} picture: statistics need at least 2")
    statistics.provenance = {
        "data": f"folder {folder.resolve().name}",
        "extractor": extractor.name,
        "weights_sha256": extractor.sha256,
        "resize": extractor.resize,
    }
    return Reference(folder.name, statistics, torch.cat(kept), {}, digest.hexdigest())


@dataclass(frozen=True)
class Options:
    """Make a reference file of a folder of pictures."""

    pictures: tyro.conf.Positional[Path]
    """Folder of real pictures."""
    output: tyro.conf.Positional[Path]
    """.npz file to write."""
    protocol: ProtocolName = "torch_fidelity"
    """How pictures become features."""
    weights: Path | None = None
    """The network's weights file, where it does not come with a package."""
    keep: int = KEPT
    """Features to keep, of pictures drawn by chance, for the kernel distance, precision and recall; cmmd keeps all."""
    batch: int = 50
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def main(options: Options) -> None:
    """Write the file."""
    if min(options.keep, options.batch) < 1 or options.output.suffix != ".npz":
        raise UserError("--keep and --batch must be at least 1, and the output a file that ends in .npz")
    extractor = load_extractor(options.protocol, place_of(options.device), options.weights)
    made = of_pictures(options.pictures, extractor, options.batch, options.keep)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    made.save(options.output, np.float32)
    print(f"{options.output}: {made.size:,} pictures, {extractor.name}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
