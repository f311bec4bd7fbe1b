"""The one decoder of pictures, for files, rows of data sets and uploads alike: 8 bits, upright, without alpha.

Numbers of more than 8 bits are scaled from their whole range: 16 bits as v / 257, floating point from [0, 1]. What has
no known range (32-bit integers, floating point beyond [0, 1]) is refused rather than guessed.
"""

import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from models.errors import BadSample

Background = Literal["white", "black", "gray"]
"""What shows through transparent pixels."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")
"""Those that are read, whatever a file's name says; no format that runs a program (EPS), none without a signature."""

MOST_PIXELS = 178_000_000
"""A little below PIL's own limit."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # beyond PIL's limit there is an error

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture of this EXIF orientation upright."""

_PHOTOMETRIC, _BITS = 262, 258
"""TIFF's tags."""


@cache
def formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def opened(data: bytes, name: str, only: tuple[str, ...] | None = None, most: int = MOST_PIXELS) -> Image.Image:
    """A picture, its header alone; BadSample if it is none, not of ``only`` these, or of more than ``most`` pixels."""
    if not data:
        raise BadSample(f"{name} is not a readable picture: it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=only or formats())
    except Image.UnidentifiedImageError as error:
        known = ", ".join(only or formats())
        raise BadSample(f"{name} is not a readable picture: it is none of {known}, or damaged") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, most) from error
    except Exception as error:  # whatever a plugin raises on bytes that are not as it expects
        raise _bad(name, error) from error
    if image.width * image.height > most:
        raise _too_large(name, most)
    return image


def decode(
    source: bytes | Path | Image.Image,
    name: str,
    mode: Literal["RGB", "L"] = "RGB",
    *,
    upright: bool = True,
    background: Background = "white",
) -> Image.Image:
    """The picture in ``source``, of 8 bits in ``mode``, on ``background`` where it is transparent; of frames the first.

    ``upright`` applies the orientation that EXIF states. Texts and colour profiles in a PNG are passed over, whatever
    their size. BadSample, in one line with ``name``, for every way in which a picture can be damaged.
    """
    image, key, turn = _read(source, name, _without_texts)
    try:
        flat = _opaque(image, key, mode, background)
        return flat if turn is None or not upright else flat.transpose(turn)
    except Exception as error:
        raise _bad(name, error) from error


def raw(path: Path, marks: Counter[str] | None = None) -> Image.Image:
    """RGB as the published protocols of evaluation read a file: not turned, colours that alpha hides as they are.

    Of more than 8 bits, which they clip, scaled as by :func:`decode`. ``marks`` counts pictures that state an
    orientation, or can be transparent. BadSample as there, and for a PNG whose texts are longer than PIL reads.
    """
    image, key, turn = _read(path, str(path), _checked)
    if marks is not None:
        marks.update({"orientation": turn is not None, "alpha": key is not None or _has_alpha(image)})
    try:
        return image.convert("RGBA").convert("RGB") if image.mode == "RGBa" else image.convert("RGB")
    except Exception as error:
        raise _bad(str(path), error) from error


Key = int | tuple[int, ...] | bytes | None
"""What PIL calls transparency: a colour, or alpha by palette entry."""


def _read(
    source: bytes | Path | Image.Image, name: str, prepare: Callable[[bytes], bytes]
) -> tuple[Image.Image, Key, Image.Transpose | None]:
    """Pixels of 8 bits, the transparent colour, and what turns them upright."""
    try:
        if isinstance(source, Path):
            if not source.is_file():
                raise OSError("there is no such file")
            source = source.read_bytes()
        image = source if isinstance(source, Image.Image) else opened(prepare(source), name)
        stored = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return *_eight_bits(image, stored), turn
    except BadSample:
        raise
    except Exception as error:
        raise _bad(name, error) from error


def _bad(name: str, error: Exception) -> BadSample:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "MAX_TEXT" in reason:
        reason = "its texts or colour profile are longer than PIL reads: save it without them"
    return BadSample(f"{name} is not a readable picture: {reason}")


def _too_large(name: str, most: int) -> BadSample:
    return BadSample(f"{name} has too many pixels; {most // 10**6} million are the most: make it smaller")


_PNG = b"\x89PNG\r\n\x1a\n"
_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type")
"""Texts of a PNG that may state its orientation."""


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kinds, first and last byte of a PNG's parts, up to the last; ValueError if one is damaged or missing."""
    place, view = len(_PNG), memoryview(data)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ValueError(f"its part {kind.decode('latin-1')!r} is damaged (checksum)")
        yield kind, place, end
        if kind == b"IEND":
            return
        place = end
    raise ValueError("it is cut off")


def _checked(data: bytes) -> bytes:
    """``data``; ValueError for a PNG with a damaged or missing part, which PIL may read without a word."""
    if data.startswith(_PNG):
        for _ in _chunks(data):
            pass
    return data


def _without_texts(data: bytes) -> bytes:
    """A PNG without what PIL would only read to refuse it: workflows in its texts, large colour profiles."""
    if not data.startswith(_PNG):
        return data
    kept = [
        data[first:end]
        for kind, first, end in _chunks(data)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or data.startswith(_TURNING, first + 8)
    ]
    return _PNG + b"".join(kept)


def _has_alpha(image: Image.Image) -> bool:
    return image.has_transparency_data


def _eight_bits(image: Image.Image, stored: object) -> tuple[Image.Image, Key]:
    """The picture in a mode of 8 bits, and its transparent colour in them; ``stored`` is PIL's name of the file's."""
    key: Key = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        flat = Image.fromarray(_bytes(image, values))
        if isinstance(key, int) and image.mode != "F" and (clear := values == key).any():
            flat.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        return flat, None
    if image.mode == "LAB":
        raise ValueError("colours in CIELAB are not read: save it as RGB")
    if isinstance(key, int) and stored in ("L;2", "L;4"):  # PIL scales these pixels, and leaves the colour
        key *= 85 if stored == "L;2" else 17
    elif isinstance(key, tuple) and stored == "RGB;16B":
        key = tuple(value >> 8 for value in key)
    return image.convert("LA") if image.mode == "La" else image, key


def _opaque(image: Image.Image, key: Key, mode: Literal["RGB", "L"], background: Background) -> Image.Image:
    """``image`` on ``background``, without alpha."""
    if key is None and not _has_alpha(image):
        return image.convert(mode)
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    rgba = image.convert("RGBA")
    behind = Image.new("RGBA", rgba.size, background)
    return Image.alpha_composite(behind, rgba).convert("RGB").convert(mode)


def _bytes(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """uint8 of 16-bit, 32-bit or floating-point ``values``; ValueError where their range is not known."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError("floating-point values are not all in [0, 1]: save it in 8 or 16 bits")
        most = 1.0
    elif image.mode == "I" and (tags or values.min() < 0 or values.max() > 65535):
        raise ValueError("integers of 32 bits, or signed ones, have no agreed white: save it in 8 or 16 bits")
    else:
        bits = tags.get(_BITS, (16,))
        most = float(2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1)
    scaled = np.round(values.astype(np.float64) * (255 / most)).clip(0, 255).astype(np.uint8)
    return 255 - scaled if tags.get(_PHOTOMETRIC) == 0 else scaled  # white is zero
