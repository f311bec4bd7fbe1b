"""Scores of teachers, kept so that they are measured once."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.generate import Sampler
from eval.machine import home_of
from eval.scoring import Score
from models.folders import replace_text


class TeacherScores:
    """Scores of one teacher in ``scores.json`` beside its weights, by protocol, weights and sampler.

    Those of a teacher that came with the project are only read there; new ones go to report/NAME.
    """

    def __init__(self, folder: Path, weights_sha256: str):
        self.shipped, self.path = folder / "scores.json", home_of(folder) / "scores.json"
        self.weights = weights_sha256

    def _key(self, sampler: Sampler, digest: str) -> str:
        return f"{digest} {self.weights} {sampler.name}"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def get(self, sampler: Sampler, digest: str) -> Score | None:
        """The stored score, or None; an entry that is not whole counts as none."""
        try:
            return Score(**self._read(self.source(sampler, digest))[self._key(sampler, digest)])
        except (KeyError, TypeError):
            return None

    def source(self, sampler: Sampler, digest: str) -> Path:
        """The file that has the score, if any has."""
        return self.path if self._key(sampler, digest) in self._read(self.path) else self.shipped

    def put(self, sampler: Sampler, digest: str, value: Score) -> None:
        """Store a score; a folder that cannot be written to is no error."""
        stored = self._read(self.path) | {self._key(sampler, digest): asdict(value)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(stored, indent=2) + "\n")
        except OSError as error:
            print(f"warning: the teacher's scores are not kept: {error}", file=sys.stderr)
