"""The whole page: six tabs over one engine."""

import os
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

CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto; }
.picture { border: none !important; background: none !important; box-shadow: none !important; }
.picture .image-container, .picture .image-container > button, .picture .image-frame { width: 100%; }
.picture:not(.short) .image-container { min-height: min(68vh, 300px); }
.picture img { width: 100%; height: auto; max-height: 68vh; object-fit: contain; border-radius: 10px; }
.status { min-height: 3em; font-variant-numeric: tabular-nums; text-align: center; }
.status .warn { color: var(--color-accent); }
.scores { width: 100%; font-size: var(--text-sm); }
.scores caption { text-align: left; font-weight: 600; padding: 4px 0; }
.scores, .scores tr, .scores td, .scores th { border: none !important; text-align: left; }
.scores tr + tr { border-top: 1px solid var(--border-color-primary) !important; }
.dot { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 50%; margin-right: 0.4em; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(108px, 1fr)); gap: 12px; }
.answers figure { margin: 0; text-align: center; font-size: var(--text-sm); }
.answers img { width: 100%; border-radius: 8px; margin: 0; }
.chart svg { width: 100%; height: auto; }
.report { width: 100%; height: 70vh; border: 1px solid var(--border-color-primary); border-radius: 8px; background: #fff; }
.scores td, .scores th { padding: 3px 8px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
"""


def build_app(engine: Engine, may_train: bool = False) -> gr.Blocks:
    """The page and its API. With ``may_train`` a visitor may train scenes, which takes the whole machine."""
    with gr.Blocks(title="One-Step Studio", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("## One-Step Studio", elem_id="title")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate"):
                generate.tab(engine, app)
            with gr.Tab("Compare"):
                compare.tab(engine)
            with gr.Tab("Draw"):
                draw.tab(engine)
            with gr.Tab("Students"):
                students.tab(engine)
            with gr.Tab("3D"):
                scenes.tab(engine, may_train)
            with gr.Tab("Runs"):
                runs.tab(engine, tabs)
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
