"""Radiance fields behind one interface: points of a box to density and colour.

A field sees points scaled to [-1, 1]^3. Steps of Adam are equal for all parameters, but a grid wants ten times those
of a decoder: grids are stored divided by :data:`GAIN`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError

GAIN = 10.0
"""Of a grid's values over its stored parameters."""


@dataclass(frozen=True)
class Box:
    """A cube of half side ``half`` around ``centre``, world units: there is nothing outside."""

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    half: float = 1.0

    def scaled(self, points: Tensor) -> Tensor:
        """World points (..., 3) to [-1, 1]^3."""
        return (points - points.new_tensor(self.centre)) / self.half

    def world(self, scaled: Tensor) -> Tensor:
        """The inverse of :meth:`scaled`."""
        return scaled * self.half + scaled.new_tensor(self.centre)


@dataclass(frozen=True)
class Blob:
    """Density at the start: ``softplus(strength (1 - |x - centre| / radius))`` (ProlificDreamer, arXiv 2305.16213).

    A positive strength is an object; a negative one a hollow scene with the cameras inside. Scaled units of the box.
    """

    strength: float = 10.0
    radius: float = 0.5
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, scaled: Tensor) -> Tensor:
        distance = (scaled - scaled.new_tensor(self.centre)).norm(dim=-1)
        return self.strength * (1 - distance / self.radius)


