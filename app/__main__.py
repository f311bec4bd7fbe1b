"""The studio in the browser.

python -m app                                    # the embedded students, and the runs in runs/
python -m app --run runs/solids --student runs/solids/sprint
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from app.library import Library
from models.errors import UserError, run_command


@dataclass(frozen=True)
class Options:
    """Serve the page: generate as you type and draw, compare, explore scenes, read runs."""

    run: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A run, or a folder of runs; may be given several times. Default: runs/, if it is there."""
    student: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run with a student, an exported student, or embedded:NAME; may be given several times. The first one opens."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets the network in."""
    port: int = 7860
    """0 takes a free one."""
    share: bool = False
    """Tunnel the page to a public address of Gradio's."""
    queue_size: int = 32
    """Requests that may wait; more are told that the queue is full."""
    max_models: int = 3
    """Models in memory at a time."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def main(options: Options) -> None:
    """Serve until Ctrl-C; UserError for what cannot be served."""
    for root in options.run:
        if not root.is_dir():
            raise UserError(f"--run: there is no folder {root}")
    for name, value, low, high in (
        ("--port", options.port, 0, 65535),
        ("--queue-size", options.queue_size, 1, 100_000),
        ("--max-models", options.max_models, 1, 100),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: {value} is not from {low} to {high}")
    library = Library(options.run or ([Path("runs")] if Path("runs").is_dir() else []))
    if options.run and not library.runs():
        raise UserError(
            f"--run: {', '.join(map(str, options.run))} holds no run (config.yaml, metrics.jsonl or student/)"
        )
    try:
        from app import studio
    except ModuleNotFoundError as error:
        raise UserError("the page needs more packages: pip install -c constraints.txt -e '.[app]'") from error
    from transformers.utils import logging

    from app.engine import Engine
    from eval.machine import place_of

    logging.disable_progress_bar()
    engine = Engine(library, options.student, options.max_models, str(place_of(options.device)))
    alone = options.host in ("127.0.0.1", "localhost", "::1") and not options.share
    page = studio.build_app(engine, may_train=alone)
    try:
        address = studio.launch(page, options.host, options.port, options.share, options.queue_size)
    except OSError as error:
        raise UserError(f"--port: {options.host}:{options.port} cannot be listened on: {error}") from error
    print(f"The studio is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, prog="python -m app")))
