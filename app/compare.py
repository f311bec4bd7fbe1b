"""Compare: the same noise through two models, or one in different steps."""

import html
import re
from dataclasses import replace
from typing import Any

import gradio as gr

from app.ask import MAX_COUNT, MAX_SEED, Ask
from app.engine import Engine
from app.handlers import AS_YOU_GO, MODEL, PICTURE, as_file, figures, file_data, guarded, range_of_steps, refresh, usual
from app.networks import Made
from app.scores import scores
from models.errors import UserError

SIDES = "left", "right"


def both(engine: Engine, left: Ask, right: Ask) -> tuple[Made, Made]:
    """Two answers to the same prompt and seeds; UserError where their pictures have different sizes."""
    made = engine.make(left), engine.make(right)
    sizes = [tuple(m.pictures.shape[-2:]) for m in made]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"models: {left.model} makes {sizes[0][1]} x {sizes[0][0]} pixels, {right.model} {sizes[1][1]} x "
            f"{sizes[1][0]}: only pictures of one size compare"
        )
    return made


def endpoints(engine: Engine) -> None:
    """What clients may call."""

    @guarded
    def compare(
        left: str,
        right: str,
        prompt: str,
        left_steps: int = 20,
        right_steps: int = 1,
        seed: int = 0,
        count: int = 1,
        guidance: float | None = None,
    ) -> tuple[dict, dict, dict, dict]:
        """The pictures of two models on the same noise: the left file, the right file, and the figures of each.

        left, right: names that /models lists; the other arguments are those of /generate.
        """
        first = Ask.checked(left, prompt, seed, left_steps, count, guidance)
        second = Ask.checked(right, prompt, seed, right_steps, count, guidance)
        made = both(engine, first, second)
        paths = [as_file(m, ask, "png") for m, ask in zip(made, (first, second), strict=True)]
        return file_data(paths[0]), file_data(paths[1]), figures(made[0], first), figures(made[1], second)

    gr.api(compare, api_name="compare", **MODEL)


def _opponent(engine: Engine, name: str) -> str:
    """A teacher of pictures like those of ``name``, if one is there."""
    facts = engine.facts(name)
    for other in engine.names():
        if (
            other.startswith("embedded:")
            and not (known := engine.facts(other)).student
            and known.classes == facts.classes
        ):
            return other
    return name


def tab(engine: Engine, page: gr.Blocks, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    student = usual(engine)
    teacher = _opponent(engine, student)
    facts, others = engine.facts(student), engine.facts(teacher)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt, or the name of a class",
                value=facts.examples[-1],
                submit_btn="Compare",
                elem_id="compare-prompt",
            )
            slider = gr.ImageSlider(
                **PICTURE,
                label="Left and right model",
                show_label=False,
                buttons=["fullscreen"],
                max_height=640,
                elem_id="compare-slider",
                elem_classes="picture",
            )
            status = gr.HTML("Press Enter.", elem_id="compare-status", elem_classes="status")
        with gr.Column(scale=2, min_width=280):
            names = engine.names()
            left = gr.Dropdown(names, value=teacher, label="Left model", elem_id="compare-left", interactive=True)
            left_steps = gr.Slider(
                1, value=others.steps, step=1, label="Left steps", elem_id="left-steps", **range_of_steps(others)
            )
            right = gr.Dropdown(names, value=student, label="Right model", elem_id="compare-right", interactive=True)
            right_steps = gr.Slider(
                1, value=1, step=1, label="Right steps", elem_id="right-steps", **range_of_steps(facts)
            )
            with gr.Accordion("Seed, guidance, number", open=False):
                seed = gr.Number(
                    7, label="Seed of both", precision=0, minimum=0, maximum=MAX_SEED, elem_id="compare-seed"
                )
                guidance = gr.Slider(0, 10, facts.guidance or 0, step=0.1, label="Guidance of both")
                count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Pictures, a seed each")
            reports = gr.HTML(_table(engine, teacher, student), elem_id="compare-scores")
            with gr.Accordion("Their cards", open=False):
                cards = gr.Markdown(_cards(engine, teacher, student), elem_id="compare-cards")

    @guarded
    def show(
        prompt: str, left: str, left_steps: Any, right: str, right_steps: Any, seed: Any, guidance: Any, count: Any
    ) -> tuple[Any, ...]:
        first = Ask.checked(left, prompt, seed, left_steps, count, guidance)
        made = both(engine, first, second := replace(first, model=right, steps=int(right_steps)))
        times = [m.seconds / len(m.pictures) for m in made]
        fast, slow = sorted(times)
        which = SIDES[times.index(fast)]
        line = " · ".join(
            f"{side}: <b>{1e3 * time:.0f} ms</b>, {ask.steps} step{'s' if ask.steps > 1 else ''}"
            for side, time, ask in zip(SIDES, times, (first, second), strict=True)
        )
        files = tuple(as_file(m, ask, "auto") for m, ask in zip(made, (first, second), strict=True))
        return files, f"{line} · {which} is {slow / fast:.1f} times as fast", *_told(engine, left, right)

    @guarded
    def steps_of(model: str) -> Any:
        known = engine.facts(model)
        return gr.update(value=known.steps, **range_of_steps(known))

    asked = [prompt, left, left_steps, right, right_steps, seed, guidance, count]
    again: dict[str, Any] = (
        {"fn": show, "inputs": asked, "outputs": [slider, status, reports, cards]} | AS_YOU_GO | MODEL
    )
    again["show_progress"] = "minimal"
    gr.on(
        [prompt.submit, left_steps.release, right_steps.release, seed.submit, guidance.release, count.release], **again
    )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    left.input(steps_of, left, left_steps, **quiet).success(**again)
    right.input(steps_of, right, right_steps, **quiet).success(**again)
    refresh(page, this, engine.names, left, right)


def _told(engine: Engine, left: str, right: str) -> tuple[str, str]:
    return _table(engine, left, right), _cards(engine, left, right)


def _cards(engine: Engine, left: str, right: str) -> str:
    """The models' cards without their settings."""
    found = ((engine.card(name) or f"{name} has no card.") for name in dict.fromkeys((left, right)))
    return "\n\n".join(re.sub(r"^---\n.*?\n---\n", "", card, flags=re.DOTALL) for card in found)


def _table(engine: Engine, left: str, right: str) -> str:
    """The scores of both models' reports."""
    rows = []
    for name in dict.fromkeys((left, right)):
        found = scores(engine.folder(name))
        rows += [(name, what, value) for what, value in found] or [(name, "no report", "")]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='scores'><caption>Scores of their reports</caption><tbody>{cells}</tbody></table>"