class Field(nn.Module, ABC):
    """``field(points)``: density (N,), 1 / world unit and not negative, and RGB (N, 3) in [0, 1], at points (N, 3);
    never in bfloat16."""

    def __init__(self, box: Box, blob: Blob):
        super().__init__()
        self.box, self.blob = box, blob

    @abstractmethod
    def raw(self, scaled: Tensor) -> Tensor:
        """(N, 4) at points (N, 3) of [-1, 1]^3: density's and colour's before their activations."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self.box.scaled(points)
        with torch.autocast(points.device.type, enabled=False):
            raw = self.raw(scaled)
        return F.softplus(raw[:, 0] + self.blob(scaled)) / self.box.half, torch.sigmoid(raw[:, 1:])

    def density(self, points: Tensor) -> Tensor:
        """(N,)."""
        return self(points)[0]


def _decoder(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 4))


class TriPlane(Field):
    """Features of three axis-aligned planes, summed, and a small decoder (EG3D, arXiv 2112.07945). Fastest on a CPU."""

    def __init__(self, box: Box, blob: Blob, side: int = 64, channels: int = 16, width: int = 32):
        super().__init__(box, blob)
        self.planes = nn.Parameter(torch.randn(3, channels, side, side) * (0.1 / GAIN))
        self.decoder = _decoder(channels, width)

    def raw(self, scaled: Tensor) -> Tensor:
        at = torch.stack([scaled[:, [0, 1]], scaled[:, [0, 2]], scaled[:, [1, 2]]])[:, None]
        features = F.grid_sample(self.planes, at, align_corners=True, padding_mode="border")[:, :, 0]
        return self.decoder(GAIN * features.sum(0).T)


class Voxels(Field):
    """A dense grid of the four raw values."""

    def __init__(self, box: Box, blob: Blob, side: int = 48):
        super().__init__(box, blob)
        self.grid = nn.Parameter(torch.zeros(1, 4, side, side, side))

    def raw(self, scaled: Tensor) -> Tensor:
        at = scaled.view(1, 1, 1, -1, 3)
        return GAIN * F.grid_sample(self.grid, at, align_corners=True, padding_mode="border").view(4, -1).T


class HashEncoding(nn.Module):
    """Multi-resolution hash encoding (Instant-NGP, arXiv 2201.05989), with tiny-cuda-nn's grid and hash.

    ``encoding(x)``: (N, levels * 2) features at points (N, 3) of [0, 1]^3.
    """

    def __init__(self, levels: int, log_table: int, coarsest: int, finest: int):
        super().__init__()
        self.log_table = log_table
        self.growth = math.exp(math.log(finest / coarsest) / max(1, levels - 1))
        scales = [coarsest * self.growth**level - 1 for level in range(levels)]
        sides = [math.ceil(scale) + 1 for scale in scales]
        sizes = [min(2**log_table, -(-(side**3) // 8) * 8) for side in sides]
        self.dense = [side**3 <= size for side, size in zip(sides, sizes, strict=True)]
        self.sides, self.sizes, self.scales = sides, sizes, scales
        self.table = nn.Parameter(torch.empty(sum(sizes), 2).uniform_(-1e-4, 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        corners = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], dtype=torch.int32, device=x.device)
        primes = x.new_tensor([1, -1640531535, 805459861], dtype=torch.int32)  # products wrap, as unsigned ones do
        features, start = [], 0
        for scale, side, size, dense in zip(self.scales, self.sides, self.sizes, self.dense, strict=True):
            place = x * scale + 0.5
            low = place.floor()
            part = (place - low)[:, None]
            weight = torch.where(corners.bool(), part, 1 - part).prod(-1)
            index = low.int()[:, None] + corners
            if dense:
                stride = x.new_tensor([1, side, side**2], dtype=torch.int32)
                key = (index * stride).sum(-1, dtype=torch.int32) % size
            else:
                a, b, c = (index * primes).unbind(-1)
                key = (a ^ b ^ c) & (size - 1)
            values = self.table.index_select(0, key.flatten() + start).view(*key.shape, 2)
            features.append((values * weight[..., None]).sum(1))
            start += size
        return torch.cat(features, 1)


class HashGrid(Field):
    """A hash encoding and a small decoder; for a GPU. ``fused``: tiny-cuda-nn's kernel in the place of torch's."""

    def __init__(
        self,
        box: Box,
        blob: Blob,
        levels: int = 16,
        log_table: int = 19,
        coarsest: int = 16,
        finest: int = 2048,
        width: int = 64,
        fused: bool = False,
    ):
        super().__init__(box, blob)
        self.encoding: nn.Module = HashEncoding(levels, log_table, coarsest, finest)
        self.decoder = _decoder(2 * levels, width)
        if fused:
            self.fuse()

    def fuse(self) -> None:
        """Let tiny-cuda-nn do the work from here on; UserError where it is not installed."""
        if isinstance(self.encoding, HashEncoding):
            self.encoding = fused_encoding(self.encoding)

    def raw(self, scaled: Tensor) -> Tensor:
        features = self.encoding((scaled * 0.5 + 0.5).clamp(0, 1))
        return self.decoder(GAIN * features.to(scaled.dtype))


def fused_encoding(encoding: HashEncoding) -> nn.Module:
    """tiny-cuda-nn's encoding with the values of ``encoding``; UserError where it is not installed."""
    try:
        import tinycudann  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:
        raise UserError(
            "method.field.fused: tiny-cuda-nn cannot be imported; set it to false (see `python -m models.scene.doctor`)"
        ) from error
    settings = {
        "otype": "HashGrid",
        "n_levels": len(encoding.sides),
        "n_features_per_level": 2,
        "log2_hashmap_size": encoding.log_table,
        "base_resolution": encoding.sides[0],
        "per_level_scale": encoding.growth,
    }
    fused = tinycudann.Encoding(3, settings, dtype=torch.float32)
    with torch.no_grad():
        fused.params.copy_(encoding.table.flatten())
    return fused


@dataclass(frozen=True)
class FieldSizes:
    """What kind of field of which size; numbers that a kind has no use for are ignored.

    side, channels: of planes or voxels
    width:          of the decoder
    levels, log_table, coarsest, finest, fused: of a hash grid
    """

    kind: Literal["triplane", "voxels", "hash"] = "triplane"
    side: int = 64
    channels: int = 16
    width: int = 32
    levels: int = 16
    log_table: int = 19
    coarsest: int = 16
    finest: int = 2048
    fused: bool = False

    def new(self, box: Box, blob: Blob) -> Field:
        """A field with random weights."""
        match self.kind:
            case "triplane":
                return TriPlane(box, blob, self.side, self.channels, self.width)
            case "voxels":
                return Voxels(box, blob, self.side)
            case "hash":
                sizes = (self.levels, self.log_table, self.coarsest, self.finest)
                return HashGrid(box, blob, *sizes, self.width, self.fused)
