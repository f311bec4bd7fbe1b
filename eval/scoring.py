"""The distances of one generator's pictures to a reference, and what they mean."""

import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.features import QUANTISATIONS, Extractor, Protocol, extract, load_extractor
from eval.frechet import frechet_distance, frechet_spread
from eval.generate import Sampler, images, painted
from eval.inception import Inception
from eval.metrics import gaussian_mmd, inception_score, kernel_distance, neighbours
from eval.protocols import INCEPTION, ProtocolName, quantisation_of
from eval.reference import Reference, load_reference, open_reference
from models.errors import UserError
from models.teachers.base import ClassSpec

MIN_IMAGES = 10
RESAMPLED = 256
"""Dimensions up to which a Fréchet distance is cheap enough to be resampled."""
TRUSTED_IMAGES = 4000


@dataclass(frozen=True)
class Score:
    """One generator's distances. ``fd`` against the whole reference, the others against some of its features.

    What a reference without features, or a network that is no Inception, cannot tell is None. ``runs`` are the
    distances of all runs where ``fd`` is the least of several.
    """

    sampler: str
    nfe: int
    fd: float
    kid: float | None
    kid_std: float | None
    kid_subsets: int
    kid_subset_size: int
    protocol_digest: str
    measured: str
    """UTC date and time."""
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    real_features: int | None = None
    """Pictures of the reference that the kernel distance, precision, recall, density and coverage compare with."""
    runs: list[float] | None = None
    fd_spread: float | None = None
    """Standard deviation over bootstrap resamples of the pictures, for networks of few dimensions."""
    seconds_generating: float | None = None
    seconds_scoring: float | None = None


def protocol(
    extractor: Extractor,
    reference: Reference,
    n: int,
    seed: int | None,
    num_classes: int | None,
    name: ProtocolName = "fd_fmnist_cnn",
) -> Protocol:
    """What the scores of n pictures mean: from ``seed`` on, or of a folder with ``seed`` None."""
    stated = reference.statistics.provenance.get("weights_sha256")
    if stated is None and isinstance(extractor, Inception):
        stated = extractor.sha256  # other projects' files, which open_reference takes for the published weights alone
    if stated != extractor.sha256:
        raise UserError(
            f"the reference {reference.name}.npz was made with other weights of {extractor.name}: "
            "run `python -m distill.workshop.references`, or `python -m eval.reference` for your own"
        )
    if reference.statistics.provenance.get("resize", extractor.resize) != extractor.resize:
        raise UserError(
            f"the reference {reference.name} was resized otherwise: {reference.statistics.provenance['resize']}; "
            f"{name} does {extractor.resize}"
        )
    return Protocol(
        extractor=extractor.name,
        weights_sha256=extractor.sha256,
        resize=extractor.resize,
        quantisation="as saved" if seed is None else QUANTISATIONS[quantisation_of(name)].words,
        reference=str(reference.statistics.provenance["data"]),
        reference_size=reference.size,
        reference_sha256=reference.sha256,
        images=n,
        seeds="a folder" if seed is None else f"{seed} .. {seed + n - 1}",
        classes="a folder" if num_classes is None else f"picture i has class i mod {num_classes}",
    )


def measured(
    name: str, nfe: int, features: Tensor, extractor: Extractor, reference: Reference, rules: Protocol
) -> Score:
    """All that the features (n, d) of one generator's pictures tell."""
    some, kid = reference.features, None
    around: dict[str, Any] = {}
    if min(len(some), len(features)) >= MIN_IMAGES:
        kid = kernel_distance(features, some)
        around = asdict(neighbours(some, features))
    if extractor.name == "cmmd":
        distance = gaussian_mmd(features, some)
    else:
        whole = len(some) == reference.size and len(some) <= some.shape[1]  # then no covariance need be formed
        distance = frechet_distance(features, some if whole else reference.statistics)
    inception = (None, None)
    if isinstance(extractor, Inception):
        inception = inception_score(extractor.logits(features), min(10, len(features)))
    return Score(
        sampler=name,
        nfe=nfe,
        fd=distance,
        kid=kid.mean if kid else None,
        kid_std=kid.std if kid else None,
        kid_subsets=kid.subsets if kid else 0,
        kid_subset_size=kid.subset_size if kid else 0,
        real_features=len(some) if kid else None,
        protocol_digest=rules.digest(),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        inception_score=inception[0],
        inception_score_std=inception[1],
        fd_spread=frechet_spread(features, reference.statistics) if features.shape[1] <= RESAMPLED else None,
        **around,
    )


