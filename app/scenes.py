"""3D: finished scenes to turn around, and a prompt to a new one."""

import html
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from app import files
from app.ask import text
from app.engine import Engine
from app.handlers import PICTURE, file_data, guarded, refusal
from app.library import Library, changed, inside, matching
from eval.report import read_metrics
from models.errors import UserError
from models.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent
CONFIG = "configs/solids/vsd_3d.yaml"
MOST_BYTES = 200 * 2**20
LOOK_EVERY = 1.0
"""Seconds between two looks at a training."""


def mesh_of(scene: Path) -> Path | None:
    """The first particle's, if there are several."""
    return next(iter(matching(scene, "**/*.glb")), None)


def turntable_of(scene: Path) -> Path | None:
    return next(iter(matching(scene, "**/*turntable.mp4")), None)


def prompt_of(scene: Path) -> str:
    """What its settings, or those of its stages, say; empty if they say nothing."""
    for path in matching(scene, "config.yaml") + matching(scene, "*/config.yaml"):
        method = settings_of(path.parent).get("method")
        if isinstance(method, dict) and isinstance(method.get("prompt"), str):
            return method["prompt"]
    return ""


def copied(path: Path | None) -> str | None:
    """A run's file where the app may serve it; None for none."""
    if path is None:
        return None
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path.name} has {path.stat().st_size / 2**20:.0f} MB; {MOST_BYTES // 2**20} are the most")
    return files.serve_copy(path)


def settings_of(run: Path) -> dict[str, Any]:
    """A run's config.yaml; empty where it is missing or damaged."""
    path = inside(run, "config.yaml")
    try:
        values = read_yaml(path.read_text()) if path else {}
    except (OSError, ValueError, yaml.YAMLError):
        values = {}
    return values if isinstance(values, dict) else {}


def train(prompt: str, library: Library) -> Iterator[tuple[str, Path | None, Path | None]]:
    """Train a scene of ``prompt``: (line, newest sample, the scene when it is finished), until it ends.

    The training is stopped, and saved, when nobody asks for the next line any more. UserError if it cannot run.
    """
    prompt = text("prompt", prompt, 300)
    if not prompt:
        raise UserError("prompt: it is empty")
    if not (ROOT / CONFIG).is_file():
        raise UserError(f"{CONFIG} is not here: this copy of the studio trains no scenes")
    if not library.roots:
        raise UserError("there is no folder for runs: name one with --run")
    output = library.roots[0][1] / "scenes"
    line = [sys.executable, str(ROOT / "distill/train.py"), "--config", str(ROOT / CONFIG)]
    line += [f"--prompt={prompt}", f"--output={output}"]
    since = time.time()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                yield progress(output, since), newest_sample(output, since), None
                time.sleep(LOOK_EVERY)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
            raise UserError(f"the training ended with status {process.returncode}: {said[-1][:300]}")
    made = [scene for scene in library.scenes().values() if scene.is_relative_to(output)]
    yield progress(output), newest_sample(output), made[0] if made else None


def newest(folder: Path, pattern: str, since: float = 0.0) -> Path | None:
    """The file that was written last, and not before ``since``."""
    return max((path for path in matching(folder, pattern) if changed(path) >= since), key=changed, default=None)


def progress(output: Path, since: float = 0.0) -> str:
    """How far the stage is that wrote last."""
    log = newest(output, "**/metrics.jsonl", since)
    if log is None:
        return "starting"
    series = read_metrics(log)
    step = max((points[-1][0] for points in series.values()), default=0.0)
    train = settings_of(log.parent).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return f"{log.parent.name}: step {step:.0f}" + (f" of {steps}" if isinstance(steps, int) else "")


def newest_sample(output: Path, since: float = 0.0) -> Path | None:
    return newest(output, "**/samples/step-*.png", since)


def endpoints(engine: Engine) -> None:
    """What clients may call."""

    def listed() -> list[str]:
        """Names of the finished scenes."""
        return list(engine.library.scenes())

    def view(scene: str) -> tuple[dict | None, dict | None]:
        """A finished scene's mesh (GLB) and turntable (MP4), each null where there is none."""
        folder = engine.library.scene(scene)
        mesh, turntable = copied(mesh_of(folder)), copied(turntable_of(folder))
        return mesh and file_data(mesh), turntable and file_data(turntable)  # type: ignore[return-value]

    gr.api(guarded(listed), api_name="scenes")
    gr.api(guarded(view), api_name="scene")


def tab(engine: Engine, may_train: bool, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    library = engine.library
    names = list(library.scenes())
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            viewer = gr.Model3D(
                label="Scene", show_label=False, interactive=False, height=420, elem_id="viewer", display_mode="solid"
            )
            download = gr.DownloadButton("Download the mesh (GLB)", interactive=False, elem_id="glb")
        with gr.Column(scale=2, min_width=280):
            chosen = gr.Dropdown(
                names, value=None, label="Finished scenes", elem_id="scene", interactive=True, allow_custom_value=False
            )
            status = gr.HTML(
                "" if names else "No finished scene is here yet.", elem_id="scene-status", elem_classes="status"
            )
            turntable = gr.Video(
                label="Turntable",
                autoplay=True,
                loop=True,
                interactive=False,
                buttons=["download"],
                elem_id="turntable",
            )
            with gr.Accordion("A new scene", open=not names):
                prompt = gr.Textbox(label="Prompt", value="a red cube", elem_id="scene-prompt")
                with gr.Row():
                    start = gr.Button("Train it", variant="primary", elem_id="scene-train")
                    stop = gr.Button("Stop and save", elem_id="scene-stop")
                preview = gr.Image(
                    **PICTURE,
                    label="Preview",
                    buttons=[],
                    elem_id="preview",
                    alt_text="The newest sample of the training",
                )

    @guarded
    def show(name: str | None) -> tuple[Any, ...]:
        if not name:
            return (gr.skip(),) * 4
        folder = library.scene(name)
        mesh = copied(mesh_of(folder))
        return (
            mesh,
            gr.update(value=mesh, interactive=mesh is not None),
            copied(turntable_of(folder)),
            html.escape(prompt_of(folder)),
        )

    def grow(prompt: str) -> Iterator[tuple[Any, ...]]:
        try:
            if not may_train:
                raise UserError("guests train no scenes: the owner can, on the machine itself")
            shown = None
            for line, sample, run in train(prompt, library):
                known = library.scenes() if run else {}
                name = next((n for n, folder in known.items() if folder == run), None)
                choice = gr.update(choices=list(known), value=name) if name else gr.skip()
                yield line, gr.skip() if sample == shown else copied(sample), choice
                shown = sample
        except UserError as error:
            raise refusal(error) from error

    def refreshed(name: str | None) -> Any:
        now = list(library.scenes())
        return gr.update(choices=now, value=name if name in now else (now[0] if now else None))

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    chosen.input(show, chosen, [viewer, download, turntable, status], **quiet)
    training = gr.on(
        [start.click, prompt.submit], grow, prompt, [status, preview, chosen], concurrency_limit=1, **quiet
    )
    training.success(show, chosen, [viewer, download, turntable, status], **quiet)
    stop.click(None, cancels=[training])
    this.select(refreshed, chosen, chosen, **quiet).success(
        show, chosen, [viewer, download, turntable, status], **quiet
    )
