"""Whatever lies in files and folders: data, or one line; never a traceback, never a silent drop."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data import ImageFolder
from eval.pictures import TOOLS, picture_files, read_picture
from models.errors import BadSample, UserError
from models.pictures import decode
from models.prompts import captions, read_prompts

bounded = lambda examples: settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# ------------------------------------------------------------------------------------------------------------- pictures

SAVED = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["L", "P"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"],
    "PPM": ["1", "L", "RGB", "I;16"],
}
SIDES = st.sampled_from([1, 2, 7, 16, 33, 120])
DAMAGES = ["cut", "flip", "zero", "prefix", "nothing", "empty"]


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """A file's content, and what it was made of."""
    kind = draw(st.sampled_from(sorted(SAVED)))
    mode, width, height = draw(st.sampled_from(SAVED[kind])), draw(SIDES), draw(SIDES)
    level, orientation = draw(st.integers(0, 255)), draw(st.integers(0, 9))
    match mode:
        case "I;16":
            image = Image.fromarray(np.full((height, width), level * 257, np.uint16))
        case "I":
            image = Image.fromarray(np.full((height, width), level, np.int32))
        case "F":
            image = Image.fromarray(np.full((height, width), level / 255, np.float32))
        case "LAB" | "YCbCr":
            image = Image.new(mode, (width, height))
        case _:
            image = Image.new("RGB", (width, height), (level, level, level)).convert(mode)
    options: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data, damage = buffer.getvalue(), draw(st.sampled_from(["none", *DAMAGES]))
    place = draw(st.integers(0, len(data) - 1))
    match damage:
        case "cut":
            data = data[:place]
        case "flip":
            data = data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
        case "zero":
            data = data[:place] + b"\0" * (len(data) - place)
        case "prefix":
            data = b"<html>" + data
        case "empty":
            data = b""
    turned = "exif" in options and orientation in (5, 6, 7, 8)
    size = (height, width) if turned else (width, height)
    whole = damage in ("none", "nothing") and mode not in ("I", "LAB")
    return data, {"whole": whole, "size": size, "level": level, "mode": mode, "kind": kind, "damage": damage}


@bounded(250)
@given(files())
def test_any_file_is_a_picture_or_one_line(made: tuple[bytes, dict[str, Any]]):
    data, facts = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        path.write_bytes(data)
        try:
            image = decode(path, str(path))
        except BadSample as error:
            assert not facts["whole"] and "a.png" in str(error) and "\n" not in str(error)
            with pytest.raises(UserError, match=r"a\.png"):
                ImageFolder(path.parent, 8, 3).get([0])
            with pytest.raises(UserError, match=r"a\.png"):
                read_picture(path)
            return
        assert image.mode == "RGB"
        if facts["whole"]:
            assert image.size == facts["size"]
            if facts["mode"] not in ("1", "P", "YCbCr"):  # whose colours saving changed
                assert max(abs(v - facts["level"]) for v in image.getpixel((0, 0))) <= 3  # type: ignore[union-attr]
        elif facts["kind"] == "PNG" and facts["damage"] != "nothing":
            raise AssertionError("a damaged PNG was read without a word")
        for channels in (1, 3):
            batch = ImageFolder(path.parent, 8, channels).get([0])
            assert batch.images.shape == (1, channels, 8, 8) and float(batch.images.abs().max()) <= 1
        assert read_picture(path).shape[0] == 3


# ----------------------------------------------------------------------------------------------------------------- text

LINE = st.text(st.characters(exclude_characters="\n\0\ufeff", exclude_categories=["Cs"]), max_size=12)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "shift-jis"]


@bounded(150)
@given(st.lists(LINE, max_size=6), st.sampled_from(["\n", "\r\n"]), st.sampled_from(ENCODINGS), st.booleans())
def test_any_prompt_file_has_its_lines_or_is_refused(prompts: list[str], end: str, encoding: str, last: bool):
    text = end.join(prompts) + (end if last else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.txt"
        path.write_bytes(text.encode(encoding, errors="replace"))
        wanted = [line.strip() for line in prompts if line.strip()]
        try:
            found = read_prompts(path)
        except UserError as error:
            readable = encoding in ("utf-8", "utf-8-sig", "utf-16") or (text.isascii() and encoding != "utf-16-le")
            assert not (wanted and readable) and "p.txt" in str(error) and "\n" not in str(error)
            return
        if encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert found == wanted
        assert all(line and line == line.strip() for line in found)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["en", "de", "first"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def texts_in(value: Any) -> set[str]:
    match value:
        case str() | bytes():
            text = value.decode("utf-8-sig", "replace") if isinstance(value, bytes) else value
            return {text.strip().strip("\ufeff").strip()}
        case list():
            return {text for item in value for text in texts_in(item)}
        case dict():
            return {text for item in value.values() for text in texts_in(item)}
        case _:
            return set()


@bounded(100)
@given(VALUES, st.sampled_from([None, "first", "random", "en"]))
def test_any_caption_is_words_that_were_there_or_is_refused(value: Any, rule: str | None):
    try:
        found = captions(value, "sample 3", rule)
    except UserError as error:
        assert "sample 3" in str(error)
        return
    assert found and all(found) and (len(found) == 1 or rule == "random")
    assert all(isinstance(text, str) for text in found)
    assert not any(text.startswith(("[", "{", "None")) and text not in texts_in(value) for text in found)


# -------------------------------------------------------------------------------------------------------------- folders

FOLDERS = ["cat", "dog", "10", "2", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "deep"]
NAMES = [
    "a.png",
    "b.JPG",
    "c.tif",
    "._a.png",
    ".hidden.png",
    "a.txt",
    "notes.json",
    "Thumbs.db",
    "metadata.csv",
    "d.gif",
]
PATHS = st.lists(st.sampled_from(FOLDERS), max_size=2).flatmap(
    lambda parents: st.sampled_from([*NAMES, ""]).map(lambda name: "/".join([*parents, name]))
)
PICTURE = io.BytesIO()
Image.new("L", (8, 8)).save(PICTURE, "PNG")


def covered(path: Path, known: set[Path]) -> bool:
    return path in known or any(parent in known for parent in path.parents)


@bounded(200)
@given(st.sets(PATHS, max_size=8), st.sampled_from(["auto", "none"]), st.booleans())
def test_every_file_of_any_folder_is_data_or_named(paths: set[str], source: Any, skip: bool):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        for name in paths:
            path = folder / name
            if name.endswith("/") or not name:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"a cube" if path.suffix == ".txt" else PICTURE.getvalue())
        every = {path for path in folder.rglob("*") if path.is_file()}
        hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)
        try:
            counted = picture_files(folder)
        except UserError as error:
            assert "\n" not in str(error)
            counted = []
        assert set(counted) == {p for p in every if not hidden(p) and p.suffix in (".png", ".tif", ".JPG")}
        try:
            found = ImageFolder(folder, 8, 1, captions_from=source, skip=skip)
        except UserError as error:
            assert "\n" not in str(error)
            return
        used = {path for path, _ in found.files}
        if found.content.captions is not None:
            used |= {path.with_suffix(".txt") for path in used}
        left = {path for paths in found.content.walked.left_out.values() for path in paths}
        assert all(covered(path, used | left) for path in every) and not used & left
        tools = lambda path: hidden(path) or bool(TOOLS & set(path.relative_to(folder).parts))
        assert not [path for path, _ in found.files if tools(path)]
        if found.class_names and found.files[0][0].parent != folder:
            assert all(found.class_names[i] == p.relative_to(folder).parts[0] for p, i in found.files)
        assert len(found.get(list(range(len(found)))).images) == len(found)
