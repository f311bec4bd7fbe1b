"""Samples in webdataset shards which can be read in any order.

``shard-00000.tar`` holds the files of each sample, such as ``000000000.x0.safetensors`` and ``000000000.txt``;
``shard-00000.json`` beside it says where each of them begins, how long it is, and its CRC-32. Any reader of webdataset
reads the tar files without it.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.folders import replace_file, replace_text


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"shard-{number:05d}.tar", folder / f"shard-{number:05d}.json"


def finished(folder: Path, number: int) -> bool:
    """Whether that shard was written to its end, and is as long as it was."""
    tar, index = _paths(folder, number)
    return tar.is_file() and tar.stat().st_size == _index(index).get("bytes")


def made_of(folder: Path, number: int) -> str:
    """The digest that a shard's writer was given; empty for none."""
    return _index(_paths(folder, number)[1]).get("source", "")


def _index(path: Path) -> dict[str, Any]:
    """Empty where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass
class ShardWriter:
    """A shard in the making."""

    tar: tarfile.TarFile
    source: str = ""
    """Digest of what its samples were made of."""
    places: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def add(self, index: int, files: dict[str, bytes]) -> None:
        """One sample, the ``index``-th of all shards: its files by their suffixes, the same ones in every sample."""
        for suffix, content in files.items():
            info = tarfile.TarInfo(f"{index:09d}.{suffix}")
            info.size, info.mode = len(content), 0o644
            start = self.tar.offset + tarfile.BLOCKSIZE  # behind the header
            self.tar.addfile(info, io.BytesIO(content))
            self.places.setdefault(suffix, []).append((start, len(content), zlib.crc32(content)))


@contextmanager
def write_shard(folder: Path, number: int) -> Iterator[ShardWriter]:
    """A writer of shard ``number``, which appears whole when the block ends well. Equal samples make equal files."""
    tar, index = _paths(folder, number)
    with replace_file(tar) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as file:
            writer = ShardWriter(file)
            yield writer
        size = temporary.stat().st_size
    replace_text(index, json.dumps({"bytes": size, "source": writer.source, "files": writer.places}) + "\n")


class Shards:
    """``count`` samples in shards of ``per_shard``; UserError if a shard is missing or damaged."""

    def __init__(self, folder: Path, count: int, per_shard: int, again: str):
        self.folder, self.per_shard, self.again = folder, per_shard, again
        self.shards = -(-count // per_shard)
        if missing := [n for n in range(self.shards) if not all(path.is_file() for path in _paths(folder, n))]:
            raise UserError(f"{folder}: {len(missing)} of {self.shards} shards are missing: {again}")
        self.places: dict[str, np.ndarray] = {}
        """By suffix: offset, length and CRC-32 of each sample's file (count, 3)."""
        parts: dict[str, list[np.ndarray]] = {}
        for number in range(self.shards):
            path = _paths(folder, number)[1]
            try:
                files = json.loads(path.read_text())["files"]
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(path) from error
            wanted = min(per_shard, count - number * per_shard)
            for suffix, places in files.items():
                parts.setdefault(suffix, []).append(np.asarray(places, dtype=np.int64).reshape(-1, 3))
                if len(places) != wanted:
                    raise self._damaged(path)
        for suffix, arrays in parts.items():
            self.places[suffix] = np.concatenate(arrays)

    def _damaged(self, path: Path) -> UserError:
        return UserError(f"{path} is damaged: delete it; then {self.again}")

    def read(self, suffix: str, indices: Sequence[int]) -> list[bytes]:
        """The files with this suffix of samples in any order."""
        found = []
        for index in indices:
            offset, size, checksum = self.places[suffix][index].tolist()
            path = _paths(self.folder, index // self.per_shard)[0]
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    content = file.read(size)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}") from error
            if len(content) != size or zlib.crc32(content) != checksum:
                raise self._damaged(path)
            found.append(content)
        return found
