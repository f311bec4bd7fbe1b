"""One decoder: depths, orientations, transparency, damage; and what evaluation counts in a folder."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from distill.data import ImageFolder
from eval.pictures import batches, picture_files, read_picture
from eval.text_to_image import read_lines
from models.errors import BadSample, UserError
from models.pictures import decode

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def content(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_from_their_whole_range(kind: str):
    made = np.asarray(decode(content(Image.fromarray(RAMP), kind), "x", "L"), np.float32)
    assert np.abs(made - RAMP / 257).max() < 0.51


def test_sixteen_bits_with_colour_and_the_other_byte_order():
    rows = b"".join(b"\0" + (RAMP[i].repeat(3) ^ 0).astype(">u2").tobytes() for i in range(8))
    assert np.abs(np.asarray(decode(png(8, 8, 16, 2, rows), "x"))[..., 1] - RAMP / 257).max() < 1.01
    big = content(Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()), "TIFF")
    assert np.abs(np.asarray(decode(big, "x", "L")) - RAMP / 257).max() < 0.51


def test_floating_point_is_read_from_zero_to_one_and_nothing_is_guessed():
    unit = Image.fromarray((RAMP / 65535).astype(np.float32))
    assert np.abs(np.asarray(decode(content(unit, "TIFF"), "x", "L")) - RAMP / 257).max() < 0.51
    for values in (np.float32(255) * RAMP / 65535, np.full((8, 8), np.nan, np.float32)):
        with pytest.raises(BadSample, match="not all in \\[0, 1\\]"):
            decode(content(Image.fromarray(values.astype(np.float32)), "TIFF"), "x")
    with pytest.raises(BadSample, match="no agreed white"):
        decode(content(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "x")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "La", "RGBa", "PA"])
def test_modes_of_eight_bits(mode: str):
    made = decode(Image.new("RGB", (8, 4), (255, 255, 255)).convert("RGBA").convert(mode) if mode in ("RGBA", "RGBa")
                  else Image.new(mode, (8, 4)), "x")  # fmt: skip
    assert made.mode == "RGB" and made.size == (8, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_sees_pictures_upright_and_evaluation_as_they_lie(tmp_path: Path, orientation: int):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        lying = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(decode(tmp_path / "a.jpg", "x")), upright)
    assert np.array_equal(read_picture(tmp_path / "a.jpg").permute(1, 2, 0).numpy(), lying)
    assert read_lines(tmp_path / "a.jpg", 16).shape == (1, 1, 16, 16)
    trained = ImageFolder(tmp_path, 8, 3).get([0]).images[0]
    fitted = Image.fromarray(upright).resize((16, 8) if upright.shape[0] < upright.shape[1] else (8, 16), 1)
    x, y = (fitted.width - 8) // 2, (fitted.height - 8) // 2
    wanted = torch.from_numpy(np.array(fitted.crop((x, y, x + 8, y + 8)))).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(trained, wanted, atol=1e-6)


def test_what_is_transparent_shows_the_stated_colour(tmp_path: Path):
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 255, 0, 255))
    cases = [content(hidden), content(hidden, "WEBP", lossless=True), content(hidden, "TIFF")]
    keyed = Image.new("RGB", (4, 4), (255, 0, 0))
    keyed.putpixel((0, 0), (0, 255, 0))
    cases += [content(keyed, transparency=(255, 0, 0))]
    palette = hidden.quantize(4)
    cases += [content(palette)]
    for data in cases:
        for background, value in (("white", 255), ("black", 0), ("gray", 128)):
            made = decode(data, "x", background=background)
            assert made.getpixel((0, 0)) == (0, 255, 0) and made.getpixel((3, 3)) == (value,) * 3
    (tmp_path / "a.png").write_bytes(cases[0])
    assert read_picture(tmp_path / "a.png")[:, 3, 3].tolist() == [255, 0, 0]  # as the protocols have it
    black = ImageFolder(tmp_path, 4, 3, background="black").get([0]).images[0]
    assert black[:, 3, 3].tolist() == [-1, -1, -1]


def test_transparent_colours_of_other_depths():
    deep = content(Image.fromarray(RAMP), transparency=0)
    assert decode(deep, "x", "L").getpixel((0, 0)) == 255 and decode(deep, "x", "L").getpixel((1, 0)) == 4
    nibbles = png(2, 1, 4, 0, b"\0\x3f", chunk(b"tRNS", struct.pack(">H", 3)))
    assert [decode(nibbles, "x", "L", background="black").getpixel((i, 0)) for i in range(2)] == [0, 255]
    wide = png(1, 1, 16, 2, b"\0" + b"\x12\x34" * 3, chunk(b"tRNS", b"\x12\x34" * 3))
    assert decode(wide, "x").getpixel((0, 0)) == (255, 255, 255)


def test_white_is_zero_and_twelve_bits_in_tiff():
    """Tags that PIL passes over."""
    data = bytearray(content(Image.fromarray(RAMP), "TIFF"))
    image = Image.open(io.BytesIO(bytes(data)))
    assert image.tag_v2[262] == 1  # type: ignore[attr-defined]
    place = next(i for i in range(len(data)) if data[i : i + 4] == struct.pack("<HH", 262, 3))
    data[place + 8] = 0
    made = np.asarray(decode(bytes(data), "x", "L"), np.float32)
    assert np.abs(255 - made - RAMP / 257).max() < 0.51


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "page": b"<html>404</html>",
    "resource fork": b"\0\5\x16\7" + b"\0" * 90,
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "cut png": content(Image.fromarray(RAMP))[:60],
    "no end": content(Image.fromarray(RAMP))[:-12],
    "cut jpeg": content(Image.effect_noise((64, 64), 50), "JPEG")[:700],
    "cut webp": content(Image.effect_noise((64, 64), 50), "WEBP")[:700],
    "cut bmp": content(Image.effect_noise((64, 64), 50), "BMP")[:700],
    "cut tiff": content(Image.effect_noise((64, 64), 50), "TIFF")[:700],
    "cut gif": content(Image.effect_noise((64, 64), 50), "GIF")[:700],
    "bad checksum": content(Image.fromarray(RAMP))[:-16] + b"\1\2\3\4" + chunk(b"IEND", b""),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "bomb": png(30000, 30000, 1, 0, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line_with_the_files_name(tmp_path: Path, name: str):
    path = tmp_path / "p" / "a.png"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[name])
    for read in (lambda: ImageFolder(path.parent, 8, 3).get([0]), lambda: read_picture(path)):
        with pytest.raises(UserError, match=r"a\.png") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_large_texts_and_profiles_are_no_damage_in_training(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * (2 << 20), zip=True)
    for name, options in (("text", {"pnginfo": info}), ("profile", {"icc_profile": b"x" * (2 << 20)})):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name / "a.png", **options)
        assert float(ImageFolder(tmp_path / name, 8, 3).get([0]).images.max()) == pytest.approx(9 / 127.5 - 1)
        with pytest.raises(UserError, match="longer than PIL reads"):
            read_picture(tmp_path / name / "a.png")


def test_an_xmp_orientation_survives_the_texts():
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet)
    assert decode(content(Image.new("L", (8, 4)), pnginfo=info), "x").size == (4, 8)


def test_very_long_pictures_do_not_fill_memory(tmp_path: Path):
    Image.new("L", (3, 60_000), 7).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, 512, 1).get([0]).images.shape == (1, 1, 512, 512)


# ------------------------------------------------------------------------------------------------- evaluation's folders


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_evaluation_counts_what_clean_fid_counts_and_names_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import glob

    from cleanfid.utils import EXTENSIONS

    folder = tmp_path / "pictures"
    for name in ("a.png", "b.tif", "c/d.PNG", "c/e.Jpg", "c/f.ppm", ".hidden.png", ".ipynb_checkpoints/a.png", "g.GIF"):
        picture(folder / name)
    for i in range(3):
        picture(tmp_path / f"disk/{i}.webp")
    os.symlink(tmp_path / "disk", folder / "more")
    os.symlink(folder, folder / "c" / "loop")
    (folder / "notes.txt").write_text("x")
    np.save(folder / "h.npy", np.full((8, 8, 3), 5, np.uint8))
    found = picture_files(folder)
    (folder / "c" / "loop").unlink()
    wanted = {p for e in EXTENSIONS for p in glob.glob(f"{folder}/**/*.{e}", recursive=True)}
    assert {str(path) for path in found} == wanted and found == sorted(found)
    said = capsys.readouterr().err
    assert "2 hidden or made by a program" in said and "3 of another suffix" in said and "1 links back" in said
    assert sum(len(batch) for batch in batches(found, 4)) == len(found)


def test_evaluation_says_what_it_does_not_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(tmp_path / "b.png")
    list(batches(picture_files(tmp_path), 4))
    assert "of 2 pictures 1 state an orientation and 1 are transparent; neither is applied" in capsys.readouterr().err


def test_a_dead_link_is_not_dropped(tmp_path: Path):
    picture(tmp_path / "a.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "b.png")
    assert len(picture_files(tmp_path)) == 2
    with pytest.raises(UserError, match=r"b\.png .*no such file"):
        list(batches(picture_files(tmp_path), 2))
