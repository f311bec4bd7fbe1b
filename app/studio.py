"""The whole page: six tabs over one engine."""

import os
from pathlib import Path
from typing import Any

from app import files

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(files.cache_folder())
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # else it sums up its last 10,000 calls after each of them
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
# Gradio reads these when it is imported.

import gradio as gr

from app import compare, draw, generate, runs, scenes, students
from app.engine import Engine

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

CSS = (Path(__file__).parent / "studio.css").read_text()


def build_app(engine: Engine, may_train: bool = False) -> gr.Blocks:
    """The page and its API. With ``may_train`` a visitor may train scenes, which takes the whole machine."""
    with gr.Blocks(title="One-Step Studio", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("## One-Step Studio", elem_id="title")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate") as this:
                generate.tab(engine, app, this)
            with gr.Tab("Compare") as this:
                compare.tab(engine, app, this)
            with gr.Tab("Draw") as this:
                draw.tab(engine, app, this)
            with gr.Tab("Students") as this:
                students.tab(engine, this)
            with gr.Tab("3D") as this:
                scenes.tab(engine, may_train, this)
            with gr.Tab("Runs") as this:
                runs.tab(engine, tabs, this)
        for part in (generate, compare, draw, students, scenes, runs):
            part.endpoints(engine)
    return app


def launch(
    app: gr.Blocks,
    host: str = "127.0.0.1",
    port: int = 0,
    share: bool = False,
    queue_size: int = 32,
) -> str:
    """Serve ``app``; returns its address. It is served in the background, on ``port`` 0 or None
    at a free one; OSError if it cannot be."""
    app.queue(max_size=queue_size, default_concurrency_limit=4, api_open=False)
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO)
    options: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": ["api", "settings"]}
    _, address, _ = app.launch(
        server_name=host,
        server_port=port or None,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        allowed_paths=[],
        max_file_size=files.MAX_BYTES,
        state_session_capacity=256,
        enable_monitoring=False,
        **options,
    )
    return address
