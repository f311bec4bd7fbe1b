"""Folders of pictures as batches for an extractor."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from models.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def picture_files(folder: Path) -> list[Path]:
    """All pictures in a folder and those in it, by name; UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def read_picture(path: Path) -> Tensor:
    """uint8 (3, H, W); UserError for a file that is no picture."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def batches(files: list[Path], batch: int, description: str | None = None) -> Iterator[Tensor]:
    """uint8 batches (B, 3, H, W) in the order of ``files``; a batch ends early where the size changes."""
    waiting: list[Tensor] = []
    for path in tqdm(files, desc=description, unit="picture", disable=description is None):
        image = read_picture(path)
        if waiting and (len(waiting) == batch or waiting[0].shape != image.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)
