"""The studio in the browser.

    python -m app                                    # the embedded students, and the runs in runs/
    python -m app --run runs/solids --student runs/solids/sprint
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

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
    device: str = "cpu"


def main(options: Options) -> None:
    for root in options.run:
        if not root.is_dir():
            raise UserError(f"--run: there is no folder {root}")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port: {options.port} is not from 0 to 65535")
    if options.queue_size < 1:
        raise UserError(f"--queue-size: {options.queue_size} must be at least 1")
    try:
        from app import studio
    except ModuleNotFoundError as error:
        raise UserError("the page needs more packages: pip install -c constraints.txt -e '.[app]'") from error
    from transformers.utils import logging

    from app.engine import Engine
    from app.library import Library

    logging.disable_progress_bar()
    default = [Path("runs")] if Path("runs").is_dir() else []
    library = Library(options.run or default)
    if options.run and not library.runs():
        raise UserError(f"--run: {', '.join(map(str, options.run))} holds no run (config.yaml, metrics.jsonl or student/)")
    engine = Engine(library, options.student, options.max_models, options.device)
    alone = options.host in ("127.0.0.1", "localhost", "::1") and not options.share
    page = studio.build_app(engine, may_train=alone)
    try:
        address = studio.launch(page, options.host, options.port, options.share, options.queue_size)
    except OSError as error:
        raise UserError(f"--port: {options.host}:{options.port} cannot be listened on: {error}") from error
    print(f"The studio is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
