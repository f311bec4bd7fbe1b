"""The run folders that the app may show: their names, and no file outside of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from app.ask import shown
from models.errors import UserError

DEPTH = 4
"""Folders between a root and a run."""
MOST = 1000
"""Runs, or scenes, that are listed."""
HOMES = ("student", "mesh", "scene")
"""Folders of a scene that its files may lie in."""


def is_run(folder: Path) -> bool:
    return any((folder / part).is_file() for part in ("config.yaml", "metrics.jsonl", "student/model_index.json"))


class Library:
    """Runs and scenes in ``roots``: each is a run itself or a folder of runs, up to four levels deep.

    People name them by what :meth:`runs` and :meth:`scenes` list, never by a path, so no text of theirs becomes one.
    """

    def __init__(self, roots: Sequence[Path]):
        self.roots = [(root, root.resolve()) for root in roots]

    def runs(self) -> dict[str, Path]:
        """Name to resolved folder, the newest first; runs inside of a run are parts of it."""
        return self._named(lambda root: (folder for folder, _ in _walk(root, DEPTH, is_run) if is_run(folder)))

    def scenes(self) -> dict[str, Path]:
        """The same of folders with a mesh (GLB) or a turntable (MP4), in themselves or in student/, mesh/ or scene/."""

        def found(root: Path) -> Iterator[Path]:
            for folder, files in _walk(root, DEPTH + 1, lambda _: False):
                if any(name.endswith((".glb", "turntable.mp4")) for name in files):
                    yield folder.parent if folder.name in HOMES and folder != root else folder

        return self._named(found)

    def _named(self, search: Callable[[Path], Iterable[Path]]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for root, resolved in self.roots:
            for folder in search(resolved):
                place = folder.relative_to(resolved).as_posix()
                name = root.name if place == "." else f"{root.name}/{place}"
                while found.get(name, folder) != folder:
                    name += "'"
                found[name] = folder
                if len(found) == MOST:
                    break
        return dict(sorted(found.items(), key=lambda item: (-changed(item[1]), item[0])))

    def run(self, name: object) -> Path:
        """The folder of a run; UserError if there is none of that name."""
        return _of("run", self.runs(), name)

    def scene(self, name: object) -> Path:
        """The folder of a scene; UserError if there is none of that name."""
        return _of("scene", self.scenes(), name)


def _of(kind: str, known: dict[str, Path], name: object) -> Path:
    folder = known.get(name) if isinstance(name, str) else None
    if folder is None:
        raise UserError(f"{kind}: there is no {kind} '{shown(name)}' here: it was removed, or never was one")
    return folder


def _walk(folder: Path, depth: int, whole: Callable[[Path], bool]) -> Iterator[tuple[Path, list[str]]]:
    """Folders with the names of their files; into none that is ``whole``, hidden, or a link."""
    try:
        with os.scandir(folder) as entries:
            inner = sorted(entries, key=lambda entry: entry.name)
            yield folder, [entry.name for entry in inner if entry.is_file(follow_symlinks=False)]
            deeper = [e.name for e in inner if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    except OSError:
        return
    if depth and not whole(folder):
        for name in deeper:
            yield from _walk(folder / name, depth - 1, whole)


def inside(run: Path, *parts: str) -> Path | None:
    """A file in ``run``; None if there is none, or if it leads out of the run."""
    path = run.joinpath(*parts).resolve()
    return path if path.is_relative_to(run) and path.is_file() else None


def matching(run: Path, pattern: str) -> list[Path]:
    """Files in ``run``, by name, none of which leads out of it."""
    return sorted(path for path in run.glob(pattern) if inside(run, path.relative_to(run).as_posix()) is not None)


def changed(folder: Path) -> float:
    """When something was last written; 0 for a folder that has gone."""
    times = [0.0]
    for name in ("metrics.jsonl", "config.yaml", "."):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)
