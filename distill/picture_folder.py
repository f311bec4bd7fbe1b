"""What counts as data in a folder of pictures: classes, pictures, captions, and what is left out."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.class_names import ordered
from distill.settings.data import CaptionsFrom
from eval.pictures import Walk, walk, warn
from models.errors import BadSample, UserError
from models.json_text import read_json
from models.prompts import captions, decoded, lines

_NAMES = "bmp png jpg jpeg jpe jfif webp tif tiff pgm ppm pbm pnm gif avif jp2"
SUFFIXES = tuple(f".{name}" for name in _NAMES.split())
"""Of files that are taken for pictures, in any letters."""
METADATA = "metadata.jsonl"


@dataclass
class PictureFolder:
    """Pictures by class, or with captions, then all in one.

    files:     (picture, number of its class)
    names:     the classes' names; of pictures in no folders that of the folder itself; none for captions
    captions:  what the metadata say of each picture, or the path of its caption file; None for classes
    walked:    what was left out
    """

    files: list[tuple[Path, int]]
    names: list[str]
    captions: dict[Path, Any] | None = None
    walked: Walk = field(default_factory=Walk)
    rule: str | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        captions_from: CaptionsFrom = "auto",
        column: str = "text",
        rule: str | None = None,
        skip: bool = False,
    ) -> "PictureFolder":
        """UserError if there are no pictures, some in folders and some not, or captions that do not fit them.

        ``skip`` leaves out pictures without captions, and captions without pictures.
        """
        if not folder.is_dir():
            raise UserError(f"data.path: {folder} is not a folder")
        found = walk(folder, tools=True)
        pictures = [path for path in found.files if path.suffix.lower() in SUFFIXES]
        others = set(found.files) - set(pictures)
        if not pictures:
            said = f"; left out: {found.said()}" if found.left_out else ""
            raise UserError(f"data.path: no pictures ({', '.join(SUFFIXES)}) in {folder}{said}")
        told, used = _captions(folder, pictures, others, captions_from, column)
        if told is not None:
            pictures = _with_captions(folder, pictures, told, found, skip)
        for path in sorted(others - used):
            found.leave("no pictures", path)
        if told is not None:
            found.files = pictures
            return cls([(path, 0) for path in pictures], [], told, found, rule)
        return cls._of_classes(folder, pictures, found)

    @classmethod
    def _of_classes(cls, folder: Path, pictures: list[Path], found: Walk) -> "PictureFolder":
        groups: dict[str, list[Path]] = {}
        loose = []
        for path in pictures:
            first, *rest = path.relative_to(folder).parts
            (groups.setdefault(first, []) if rest else loose).append(path)
        for path in found.folders:
            if path.parent == folder and path.name not in groups:
                found.leave("folders without pictures", path)
        if loose and groups:
            raise UserError(
                f"data.path: {len(loose)} pictures of {folder} ({loose[0].name}, ...) lie beside its {len(groups)} "
                f"class folders ({', '.join(list(groups)[:3])}): move them into a class, or all into one folder"
            )
        found.files = pictures
        if loose:
            return cls([(path, 0) for path in loose], [folder.resolve().name], None, found)
        if deeper := sorted({path.parent for path in pictures if path.parent.parent != folder}):
            warn(
                f"{folder}: pictures of {len(deeper)} folders within others ({deeper[0].relative_to(folder)}, ...) are "
                f"of the outer classes ({', '.join(list(groups)[:3])}, ...): data.path is the folder around the classes"
            )
        names = ordered(list(groups))
        return cls([(path, i) for i, name in enumerate(names) for path in groups[name]], names, None, found)

    def texts(self, path: Path) -> tuple[str, ...]:
        """The captions of a picture; BadSample if it has none."""
        assert self.captions is not None
        value = self.captions.get(path)
        if isinstance(value, Path):
            try:
                text = decoded(value.read_bytes())
            except (OSError, ValueError) as error:
                raise BadSample(f"{value} cannot be read: {error}") from error
            several = lines(text)
            if len(several) > 1 and self.rule not in ("first", "random", "whole"):
                raise UserError(f"data.caption: {value} has {len(several)} lines: give first, random or whole")
            value = several if len(several) > 1 and self.rule != "whole" else text
        return captions(value, str(path), self.rule)


def _captions(
    folder: Path, pictures: list[Path], others: set[Path], source: CaptionsFrom, column: str
) -> tuple[dict[Path, Any] | None, set[Path]]:
    """What is said of each picture, None for nothing; and the files that say it."""
    if source == "none":
        return None, set()
    metadata = {path for path in others if path.name == METADATA}
    written = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
    beside = {path: written[path.with_suffix("")] for path in pictures if path.with_suffix("") in written}
    if source == "auto" and metadata and beside:
        raise UserError(
            f"data.captions_from: {folder} has {METADATA} and {len(beside)} .txt files beside pictures: give "
            "metadata, files or none"
        )
    if source == "metadata" or (source == "auto" and metadata):
        if not metadata:
            raise UserError(f"data.captions_from: there is no {METADATA} in {folder}")
        return _read_metadata(sorted(metadata), column), metadata
    if source == "files" or beside:
        if not beside:
            raise UserError(f"data.captions_from: no picture in {folder} has a .txt file of its name beside it")
        return dict(beside), set(beside.values())
    return None, set()


def _read_metadata(files: list[Path], column: str) -> dict[Path, Any]:
    """Captions by picture; several lines of one picture are several captions."""
    told: dict[Path, Any] = {}
    for file in files:
        try:
            text = decoded(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: {file} cannot be read: {error}") from error
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = read_json(line)
                path = Path(os.path.normpath(file.parent / row["file_name"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"data.path: {file}, line {number}: no JSON object with a file_name ({error})"
                ) from error
            if column not in row:
                raise UserError(
                    f"data.caption_column: {file}, line {number}, has no '{column}'; it has {', '.join(row)}; "
                    "`data.captions_from: none` reads no captions"
                )
            told[path] = [*told[path], row[column]] if path in told else [row[column]]
    return {path: values[0] if len(values) == 1 else values for path, values in told.items()}


def _with_captions(folder: Path, pictures: list[Path], told: dict[Path, Any], found: Walk, skip: bool) -> list[Path]:
    """The pictures that have captions; UserError if some have none, or some captions no picture, unless ``skip``."""
    known = {Path(os.path.normpath(path)): path for path in pictures}
    for path in sorted(told.keys() - known.keys()):
        del told[path]
        if not skip:
            raise UserError(
                f"data.path: {METADATA} names {path}, which is no picture; `data.on_bad_picture: skip` leaves it out"
            )
        found.leave("captions without a picture", path)
    for normal, path in known.items():
        if normal in told and path != normal:
            told[path] = told.pop(normal)
    silent = [path for path in pictures if path not in told]
    if silent and not skip:
        raise UserError(
            f"data: {len(silent)} of {len(pictures)} pictures in {folder} have no caption ({silent[0].name}): add it; "
            "`data.on_bad_picture: skip` leaves these pictures out, `data.captions_from: none` all captions"
        )
    for path in silent:
        found.leave("pictures without a caption", path)
    pictures = [path for path in pictures if path in told]
    if not pictures:
        raise UserError(f"data: none of the pictures in {folder} has a caption")
    return pictures
