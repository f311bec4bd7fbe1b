"""What a run's reports say, in lines short enough to stand under a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.library import inside
from eval.machine import home_of


def _of(path: Path | None, read: Callable[[dict[str, Any]], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """What ``read`` finds in a report; nothing in one that is missing, damaged or of another kind."""
    if path is None:
        return []
    try:
        return read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _distances(report: dict[str, Any]) -> list[tuple[str, str]]:
    protocol = report["protocol"]
    name = f"{protocol['extractor']}, {protocol['images']} pictures"
    return [(f"{row['sampler']} ({name})", f"{float(row['fd']):.3f}") for row in report["scores"]]


def _geneval(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{name} ({report['name']})", f"{100 * float(row['score']):.1f} %") for name, row in report["scores"].items()
    ]


def _stored(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"{row['sampler']} (scores.json)", f"{float(row['fd']):.3f}") for row in report.values()]


def scores(folder: Path) -> list[tuple[str, str]]:
    """(what was measured, value) of the model in ``folder``: a run's student/, or an exported folder."""
    folder = folder.resolve()
    run = folder.parent if folder.name == "student" else folder
    lines = _of(inside(run, "report", "report.json"), _distances)
    for home in {run: None, home_of(run).resolve(): None}:  # of an embedded model also report/NAME
        lines += _of(inside(home, "scores.json"), _stored)
        for place in ("geneval", "report/geneval"):
            lines += _of(inside(home, place, "geneval.json"), _geneval)
    return lines
