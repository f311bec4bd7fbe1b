"""GenEval's detectors for the solids world: which solids are in a picture, where, and of what colour.

A small network names the shape and the colour of every pixel; pixels that touch are one solid, since the world's solids
never touch. ``python -m distill.workshop.detector`` trained it on true renders, where the answers are known. A second
network of another architecture, trained on other scenes, tells whether a score is the pictures' or the first judge's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from eval.features import REFERENCES, file_digest
from eval.geneval.judge import Detection, Options
from models.errors import UserError
from models.scene.captions import COLOURS, SHAPES
from models.scene.solids import boxes_around

WEIGHTS = REFERENCES / "solids_detector.safetensors"
OPTIONS = Options(threshold=0.5, counting_threshold=0.5)
"""A detection's score is the mean probability of its shape over its pixels: half of it must be sure."""
SECOND = REFERENCES / "solids_detector_second.safetensors"
SIDE = 64
"""Pixels a side that the detectors know; larger pictures are averaged down to it."""
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

    def features(self, pictures: Tensor) -> Tensor:
        """(B, widths[-1]): mean over the picture of the coarsest level."""
        x = self.enter(F.pixel_unshuffle(pictures, 2))
        for down in self.down:
            x = down(x)
        return self.middle(x).mean((2, 3))


class Mixing(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545): a depthwise convolution, then a perceptron at each place."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.around = nn.Conv2d(channels, channels, 5, padding=2 * dilation, dilation=dilation, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(self.around(x)))


class SecondNetwork(nn.Module):
    """The same answers as :class:`SolidsNetwork`, from 4 x 4 patches at one resolution, without levels or skips."""

    def __init__(self, width: int = 96, dilations: Sequence[int] = (1, 1, 2, 1, 3, 1, 2, 1)):
        super().__init__()
        self.enter = nn.Conv2d(3, width, 8, stride=4, padding=2)
        self.blocks = nn.Sequential(*(Mixing(width, dilation) for dilation in dilations))
        self.leave = nn.Sequential(
            nn.GroupNorm(1, width), nn.Conv2d(width, 16 * (1 + len(SHAPES) + len(COLOURS)), 3, padding=1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return F.pixel_shuffle(self.leave(self.blocks(self.enter(pictures))), 4)


def at_side(images: Tensor) -> Tensor:
    """uint8 pictures (B, 3, H, H) to float (B, 3, 64, 64) in [-1, 1]; UserError if H is no multiple of 64."""
    height, width = images.shape[-2:]
    if height != width or height % SIDE:
        raise UserError(
            f"pictures of {height} x {width}: the solids world's detectors take {SIDE} x {SIDE}, or multiples"
        )
    return F.avg_pool2d(images.float(), height // SIDE) / 127.5 - 1


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


@dataclass(frozen=True)
class Solid(Detection):
    """A detection that knows its colour."""

    colour: str = ""


def colour_of(detection: Detection) -> str:
    """The colour that the detector itself names."""
    return cast(Solid, detection).colour


def _load(network: nn.Module, weights: Path, device: torch.device | str) -> str:
    """Fill the network, move it, and return the SHA-256 of its file."""
    if not weights.is_file():
        raise UserError(f"{weights} is missing: make it with `python -m distill.workshop.detector`")
    network.load_state_dict(load_file(weights))
    network.eval().to(device)
    return file_digest(weights)


class SolidsDetector:
    """``detector(images)`` finds the solids in uint8 pictures, and knows their colours. ``second``: the other judge."""

    name, options = "geneval-solids", OPTIONS

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu", second: bool = False):
        self.device = device
        self.network = SecondNetwork() if second else SolidsNetwork()
        self.sha256 = _load(self.network, weights or (SECOND if second else WEIGHTS), device)
        self.protocol = {"judge": self.name, "detector_sha256": self.sha256}

    def colour_of(self, image: Tensor) -> Callable[[Detection], str]:
        """Names the colour of a solid that it found itself."""
        return colour_of

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[list[Solid]]:
        """The solids in each of ``images`` (B, 3, H, H) uint8, best first; boxes and masks are at 64 x 64."""
        logits = self.network(at_side(images.to(self.device)))
        shapes = logits[:, : 1 + len(SHAPES)].softmax(1)
        colours = logits[:, 1 + len(SHAPES) :].log_softmax(1)
        parts = components(shapes[:, 0] < 0.5).cpu()
        return [self._solids(*item) for item in zip(shapes.cpu(), colours.cpu(), parts, strict=True)]

    @staticmethod
    def _solids(shapes: Tensor, colours: Tensor, parts: Tensor) -> list[Solid]:
        found = []
        for number in parts.unique().tolist():
            mask = parts == number
            if number == 0 or int(mask.sum()) < SMALLEST:
                continue
            mean = shapes[1:, mask].mean(1)
            best, colour = int(mean.argmax()), COLOURS[int(colours[:, mask].mean(1).argmax())]
            x0, y0, x1, y1 = boxes_around(mask).tolist()
            found.append(Solid(SHAPES[best], (x0, y0, x1, y1), float(mean[best]), mask.numpy(), colour))
        return sorted(found, key=lambda solid: -solid.score)


class SolidsFeatures:
    """The detector's features of whole pictures, for distances between sets of them."""

    name = "fd_solids"
    dim, resize, shape = 96, f"mean to {SIDE} x {SIDE}", None

    def __init__(self, weights: Path = WEIGHTS, device: torch.device | str = "cpu"):
        self.device, self.network = device, SolidsNetwork()
        self.sha256 = _load(self.network, weights, device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.features(at_side(images.to(self.device))).float().cpu()
