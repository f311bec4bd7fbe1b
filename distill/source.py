"""What latents and embeddings were made of, told cheaply: by names, sizes, times and captions, without decoding."""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill.data import HFPictures, Pictures, SolidsPictures, Subset
from distill.settings import ConditionsOnly, Data, FashionMNISTData, HFData, ImageFolderData
from eval.pictures import walk
from models.errors import UserError

TEXTS = {".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl"}
"""Suffixes of files whose content is compared, since a caption may change and keep its length."""

Told = dict[str, str]


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 of values that JSON knows, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()


def _local(data: Data) -> list[Path]:
    """The files on this machine that ``data`` reads, or may read; none where they are elsewhere, or gone."""
    match data:
        case ImageFolderData() | FashionMNISTData():
            folder = data.path
        case ConditionsOnly():
            return [data.prompts] if data.prompts is not None and data.prompts.is_file() else []
        case HFData():
            folder = Path(data.path)
            if data.data_files is not None and not folder.is_dir():
                return sorted(path for path in map(Path, glob(data.data_files, recursive=True)) if path.is_file())
        case _:
            return []
    return walk(folder, tools=True).files if folder.is_dir() else []


def told_by_files(data: Data) -> Told:
    """``files``: names, sizes and texts; ``times``: when they were written. Empty without files on this machine."""
    if not (files := _local(data)):
        return {}
    names, times = [], []
    for path in files:
        status = path.stat()
        text = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix.lower() in TEXTS else ""
        names.append((path.as_posix(), status.st_size, text))
        times.append(status.st_mtime_ns)
    return {"files": digest(names), "times": digest(times)}


def told(data: Data, source: Pictures | Sequence[str]) -> Told:
    """The same, with ``rows``: what a source without files is known by."""
    rows: list[Any] = []
    match source.pictures if isinstance(source, Subset) else source:
        case HFPictures() as pictures:
            rows = [pictures.dataset._fingerprint] if not _local(data) else []
        case SolidsPictures() as pictures:
            rows = list(pictures.get([0]).captions)  # what a seed gives is a matter of the code
        case Sequence() as prompts:
            rows = list(prompts)
        case _:
            pass
    return told_by_files(data) | ({"rows": digest(rows)} if rows else {})


def check_unchanged(folder: Path, facts: dict[str, Any]) -> None:
    """UserError if what ``folder`` was made of is here and has changed since; a line if it is newer at least."""
    then = facts.get("source")
    try:
        data: Data = TypeAdapter(Data).validate_python(facts.get("data"))
    except ValidationError:  # of an earlier version
        return
    if not then or not (now := told_by_files(data)):
        return
    place = facts["data"].get("path") or facts["data"].get("prompts")
    if now["files"] != then.get("files"):
        raise UserError(
            f"data.path: {folder} was made of {place}, whose files or captions have changed since: encode them again, "
            "`python -m distill.precompute` into another folder"
        )
    if now["times"] != then.get("times"):
        print(
            f"data.path: {folder} was made of {place}, which was written again since, in the same sizes: "
            "`python -m distill.precompute --verify` compares them",
            file=sys.stderr,
        )
