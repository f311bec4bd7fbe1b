"""Students: several behind one call; who answers what, and each of them alone."""

import base64
import html
from typing import Any

import gradio as gr
from torch import Tensor

from app import files
from app.ask import MAX_SEED, Ask, whole
from app.engine import Engine
from app.handlers import MODEL, figures, file_data, guarded
from app.networks import Facts, Made
from models.errors import UserError

COLOURS = ("#2f7fd6", "#d9772b", "#2f9e62", "#b04fc0", "#c9373f", "#8a8a2a", "#1f9aa8", "#7a5c3e")
ROUTED = "routed: each class by its own"


def answered(engine: Engine, model: str, classes: list[str] | None, seed: object, only: int | None) -> tuple[Made, Ask]:
    """A picture of each class, by its own student or by one alone."""
    facts = engine.facts(model)
    if facts.owners is None:
        raise UserError(f"model: {model} is one student, not several")
    if not isinstance(classes, list | None):
        raise UserError("classes: a list of names is needed")
    words = [str(name) for name in classes or facts.classes]
    if len(words) > 100:
        raise UserError(f"classes: {len(words)} are too many; 100 are the most")
    if only is not None:
        only = whole("student", only, 0, max(facts.owners))
    ask = Ask.checked(model, words[0], seed)
    return engine.make(ask, words, only=only), ask


def partition_of(facts: Facts) -> list[dict[str, Any]]:
    assert facts.owners is not None
    return [
        {"student": k, "classes": [name for name, owner in zip(facts.classes, facts.owners, strict=True) if owner == k]}
        for k in range(max(facts.owners) + 1)
    ]


def endpoints(engine: Engine) -> None:
    """What clients may call."""

    @guarded
    def students(
        model: str, classes: list[str] | None = None, seed: int = 0, student: int | None = None
    ) -> tuple[dict, dict]:
        """A picture of each class by several students, row by row in one file, and who made each.

        classes: names, null for all. student: the number of one that is to answer alone, null for each class's own.
        """
        made, ask = answered(engine, model, classes, seed, student)
        path = files.serve(files.encode(files.mosaic(made.pictures), None, "png"), "students.png")
        return file_data(path), figures(made, ask) | {"partition": partition_of(engine.facts(model))}

    gr.api(students, api_name="students", **MODEL)


def tab(engine: Engine, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    names = engine.several()
    missing = gr.Markdown(
        "No run with several students is here yet. `configs/fashion_mnist/multi_student.yaml` trains four.",
        visible=not names,
        elem_id="no-students",
    )
    with gr.Row(visible=bool(names)) as page:
        with gr.Column(scale=3, min_width=320):
            gallery = gr.HTML("", elem_id="answers")
            status = gr.HTML("", elem_id="students-status", elem_classes="status")
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(
                names, value=names[0] if names else None, label="Run", elem_id="several", interactive=True
            )
            chosen = gr.Radio([ROUTED], value=ROUTED, label="Who answers", elem_id="student")
            classes = gr.Dropdown(
                [], multiselect=True, label="Classes (none: all)", elem_id="classes", interactive=True
            )
            seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="students-seed")
            button = gr.Button("Generate", variant="primary", elem_id="students-go")
            table = gr.HTML("", elem_id="partition")

    @guarded
    def opened(model: str | None) -> tuple[Any, ...]:
        if not model:
            return (gr.skip(),) * 3
        facts = engine.facts(model)
        if facts.owners is None:
            raise UserError(f"model: {model} is one student, not several")
        each = [f"student {k} alone" for k in range(max(facts.owners) + 1)]
        return (
            gr.update(choices=[ROUTED, *each], value=ROUTED),
            gr.update(choices=list(facts.classes), value=[]),
            _map(facts),
        )

    @guarded
    def show(model: str, chosen: str, classes: list[str], seed: Any) -> tuple[Any, ...]:
        if not model:
            return gr.skip(), gr.skip()
        only = None if chosen == ROUTED else int(chosen.split()[1])
        made, ask = answered(engine, model, classes, seed, only)
        assert made.owners is not None
        words = classes or engine.facts(model).classes
        figures = (_figure(picture, w, k) for picture, w, k in zip(made.pictures, words, made.owners, strict=True))
        line = f"<b>{1e3 * made.seconds / len(words):.0f} ms</b> a picture · seeds from {ask.seed}"
        return f"<div class='answers'>{''.join(figures)}</div>", line

    @guarded
    def refreshed() -> tuple[Any, ...]:
        now = engine.several()
        return (
            gr.update(choices=now, value=now[0] if now else None),
            gr.update(visible=bool(now)),
            gr.update(visible=not now),
        )

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    go: dict[str, Any] = (
        {"fn": show, "inputs": [model, chosen, classes, seed], "outputs": [gallery, status]} | quiet | MODEL
    )
    model.input(opened, model, [chosen, classes, table], **quiet).success(**go)
    gr.on([button.click, chosen.input, classes.input, seed.submit], trigger_mode="always_last", **go)
    this.select(refreshed, None, [model, page, missing], **quiet).success(
        opened, model, [chosen, classes, table], **quiet
    ).success(**go)


def _dot(student: int) -> str:
    return f"<span class='dot' style='background:{COLOURS[student % len(COLOURS)]}'></span>"


def _figure(picture: Tensor, word: str, student: int) -> str:
    """A picture uint8 (C, H, W) with its class and who made it."""
    png = base64.b64encode(files.encode(files.mosaic(picture[None]), None, "png")).decode()
    word = html.escape(word, True)
    image = f"<img src='data:image/png;base64,{png}' alt='{word}, made by student {student}'>"
    return f"<figure>{image}<figcaption>{word}<br>{_dot(student)}student {student}</figcaption></figure>"


def _map(facts: Facts) -> str:
    """The partition: a row for each student with its classes."""
    rows = "".join(
        f"<tr><th scope='row'>{_dot(p['student'])}student {p['student']}</th>"
        f"<td>{html.escape(', '.join(p['classes']))}</td></tr>"
        for p in partition_of(facts)
    )
    return f"<table class='scores'><caption>Who answers what</caption><tbody>{rows}</tbody></table>"
