"""GenEval's detector for the solids world: which solids are in a picture, where, and of what colour.

A small network names the shape and the colour of every pixel; pixels that touch are one solid, since the world's solids
never touch. ``python -m distill.detector`` trained it on true renders, where the answers are known.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from eval.features import REFERENCES, file_digest
from eval.geneval.judge import Detection, Options
from models.errors import UserError
from models.scene.captions import COLOURS, SHAPES

WEIGHTS = REFERENCES / "solids_detector.safetensors"
OPTIONS = Options(threshold=0.5, counting_threshold=0.5)
"""A detection's score is the mean probability of its shape over its pixels: half of it must be sure."""
SMALLEST = 12
"""Pixels that a solid has at least; the smallest that a true render shows has about 50."""


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SolidsNetwork(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to logits (B, 1 + shapes + colours, H, W); the first is the background's."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96)):
        super().__init__()
        self.enter = nn.Conv2d(12, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(Residual(a), nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in pairwise(widths)
        )
        self.middle = nn.Sequential(Residual(widths[-1]), Residual(widths[-1]))
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in pairwise(widths))
        self.leave = nn.Sequential(Residual(widths[0]), nn.Conv2d(widths[0], 4 * (1 + len(SHAPES) + len(COLOURS)), 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.enter(F.pixel_unshuffle(pictures, 2))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(x) + skip
        return F.pixel_shuffle(self.leave(x), 2)


def components(mask: Tensor) -> Tensor:
    """Numbers (B, H, W) of the connected parts of masks (B, H, W): 0 outside, else a number of each part's own.

    Pixels are joined by their sides.
    """
    number = torch.arange(1, mask[0].numel() + 1, device=mask.device).reshape(mask.shape[1:]) * mask
    while True:
        padded = F.pad(number, (1, 1, 1, 1))
        sides = padded[:, 1:-1, :-2], padded[:, 1:-1, 2:], padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]
        spread = torch.stack([number, *sides]).amax(0) * mask
        if torch.equal(spread, number):
            return number
        number = spread


class SolidsDetector:
    """``detector(images)`` finds the solids in uint8 pictures and says who names the colour of each."""

    name = "solids"

    def __init__(self, weights: Path = WEIGHTS, device: torch.device | str = "cpu"):
        if not weights.is_file():
            raise UserError(f"{weights} is missing: make it with `python -m distill.detector`")
        self.sha256, self.device = file_digest(weights), device
        self.network = SolidsNetwork()
        self.network.load_state_dict(load_file(weights))
        self.network.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[tuple[list[Detection], Callable[[Detection], str]]]:
        """For each of ``images`` (B, 3, H, W) uint8: its detections, best first, and who names their colours."""
        logits = self.network(images.to(self.device).float() / 127.5 - 1)
        shapes = logits[:, : 1 + len(SHAPES)].softmax(1)
        colours = logits[:, 1 + len(SHAPES) :].log_softmax(1)
        parts = components(shapes[:, 0] < 0.5).cpu()
        return [self._solids(*item) for item in zip(shapes.cpu(), colours.cpu(), parts, strict=True)]

    @staticmethod
    def _solids(shapes: Tensor, colours: Tensor, parts: Tensor) -> tuple[list[Detection], Callable[[Detection], str]]:
        found: list[Detection] = []
        named: dict[int, str] = {}
        for number in parts.unique().tolist():
            mask = parts == number
            if number == 0 or int(mask.sum()) < SMALLEST:
                continue
            mean = shapes[1:, mask].mean(1)
            best = int(mean.argmax())
            detection = Detection(SHAPES[best], _box(mask.numpy()), float(mean[best]), mask.numpy())
            named[id(detection)] = COLOURS[int(colours[:, mask].mean(1).argmax())]
            found.append(detection)
        return sorted(found, key=lambda d: -d.score), lambda detection: named[id(detection)]


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around a mask, ends exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
