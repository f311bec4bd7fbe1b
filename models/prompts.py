"""Text that people write and collect: the one reader of prompt files, and the rules of captions."""

import codecs
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.errors import BadSample, UserError
from models.json_text import read_json

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decoded(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one; ValueError for anything else."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds zero bytes: save it as UTF-8")
    return text


def lines(text: str) -> list[str]:
    """Lines that are not empty, without white space around them.

    A line ends at \\n or \\r\\n alone: captions from the web hold U+2028, U+0085 and form feeds, at which
    ``str.splitlines`` tears them.
    """
    return [kept for line in text.split("\n") if (kept := line.strip().lstrip("\ufeff").strip())]


TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".yaml", ".yml")
"""Suffixes of text that is more than a prompt in each line."""


def read_prompts(path: Path, key: str = "data.prompts") -> list[str]:
    """The prompts of a text file, one a line; UserError, which names ``key``, if there are none, or rows of a table."""
    try:
        text = decoded(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from error
    found = lines(text)
    if not found:
        raise UserError(f"{key}: {path} is empty: give at least one prompt, one a line")
    if "\n" not in text.strip() and "\r" in text.strip():
        raise UserError(f"{key}: {path} has lines that end at carriage returns alone: save it with newlines")
    if path.suffix.lower() in TABLES or all(map(_is_record, found)):
        raise UserError(
            f"{key}: {path} is a table, of which '{found[0][:60]}' would be a prompt: write the prompts alone into a "
            "text file, one a line"
        )
    return found


def _is_record(line: str) -> bool:
    """Whether it is an object or a list of JSON."""
    try:
        return isinstance(read_json(line), dict | list)
    except ValueError:
        return False


def captions(value: Any, name: str, rule: str | None = None) -> tuple[str, ...]:
    """The captions that ``value`` is, of which a picture is told one; several for the rule ``random`` alone.

    A text is a caption; a list is several, of which ``rule`` takes the ``first``, or one at ``random``; of a mapping it
    names the key. BadSample if there is none (null, empty), with the sample's ``name``; UserError if ``rule`` does not
    say which.
    """
    match value:
        case None:
            raise BadSample(f"{name} has no caption")
        case bytes() | str():
            try:
                text = decoded(value) if isinstance(value, bytes) else value
            except ValueError as error:
                raise BadSample(f"{name} has a caption that cannot be read: {error}") from error
            if not (text := text.strip().lstrip("\ufeff").strip()):
                raise BadSample(f"{name} has an empty caption")
            return (text,)
        case dict():
            if rule not in value:
                known = ", ".join(map(str, value))[:200]
                raise UserError(f"data.caption: {name} has a mapping for a caption ({known}): give one of its keys")
            return captions(value[rule], name, rule)
        case list() | tuple():
            found: list[str] = []
            for item in value:
                with suppress(BadSample):  # an empty one among others
                    found += captions(item, name, rule)
            if not found:
                raise BadSample(f"{name} has no caption: its list is empty")
            if len(found) > 1 and rule not in ("first", "random"):
                raise UserError(f"data.caption: {name} has {len(found)} captions: give first or random")
            return tuple(found) if rule == "random" else (found[0],)
        case _:
            raise BadSample(f"{name} has {value!r:.40} for a caption, which is no text")


def settled(found: tuple[str, ...]) -> str:
    """One of several captions, always the same one."""
    return found[zlib.crc32("\n".join(found).encode()) % len(found)]
