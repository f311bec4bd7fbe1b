"""One picture with its class or captions, and a batch of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.bad_samples import BadSamples
from distill.data.batch import Batch
from models.condition import Condition
from models.errors import BadSample
from models.pictures import Background, decode
from models.prompts import settled


def to_tensor(image: Image.Image, size: int, channels: int, background: Background = "white") -> Tensor:
    """Shorter side to ``size``, centre crop; (C, size, size) in [-1, 1]. As it lies: nothing is turned."""
    return fitted(decode(image, "picture", mode_of(channels), upright=False, background=background), size)


def mode_of(channels: int) -> Literal["RGB", "L"]:
    return "RGB" if channels == 3 else "L"


def fitted(image: Image.Image, size: int) -> Tensor:
    """As :func:`to_tensor`, of what is decoded already."""
    scale = size / min(image.size)
    if max(image.size) > 16 * min(image.size):  # long before it is resized to far more than what is kept of it
        half = 8 * min(image.size)
        x, y = (max(0, side // 2 - half) for side in image.size)
        image = image.crop((x, y, min(image.width, x + 2 * half), min(image.height, y + 2 * half)))
    if scale != 1:
        resized = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).reshape(size, size, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class Sample:
    """A picture (C, H, W) in [-1, 1] with its class, or with its captions."""

    image: Tensor
    label: int = 0
    captions: tuple[str, ...] = ()


def collate(samples: Sequence[Sample], told: bool) -> Batch:
    """A batch of samples with captions, or with classes."""
    images = torch.stack([sample.image for sample in samples])
    if not told:
        return Batch(images, Condition(class_ids=torch.tensor([sample.label for sample in samples])))
    choices = tuple(sample.captions for sample in samples)
    several = any(len(texts) > 1 for texts in choices)
    return Batch(images, Condition(), tuple(map(settled, choices)), choices=choices if several else ())


def following(index: int, labels: Tensor) -> Iterator[int]:
    """``index``, then the other indices of its label, beginning with the next."""
    yield index
    same = (labels == labels[index]).nonzero().squeeze(1).tolist()
    place = same.index(index)
    yield from same[place + 1 :] + same[:place]


def all_texts(read: Callable[[Any], tuple[str, ...]], values: Sequence[Any], bad: BadSamples) -> list[str]:
    """All that pictures may be told, in order, without those that cannot be used."""
    found: list[str] = []
    for value in values:
        try:
            found += read(value)
        except BadSample as error:
            bad.meet(error)
    return found
