"""What all tabs do with an answer: errors as one line, pictures as files, figures as a sentence."""

import html
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from app import files
from app.ask import Ask, shown
from app.engine import Engine
from app.networks import Facts, Made
from models.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Of handlers that run a model: one at a time."""
AS_YOU_GO: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
"""Of handlers that answer each keystroke: the last one is never dropped."""
PICTURE: dict[str, Any] = {"format": "png", "type": "filepath", "interactive": False}
"""Of components that show a picture of ours."""
SMALL = 512 * 512
"""Pixels up to which a PNG costs next to nothing; above that it takes longer than a student does."""


def refusal(error: UserError) -> gr.Error:
    """One line for the page, which takes it for HTML."""
    line = " ".join(str(error).split()).replace("<", "‹").replace(">", "›")
    return gr.Error(line, print_exception=False, duration=5)


def guarded(handler: Callable[P, R]) -> Callable[P, R]:
    """A mistake of the user's, and a fault of ours, as one line in the page or to the client; never a traceback."""

    @wraps(handler)
    def safe(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            raise refusal(error) from error
        except gr.Error:
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            line = f"this failed inside the studio ({type(error).__name__}); its terminal says more"
            raise gr.Error(line, print_exception=False) from error

    return safe


def file_data(path: str) -> dict[str, Any]:
    """A file of ours in an answer to a client."""
    return {"path": path, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}


def uploaded(value: object) -> str:
    """The path of a client's upload, which Gradio has put into its own folder; UserError if it is none."""
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(files.cache_folder().resolve()):
        raise UserError("a file is needed: upload one (gradio_client: handle_file)")
    return path


def as_file(made: Made, ask: Ask, kind: object, settings: bool = True) -> str:
    """The pictures of an answer in one file, with the settings inside unless they cannot be made again from them."""
    picture = files.mosaic(made.pictures)
    if kind not in ("png", "jpeg", "auto"):
        raise UserError(f"format: {shown(kind)} is not png, jpeg or auto")
    if kind == "auto":
        kind = "png" if picture.width * picture.height <= SMALL else "jpeg"
    data = files.encode(picture, ask.as_json() if settings else None, "png" if kind == "png" else "jpeg")
    return files.serve(data, f"seed-{ask.seed}.{'png' if kind == 'png' else 'jpg'}")


def figures(made: Made, ask: Ask) -> dict[str, Any]:
    """What a client is told beside the picture."""
    columns = math.ceil(math.sqrt(len(made.pictures)))
    return {
        "settings": asdict(ask),
        "seeds": list(range(ask.seed, ask.seed + len(made.pictures))),
        "columns": columns,
        "rows": math.ceil(len(made.pictures) / columns),
        "milliseconds": round(1e3 * made.seconds, 2),
        "unknown_words": list(made.unknown),
        "students": None if made.owners is None else list(made.owners),
    }


def sentence(made: Made, ask: Ask) -> str:
    """The figures under a picture."""
    count = len(made.pictures)
    each = made.seconds / count
    last = f" to {ask.seed + count - 1}" if count > 1 else ""
    parts = [
        f"<b>{1e3 * each:.0f} ms</b> a picture",
        f"{1 / each:.0f} pictures/s" if each < 0.5 else f"{1 / each:.1f} pictures/s",
        f"{ask.steps} step{'s' if ask.steps > 1 else ''}",
        f"seed{'s' if count > 1 else ''} {ask.seed}{last}",
    ]
    if made.owners is not None:
        parts.append(f"by student {', '.join(map(str, dict.fromkeys(made.owners)))}")
    line = " · ".join(parts)
    if made.unknown:
        line += f"<br><span class='warn'>unknown to this model: {html.escape(', '.join(made.unknown))}</span>"
    return f"<span role='status'>{line}</span>"


def range_of_steps(facts: Facts) -> dict[str, Any]:
    """Of a slider of steps; it is hidden where there is but one, which Gradio takes for no range."""
    return {"maximum": max(2, facts.most_steps), "visible": facts.most_steps > 1}


def refresh(page: gr.Blocks, this: gr.Tab, names: Callable[[], list[str]], *lists: gr.Dropdown) -> None:
    """Fill ``lists`` with ``names`` whenever the page is opened or the tab is chosen; what is chosen there stays."""

    @guarded
    def listed(*chosen: object) -> dict[gr.Dropdown, Any]:
        now = names()
        # A model that was removed stays too where it is chosen: the engine says what became of it, Gradio does not.
        gone = [[value] if isinstance(value, str) and value not in now else [] for value in chosen]
        return {each: gr.update(choices=now + kept) for each, kept in zip(lists, gone, strict=True)}

    # Unchecked: the lists of an old page, whose session was given up, are those of the start.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([page.load, this.select], listed, list(lists), list(lists), preprocess=False, **quiet)


def usual(engine: Engine) -> str:
    """The model that a page opens with."""
    names = engine.names()
    if not names:
        raise UserError("there is no model: name one with --student, or train one and give its run with --run")
    return names[0]
