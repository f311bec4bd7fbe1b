"""The whole page: six tabs over one engine."""

import os
from typing import Any

from app import files

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(files.cache_folder())  # Gradio reads both when it is imported

import gradio as gr

from app import compare, draw, generate
from app.engine import Engine

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto; }
.picture { border: none !important; background: none !important; box-shadow: none !important; }
.picture .image-container, .picture .image-container > button, .picture .image-frame { width: 100%; }
.picture img { width: 100%; height: auto; max-height: 68vh; min-height: 240px; object-fit: contain; border-radius: 10px; }
.status { min-height: 3em; font-variant-numeric: tabular-nums; text-align: center; }
.status .warn { color: var(--color-accent); }
.scores { width: 100%; font-size: var(--text-sm); }
.scores caption { text-align: left; font-weight: 600; padding: 4px 0; }
.scores td { padding: 3px 8px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
"""


def build_app(engine: Engine) -> gr.Blocks:
    """The page and its API; nothing is loaded but the model that it opens with."""
    with gr.Blocks(title="One-Step Studio", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("## One-Step Studio", elem_id="title")
        with gr.Tab("Generate", id="generate"):
            generate.tab(engine, app)
        with gr.Tab("Compare", id="compare"):
            compare.tab(engine)
        with gr.Tab("Draw", id="draw"):
            draw.tab(engine)
        for part in (generate, compare, draw):
            part.endpoints(engine)
    return app


def launch(
    app: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    queue_size: int = 32,
    wait: bool = True,
) -> str:
    """Serve ``app``; returns its address. With ``wait`` False it is served in the background."""
    app.queue(max_size=queue_size, default_concurrency_limit=4, api_open=False)
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO)
    options: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": ["api", "settings"]}
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=not wait,
        quiet=True,
        show_error=False,
        ssr_mode=False,
        allowed_paths=[],
        max_file_size=files.MAX_BYTES,
        state_session_capacity=256,
        enable_monitoring=False,
        **options,
    )
    return address
