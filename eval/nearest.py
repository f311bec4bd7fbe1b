"""Has a generator learned pictures by heart? Its pictures beside the training pictures nearest to them."""

import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from eval.features import Extractor, extract, quantize
from eval.pictures import picture_files, read_upright
from models.errors import UserError

LOOKED_AT = 500
"""Generated pictures, and training pictures, whose nearest neighbour is asked for."""
QUANTILE = 0.01


class Training(typing.Protocol):
    """Training pictures: ``get(indices).images`` are (B, C, H, W) in [-1, 1]."""

    def __len__(self) -> int: ...

    def get(self, indices: list[int]) -> typing.Any: ...


class TrainingFolder:
    """Training pictures of one size in a folder, of as many channels as the generator's."""

    def __init__(self, folder: Path, channels: int):
        self.files, self.channels = picture_files(folder), channels

    def __len__(self) -> int:
        return len(self.files)

    def get(self, indices: list[int]) -> SimpleNamespace:
        read = [read_upright(self.files[index]) for index in indices]
        for index, picture in zip(indices, read, strict=True):
            if picture.shape != read[0].shape:
                raise UserError(f"--training: {self.files[index]} has another size than {self.files[indices[0]]}")
        images = torch.stack(read)
        return SimpleNamespace(images=images[:, : self.channels].float() / 127.5 - 1)


@dataclass(frozen=True)
class Nearest:
    """``pairs`` (n, 2, C, H, W) uint8: generated pictures and their nearest training pictures.

    closer:  share of generated pictures nearer to a training picture than 99 of 100 training pictures are to the
             nearest that differs from them; about 0.01 for pictures that are neither copies nor far off
    among:   number of training pictures
    """

    pairs: Tensor
    closer: float
    among: int


def nearest(
    generated: Tensor, real: Training, extractor: Extractor, among: int = 10000, shown: int = 10, seed: int = 0
) -> Nearest:
    """For uint8 pictures (n, C, H, W), in the extractor's features, among ``among`` random training pictures."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:among].tolist()
    known = extract(extractor, (quantize(real.get(order[i : i + 250]).images) for i in range(0, len(order), 250)))
    own = extract(extractor, generated[:LOOKED_AT].split(250))
    found = torch.cdist(own, known).min(1)
    apart = torch.cdist(known[:LOOKED_AT], known, compute_mode="donot_use_mm_for_euclid_dist")
    # A picture that is there twice is not its own neighbour: a copy is what is nearer than different pictures are.
    same = 1e-3 * apart.topk(2, largest=False).values[:, 1].median()
    usual = apart.masked_fill(apart <= same, torch.inf).amin(1)
    close = float((found.values < usual.quantile(QUANTILE)).float().mean())
    beside = quantize(real.get([order[i] for i in found.indices[:shown].tolist()]).images)
    return Nearest(torch.stack([generated[: len(beside)], beside], 1), close, len(order))
