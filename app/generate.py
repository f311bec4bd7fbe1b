"""Generate: pictures of a prompt or a class, as one types."""

from typing import Any

import gradio as gr

from app import files
from app.ask import MAX_COUNT, MAX_SEED, Ask
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
    usual,
)
from app.networks import Facts

NEW_SEED = "() => Math.floor(Math.random() * 4294967296)"
NEW_UNLESS_KEPT = "(kept, seed) => [kept, kept ? seed : Math.floor(Math.random() * 4294967296)]"

# Gradio tells where a picture was clicked only if it is not enlarged, and these are small.
LISTEN = """() => document.addEventListener("click", (event) => {
    const image = event.target.closest("#picture .image-frame")?.querySelector("img");
    if (!image) return;
    const box = image.getBoundingClientRect();
    const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
    const x = (event.clientX - box.left - box.width / 2) / (scale * image.naturalWidth) + 0.5;
    const y = (event.clientY - box.top - box.height / 2) / (scale * image.naturalHeight) + 0.5;
    if (Math.min(x, y, 1 - x, 1 - y) < 0) return;
    window.pickedAt = [x, y];
    document.querySelector("#picked").click();
})"""
PICK = """(seed, count) => {
    const columns = Math.ceil(Math.sqrt(count)), rows = Math.ceil(count / columns), [x, y] = window.pickedAt;
    const index = Math.min(rows - 1, Math.floor(y * rows)) * columns + Math.min(columns - 1, Math.floor(x * columns));
    return index < count ? [seed + index, 1] : [seed, count];
}"""


def endpoints(engine: Engine) -> None:
    """What clients may call."""

    @guarded
    def generate(
        model: str,
        prompt: str,
        seed: int = 0,
        steps: int = 1,
        count: int = 1,
        guidance: float | None = None,
        other_seed: int = 0,
        walk: float = 0.0,
        format: str = "png",
    ) -> tuple[dict, dict]:
        """Pictures of a prompt (or of the name of a class) in one file, row by row without gaps, and their figures.

        model: a name that /models lists. seed: picture i has the noise of seed + i, 0 to 2^32 - 1. steps: 1 to 4 for
        a student, up to 50 for a teacher. count: 1 to 16. guidance: 0 to 30, null is the model's own. walk: 0 to 1,
        how far the noise goes to that of other_seed. format: png or jpeg; the settings are inside the file.
        """
        ask = Ask.checked(model, prompt, seed, steps, count, guidance, other_seed, walk)
        made = engine.make(ask)
        return file_data(as_file(made, ask, format)), figures(made, ask)

    @guarded
    def settings(picture: dict) -> dict:
        """The settings inside a picture that /generate made; picture: an upload (gradio_client: handle_file)."""
        return files.read_settings(uploaded(picture)).__dict__

    @guarded
    def models() -> list[str]:
        """Names of the models that can be asked."""
        return engine.names()

    gr.api(generate, api_name="generate", **MODEL)
    gr.api(settings, api_name="settings")
    gr.api(models, api_name="models")


