"""Folders of pictures: which files are counted, and how they are read, both as the published protocols do it.

Counted are clean-fid's suffixes, in linked folders too and not in hidden ones; what is left out is said. Pixels are
those of the file: neither EXIF's orientation nor alpha is applied, which is said too. Training pictures are read
otherwise (distill/data/): upright, and composed on a colour.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval.machine import share
from models.errors import UserError
from models.pictures import decode, raw

EVALUATED = frozenset(["bmp", "jpg", "jpeg", "JPEG", "JPG", "pgm", "png", "PNG", "ppm", "tif", "tiff", "webp", "npy"])
"""Suffixes that clean-fid counts, in its letters."""
TOOLS = frozenset(
    ["__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
)
"""Folders that programs leave behind under a name that does not begin with a dot."""
TOOL_FILES = frozenset(["thumbs.db", "desktop.ini"])


@dataclass
class Walk:
    """What lies in a folder: ``files`` that count as data, ``folders`` below it, and what was left out, by reason."""

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, []).append(path)

    def said(self) -> str:
        """What was left out, with a count and an example of each reason; empty if nothing was."""
        return ", ".join(f"{len(paths)} {reason} ({paths[0].name})" for reason, paths in self.left_out.items())


def walk(folder: Path, tools: bool = False) -> Walk:
    """All visible files below ``folder``, in linked folders too, each loop of links once.

    Hidden files and folders, and with ``tools`` those that programs leave behind, are left out, a folder as one.
    UserError for a folder that cannot be read.
    """
    found = Walk()
    _walk(folder, tools, found, (os.path.realpath(folder),))
    found.files.sort()
    return found


def _walk(folder: Path, tools: bool, found: Walk, above: tuple[str, ...]) -> None:
    try:
        with os.scandir(folder) as entries:
            inner = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in inner:
        path = folder / entry.name
        tool = tools and (entry.name in TOOLS or entry.name.lower() in TOOL_FILES)
        if entry.name.startswith(".") or tool:
            found.leave("hidden or made by a program", path)
        elif not _is_folder(entry):
            found.files.append(path)
        elif (real := os.path.realpath(path)) in above:
            found.leave("links back to a folder around them", path)
        else:
            found.folders.append(path)
            _walk(path, tools, found, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def warn_left_out(folder: Path, found: Walk) -> None:
    """A line on what was left out, by the first process, once."""
    if said := found.said():
        warn(f"{folder}: {len(found.files)} pictures are read; left out: {said}")


@cache
def warn(line: str) -> None:
    """A line on stderr, by the first process, once."""
    if share()[0] == 0:
        print(f"warning: {line}", file=sys.stderr)


def picture_files(folder: Path) -> list[Path]:
    """All pictures that clean-fid counts in a folder, by name; UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = walk(folder)
    every, found.files = found.files, []
    for path in every:
        if path.suffix[1:] in EVALUATED:
            found.files.append(path)
        else:
            found.leave("of another suffix", path)
    if not found.files:
        raise UserError(f"{folder} has no pictures ({', '.join(sorted(EVALUATED))}; {found.said() or 'it is empty'})")
    warn_left_out(folder, found)
    return found.files


def read_picture(path: Path, marks: Counter[str] | None = None) -> Tensor:
    """uint8 (3, H, W) as published protocols read it (:func:`models.pictures.raw`); ``.npy`` holds uint8 (H, W, 3).

    UserError for a file that is no picture.
    """
    return _array(path) if path.suffix == ".npy" else _tensor(raw(path, marks))


def read_upright(path: Path) -> Tensor:
    """uint8 (3, H, W) as training reads it: upright, on white (:func:`models.pictures.decode`)."""
    return _array(path) if path.suffix == ".npy" else _tensor(decode(path, str(path)))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _array(path: Path) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
        if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
            raise ValueError(f"{values.dtype} of shape {values.shape}, not uint8 of (H, W, 3)")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error
    return torch.from_numpy(values).permute(2, 0, 1)


def batches(files: list[Path], batch: int, description: str | None = None) -> Iterator[Tensor]:
    """uint8 batches (B, 3, H, W) in the order of ``files``; a batch ends early where the size changes."""
    waiting: list[Tensor] = []
    marks: Counter[str] = Counter()
    for path in tqdm(files, desc=description, unit="picture", disable=description is None):
        image = read_picture(path, marks=marks)
        if waiting and (len(waiting) == batch or waiting[0].shape != image.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)
    if marks.total():
        print(
            f"warning: of {len(files)} pictures {marks['orientation']} state an orientation and {marks['alpha']} are "
            "transparent; neither is applied, as in the published protocols",
            file=sys.stderr,
        )
