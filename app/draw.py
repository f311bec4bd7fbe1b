"""Draw: every stroke gives a new picture, through a student that follows lines."""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from app import files
from app.ask import MAX_SEED, Ask, real
from app.engine import Engine
from app.handlers import (
    AS_YOU_GO,
    MODEL,
    PICTURE,
    as_file,
    figures,
    file_data,
    guarded,
    range_of_steps,
    refresh,
    sentence,
    uploaded,
)
from models.errors import UserError

LONGEST = 400_000
"""Characters of a drawing that a page sends."""
HEAD = "data:image/png;base64,"
CANVAS = """
<div class="board"><canvas width="512" height="512" tabindex="0" role="img" aria-label="Canvas: draw here"></canvas>
<div class="tools" role="toolbar" aria-label="Drawing tools">
<button class="brush" type="button" aria-pressed="true">Brush</button>
<button class="eraser" type="button" aria-pressed="false">Eraser</button>
<button class="undo" type="button">Undo</button>
<button class="clear" type="button">Clear</button>
<label>Width <input class="size" type="range" min="0.8" max="3" step="0.1" value="1.2"></label>
</div></div>
"""


def lines_of(data: bytes, side: int) -> Tensor:
    """A drawing, dark on light, as lines (1, 1, side, side), 1 on -1; UserError if it is no picture."""
    picture = files.flattened(io.BytesIO(data), side)
    dark = 255 - torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 1, side, side).float()
    return torch.where(dark > 0.3 * 255, 1.0, -1.0)


def drawing_of(lines: Tensor) -> bytes:
    """The inverse of :func:`lines_of`: a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(torch.where(lines[0, 0] > 0, 0, 255).to(torch.uint8).numpy()).save(buffer, "png")
    return buffer.getvalue()


def decoded(value: object) -> bytes:
    """What the canvas sends; UserError if it is something else."""
    if not isinstance(value, str) or not value.startswith(HEAD) or len(value) > LONGEST:
        raise UserError("drawing: it is not what the canvas sends, a small PNG as data:image/png;base64")
    try:
        return base64.b64decode(value.removeprefix(HEAD), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("drawing: its base64 is broken") from error


def side_of(engine: Engine, model: str) -> int:
    side = engine.facts(model).side
    if side is None:
        raise UserError(f"model: {model} has no control branch, so it follows no lines")
    return side


def endpoints(engine: Engine) -> None:
    """What clients may call."""

    @guarded
    def draw(
        model: str, prompt: str, drawing: dict, seed: int = 0, steps: int = 1, strength: float = 1.0, count: int = 1
    ) -> tuple[dict, dict]:
        """A picture that follows a drawing, and its figures.

        drawing: an upload (gradio_client: handle_file), dark lines on a light ground, of any size. strength: 0 to 2,
        how closely the lines are followed; 1 as it was trained. The other arguments are those of /generate.
        """
        ask = Ask.checked(model, prompt, seed, steps, count)
        lines = lines_of(files.read_bytes(uploaded(drawing)), side_of(engine, ask.model))
        made = engine.make(ask, lines=lines, strength=real("strength", strength, 0, 2))
        return file_data(as_file(made, ask, "png", settings=False)), figures(made, ask)

    @guarded
    def edges(photograph: dict, model: str = "embedded:solids_control") -> dict:
        """The edges of a photograph (an upload) as a drawing for /draw."""
        lines = files.read_photograph(uploaded(photograph), side_of(engine, model))
        return file_data(files.serve(drawing_of(lines), "edges.png"))

    gr.api(draw, api_name="draw", **MODEL)
    gr.api(edges, api_name="edges", **MODEL)


def tab(engine: Engine, page: gr.Blocks, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    names = engine.drawing()
    if not names:
        gr.Markdown("No model here follows lines: train one with `configs/solids/control.yaml`.")
        return
    facts = engine.facts(names[0])
    prompt = gr.Textbox(label="Prompt", value="a photo of a red cube", elem_id="draw-prompt", submit_btn="Generate")
    with gr.Row():
        with gr.Column(min_width=300):
            canvas = gr.HTML(
                "",
                label="Canvas",
                html_template=CANVAS,
                js_on_load=(Path(__file__).parent / "canvas.js").read_text(),
                side=facts.side,
                elem_id="canvas",
            )
            photograph = gr.UploadButton(
                "Edges of a photograph", file_types=["image"], type="filepath", elem_id="photograph", size="sm"
            )
        with gr.Column(min_width=300):
            picture = gr.Image(
                **PICTURE,
                label="Picture",
                show_label=False,
                buttons=["download", "fullscreen"],
                elem_id="drawn",
                elem_classes="picture",
                alt_text="The picture that follows the drawing",
            )
            status = gr.HTML("Draw something.", elem_id="draw-status", elem_classes="status")
    with gr.Accordion("Model, seed, strength of the lines", open=False):
        model = gr.Dropdown(names, value=names[0], label="Model", interactive=True)
        strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the lines", elem_id="strength")
        seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="draw-seed")
        steps = gr.Slider(1, value=1, step=1, label="Steps", **range_of_steps(facts))

    @guarded
    def show(drawing: str, prompt: str, model: str, seed: Any, steps: Any, strength: Any) -> tuple[Any, ...]:
        if not drawing or not str(prompt).strip():
            return gr.skip(), gr.skip()
        ask = Ask.checked(model, prompt, seed, steps)
        lines = lines_of(decoded(drawing), side_of(engine, ask.model))
        made = engine.make(ask, lines=lines, strength=real("strength", strength, 0, 2))
        return as_file(made, ask, "auto", settings=False), sentence(made, ask)

    @guarded
    def traced(path: str, model: str) -> str:
        lines = files.read_photograph(uploaded(path), side_of(engine, model))
        return HEAD + base64.b64encode(drawing_of(lines)).decode()

    again: dict[str, Any] = {
        "fn": show,
        "inputs": [canvas, prompt, model, seed, steps, strength],
        "outputs": [picture, status],
    }
    again |= AS_YOU_GO | MODEL
    gr.on([canvas.input, prompt.change, prompt.submit, model.input, seed.input, steps.input, strength.input], **again)
    photograph.upload(traced, [photograph, model], canvas, show_progress="hidden", api_visibility="private").success(
        **again
    )
    refresh(page, this, engine.drawing, model)
