"""Pictures as files: the settings travel inside them, and what people upload is read with care."""

import atexit
import io
import math
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from app.ask import Ask
from models.controlnet import edges
from models.errors import BadSample, UserError
from models.pictures import decode
from models.pictures import opened as opened_picture

KEY = "one-step-studio"
"""Name of the settings among a PNG's texts; a JPEG has them as its description."""
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP")
QUALITY = 95
MOST_FILES = 4096
"""Files that are served at a time; a page that made as many since has to ask anew."""
MOST_SERVED = 2**30
"""Bytes of these files; the latest is kept however large it is."""

Format = Literal["png", "jpeg"]


def mosaic(pictures: Tensor) -> Image.Image:
    """uint8 (B, C, H, W) side by side in rows of ceil(sqrt(B)), without gaps; places left over are black."""
    b, c, h, w = pictures.shape
    columns = math.ceil(math.sqrt(b))
    rows = math.ceil(b / columns)
    whole = torch.zeros(rows * columns, 3, h, w, dtype=torch.uint8)
    whole[:b] = pictures.expand(-1, 3, -1, -1) if c == 1 else pictures
    whole = whole.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    return Image.fromarray(whole.numpy())


def encode(picture: Image.Image, settings: str | None, kind: Format) -> bytes:
    """PNG, or JPEG of quality 95, with ``settings`` inside."""
    buffer = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if settings is not None:
            info.add_text(KEY, settings)
        picture.save(buffer, "png", pnginfo=info, compress_level=1)
    else:
        exif = Image.Exif()
        if settings is not None:
            exif[ExifTags.Base.ImageDescription] = settings
            exif[ExifTags.Base.Software] = KEY
        picture.save(buffer, "jpeg", quality=QUALITY, subsampling=0, exif=exif)
    return buffer.getvalue()


_served: OrderedDict[Hashable, tuple[Path, int]] = OrderedDict()
"""Files and their sizes by what they are copies of, else by their paths; the least recently used first."""
_serving, _copying = threading.Lock(), threading.Lock()


@cache
def cache_folder() -> Path:
    """The one folder that this process serves files from, empty at first and gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix="one-step-studio-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def serve(data: bytes, name: str, source: Hashable = None) -> str:
    """Write ``data`` as a file that the app serves, under a path that nobody can guess.

    The latest :data:`MOST_FILES` files of :data:`MOST_SERVED` bytes are kept. ``source``: what it is a copy of.
    """
    path = Path(tempfile.mkdtemp(dir=cache_folder())) / name
    path.write_bytes(data)
    with _serving:
        _served[source or path] = path, len(data)
        _served.move_to_end(source or path)
        while len(_served) > MOST_FILES or (len(_served) > 1 and sum(n for _, n in _served.values()) > MOST_SERVED):
            _, (oldest, _) = _served.popitem(last=False)
            shutil.rmtree(oldest.parent, ignore_errors=True)
    return str(path)


def serve_copy(path: Path) -> str:
    """Serve a copy of a file as it is now; one copy does until the file changes."""
    with _copying:
        stat = path.stat()
        source = path, stat.st_mtime_ns, stat.st_size
        with _serving, suppress(FileNotFoundError):  # Gradio deletes what nobody touched for an hour
            if source in _served:
                copy, _ = _served[source]
                os.utime(copy)
                _served.move_to_end(source)
                return str(copy)
        return serve(path.read_bytes(), path.name, source)


def read_bytes(path: str) -> bytes:
    """An upload; UserError if it is too large, or gone."""
    file = Path(path)
    if not file.is_file():
        raise UserError("the upload is not there any more: send it again")
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"the file has {file.stat().st_size / 2**20:.0f} MB; {MAX_BYTES // 2**20} are the most")
    return file.read_bytes()


def opened(data: bytes) -> Image.Image:
    """A picture, its header alone; UserError if it is none, or has too many pixels."""
    try:
        return opened_picture(data, "the file", FORMATS, MAX_PIXELS)
    except BadSample as error:
        if "too many pixels" in str(error):
            raise
        raise UserError("the file cannot be read as a picture (PNG, JPEG, WebP or BMP)") from error


def decoded(data: bytes, mode: Literal["RGB", "L"]) -> Image.Image:
    """An upload upright and on white; UserError if it is none, too large or damaged."""
    opened(data).close()
    try:
        return decode(data, "the file", mode)
    except BadSample as error:
        raise UserError("the picture is damaged: it cannot be read to its end") from error


def flattened(source: io.BytesIO, side: int) -> Image.Image:
    """A picture in gray on white, of ``side`` x ``side`` pixels, each the mean of those that it stands for."""
    return decoded(source.getvalue(), "L").resize((side, side), Image.Resampling.BOX)


def read_settings(path: str) -> Ask:
    """The settings in a file that this studio made; UserError if it has none."""
    with opened(read_bytes(path)) as picture:
        # A PNG's texts that stand before its pixels; those behind them would need all pixels to be read.
        written = picture.info.get(KEY) if picture.format == "PNG" else None
        if picture.format == "JPEG":
            exif = picture.getexif()
            written = exif.get(ExifTags.Base.ImageDescription) if exif.get(ExifTags.Base.Software) == KEY else None
    if not isinstance(written, str):
        raise UserError("this picture carries no settings of this studio")
    return Ask.from_json(written)


def read_photograph(path: str, side: int) -> Tensor:
    """Edges (1, 1, side, side) of an uploaded photograph, 1 on -1."""
    picture = decoded(read_bytes(path), "RGB")
    picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return edges(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1)