def tab(engine: Engine, page: gr.Blocks, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    first = usual(engine)
    facts = engine.facts(first)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt",
                value=facts.examples[0],
                placeholder="Type: the picture follows",
                visible=not facts.classes,
                submit_btn="Generate",
                max_length=None,
                elem_id="prompt",
                autofocus=True,
            )
            chosen = gr.Dropdown(
                list(facts.classes), label="Class", visible=bool(facts.classes), elem_id="class", interactive=True
            )
            picture = gr.Image(
                **PICTURE,
                label="Picture",
                show_label=False,
                buttons=["fullscreen"],
                elem_id="picture",
                elem_classes="picture",
                alt_text="The generated picture",
            )
            picked = gr.Button("Take the seed of the picture", visible="hidden", elem_id="picked")
            status = gr.HTML("", elem_id="status", elem_classes="status")
            examples = gr.Dataset(
                components=[prompt], samples=_samples(facts), label="Try", visible=not facts.classes, elem_id="examples"
            )
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(engine.names(), value=first, label="Model", elem_id="model", interactive=True)
            with gr.Row(equal_height=True):
                seed = gr.Number(
                    7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=120
                )
                dice = gr.Button("⚄ New seed", elem_id="dice", min_width=100, size="md")
            kept = gr.Checkbox(True, label="Keep the seed when I press Enter", elem_id="keep", container=False)
            steps = gr.Slider(1, value=facts.steps, step=1, label="Steps", elem_id="steps", **range_of_steps(facts))
            count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Pictures, a seed each", elem_id="count")
            with gr.Accordion("Guidance and walk", open=False, elem_id="more"):
                guidance = gr.Slider(
                    0,
                    10,
                    facts.guidance or 0,
                    step=0.1,
                    label="Guidance",
                    visible=facts.guidance is not None,
                    elem_id="guidance",
                )
                walk = gr.Slider(0, 1, 0, step=0.01, label="Walk to the other seed", elem_id="walk")
                other = gr.Number(8, label="Other seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="other")
            with gr.Accordion("Download and reload", open=False, elem_id="files"):
                kind = gr.Radio(["auto", "png", "jpeg"], value="auto", label="Format", elem_id="format")
                download = gr.DownloadButton("Download, settings inside", elem_id="download")
                reload = gr.UploadButton(
                    "Reload the settings of a picture",
                    file_types=[".png", ".jpg", ".jpeg"],
                    elem_id="reload",
                    type="filepath",
                )

    asked = [model, prompt, chosen, seed, steps, count, guidance, other, walk, kind]

    @guarded
    def show(
        model: str,
        prompt: str,
        chosen: str | None,
        seed: Any,
        steps: Any,
        count: Any,
        guidance: Any,
        other: Any,
        walk: Any,
        kind: str,
    ) -> tuple[Any, ...]:
        known = engine.facts(model)
        words = (chosen or known.classes[0]) if known.classes else prompt
        if not str(words).strip():
            return gr.skip(), "Type a prompt.", gr.skip()
        scale = None if known.guidance is None else guidance
        ask = Ask.checked(model, words, seed, steps, count, scale, other, walk)
        made = engine.make(ask)
        path = as_file(made, ask, kind)
        return path, sentence(made, ask), path

    @guarded
    def other_model(model: str) -> tuple[Any, ...]:
        known = engine.facts(model)
        return (
            gr.update(visible=not known.classes),
            gr.update(visible=bool(known.classes), choices=list(known.classes), value=(known.classes or (None,))[0]),
            gr.update(value=known.steps, **range_of_steps(known)),
            gr.update(visible=known.guidance is not None, value=known.guidance or 0),
            gr.update(visible=not known.classes, samples=_samples(known)),
        )

    @guarded
    def from_file(path: str) -> tuple[Any, ...]:
        ask = files.read_settings(uploaded(path))
        known = engine.facts(ask.model)
        return (
            gr.update(choices=engine.names(), value=ask.model),
            gr.update(value=ask.prompt, visible=not known.classes),
            gr.update(
                choices=list(known.classes), value=ask.prompt if known.classes else None, visible=bool(known.classes)
            ),
            ask.seed,
            gr.update(value=ask.steps, **range_of_steps(known)),
            ask.count,
            gr.update(
                value=known.guidance or 0 if ask.guidance is None else ask.guidance, visible=known.guidance is not None
            ),
            ask.other_seed,
            ask.walk,
        )

    shown = [picture, status, download]
    again: dict[str, Any] = {"fn": show, "inputs": asked, "outputs": shown} | AS_YOU_GO | MODEL
    # A text's `input` is but the keys that write a character: no deletion, no paste, no keyboard of a phone.
    typed = [prompt.change, *(c.input for c in (chosen, seed, steps, count, guidance, other, walk, kind))]
    gr.on(typed, **again)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    prompt.submit(None, [kept, seed], [kept, seed], js=NEW_UNLESS_KEPT).then(**again)
    dice.click(None, None, seed, js=NEW_SEED).then(**again)
    model.input(other_model, model, [prompt, chosen, steps, guidance, examples], **quiet).success(**again)
    examples.click(lambda sample: sample[0], examples, prompt, **quiet)
    reload.upload(
        from_file, reload, [model, prompt, chosen, seed, steps, count, guidance, other, walk], **quiet
    ).success(**again)
    picked.click(None, [seed, count], [seed, count], js=PICK).then(**again)
    refresh(page, this, engine.names, model)
    page.load(None, js=LISTEN)
    page.load(**again)


def _samples(facts: Facts) -> list[list[str]]:
    """A few short prompts of different length."""
    return [[text] for text in sorted(dict.fromkeys(facts.examples), key=len)[::3][:6]]
