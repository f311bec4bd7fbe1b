"""The run folders that the app may show: their names, and no file outside of them."""

import os
from collections.abc import Sequence
from pathlib import Path

from app.ask import shown
from models.errors import UserError

DEPTH = 4
MOST = 1000
"""Runs that are listed."""


def is_run(folder: Path) -> bool:
    return any((folder / part).is_file() for part in ("config.yaml", "metrics.jsonl", "student/model_index.json"))


class Library:
    """Runs in ``roots``: each is a run itself or a folder of runs, up to four levels deep.

    People name runs by what :meth:`runs` lists, never by a path, so no text of theirs becomes one.
    """

    def __init__(self, roots: Sequence[Path]):
        self.roots = [(root, root.resolve()) for root in roots]

    def runs(self) -> dict[str, Path]:
        """Name to resolved folder, the newest first."""
        found: dict[str, Path] = {}
        for root, resolved in self.roots:
            for folder in self._search(resolved, DEPTH):
                inside = folder.relative_to(resolved).as_posix()
                name = root.name if inside == "." else f"{root.name}/{inside}"
                while found.get(name, folder) != folder:
                    name += "'"
                found[name] = folder
                if len(found) == MOST:
                    break
        return dict(sorted(found.items(), key=lambda item: (-_changed(item[1]), item[0])))

    def _search(self, folder: Path, depth: int) -> list[Path]:
        if is_run(folder):
            return [folder]
        if depth == 0:
            return []
        try:
            with os.scandir(folder) as entries:
                inner = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != ".")
        except OSError:
            return []
        return [run for name in inner for run in self._search(folder / name, depth - 1)]

    def run(self, name: object) -> Path:
        """The folder of a run; UserError if there is none of that name."""
        folder = self.runs().get(name) if isinstance(name, str) else None
        if folder is None:
            raise UserError(f"run: there is no run '{shown(name)}' here: it was removed, or never was one")
        return folder


def inside(run: Path, *parts: str) -> Path | None:
    """A file in ``run``; None if there is none, or if it leads out of the run."""
    path = run.joinpath(*parts).resolve()
    return path if path.is_relative_to(run) and path.is_file() else None


def matching(run: Path, pattern: str) -> list[Path]:
    """Files in ``run``, by name, none of which leads out of it."""
    found = (path for path in run.glob(pattern))
    return sorted(path for path in found if inside(run, path.relative_to(run).as_posix()) is not None)


def _changed(folder: Path) -> float:
    """When something was last written; 0 for a folder that has gone."""
    times = [0.0]
    for name in ("metrics.jsonl", "config.yaml", "."):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)