def gathered(features: Tensor, world: int) -> Tensor:
    """Features of all processes in the pictures' order; process r of w has those of the pictures r, r + w, ..."""
    if world == 1:
        return features
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=features.device.type == "cpu")
    parts: list[Tensor] = gather_object([features])
    whole = features.new_zeros(sum(len(part) for part in parts), features.shape[1])
    for index, part in enumerate(parts):
        whole[index::world] = part
    return whole


def score(
    sampler: Sampler,
    extractor: Extractor,
    reference: Reference,
    spec: ClassSpec,
    n: int,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str = "cpu",
    progress: bool = True,
    name: ProtocolName = "fd_fmnist_cnn",
    best_of: int = 1,
    processes: tuple[int, int] = (0, 1),
) -> Score:
    """Generate n pictures and measure them against ``reference``; of several runs the one with the least distance.

    ``processes`` is this process's number and how many share the pictures.
    """
    rank, world = processes
    rules = protocol(extractor, reference, n, seed, spec.num_classes, name)
    to_uint8 = painted(spec, QUANTISATIONS[quantisation_of(name)].function)
    found: list[Score] = []
    for run in range(best_of):
        first, started = seed + run * n, time.perf_counter()
        made = images(
            sampler,
            n,
            spec.shape,
            spec.num_classes,
            batch,
            first,
            rank=rank,
            world=world,
            device=device,
            description=sampler.name if progress and rank == 0 else None,
            to_uint8=to_uint8,
        )
        features = gathered(extract(extractor, made), world)
        value = measured(sampler.name, sampler.nfe, features, extractor, reference, rules)
        rest = time.perf_counter() - started - made.seconds
        found.append(replace(value, seconds_generating=round(made.seconds, 2), seconds_scoring=round(rest, 2)))
    least = min(found, key=lambda score: score.fd)
    if best_of == 1:
        return least
    return replace(least, sampler=f"{sampler.name}, best of {best_of}", runs=[score.fd for score in found])


def cautions(n: int, dim: int, name: str, protocol_name: ProtocolName = "fd_fmnist_cnn") -> list[str]:
    """Warnings that belong beside the scores of n pictures."""
    found = []
    if protocol_name in INCEPTION and not name.startswith("fid "):
        found.append("These are not the published weights of Inception: the number is no FID.")
    if protocol_name in INCEPTION and n != INCEPTION[protocol_name].images:
        found.append(f"The papers' {protocol_name} takes {INCEPTION[protocol_name].images:,} pictures, this is {n:,}.")
    if n < 10 * dim:
        found.append(
            f"{n:,} pictures are fewer than 10 per dimension of {name} ({dim}): the distances are biased upwards."
        )
    if n < TRUSTED_IMAGES:
        found.append(
            f"{n:,} pictures are fewer than {TRUSTED_IMAGES:,}: compare with the floor, not with other papers."
        )
    return found


def judge_of(
    name: ProtocolName, weights: Path | None, reference: Path | None, device: torch.device
) -> tuple[Extractor, Reference]:
    """Network and reference of a protocol; the embedded ones bring their own."""
    extractor = load_extractor(name, device, weights)
    if reference is not None:
        opened = open_reference(reference, extractor)
        if extractor.name == "cmmd" and len(opened.features) < (opened.size or 1):
            raise UserError(f"--reference: cmmd compares with every picture, and {reference} keeps some: give a folder")
        return extractor, opened
    if name.startswith("fd_") and name != "fd_dinov2":
        return extractor, load_reference(name)
    usual = INCEPTION[name].reference if name in INCEPTION else "a folder of real pictures"
    raise UserError(f"--reference: the protocol {name} needs one; the papers compare with {usual}")
