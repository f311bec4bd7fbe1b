"""How fast the page answers while one types, and whether it stands a crowd.

    python -m app.benchmark                          # a browser that types, twenty prompts
    python -m app.benchmark --clients 32 --seconds 60

The crowd runs in a process of its own, on the same machine: its work is part of what the figures show.
"""

import hashlib
import io
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import tyro
from PIL import Image

from app import files
from app.ask import Ask
from app.drive import browser, open_page
from eval.latency import Spread
from eval.machine import environment
from models.errors import UserError, run_command

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from app.engine import Engine
    from app.networks import Made

SUBJECTS = ("red cube", "green torus", "blue cone", "pink sphere", "white pyramid")
BETWEEN = 80
"""Milliseconds between two keystrokes."""
SEEDS = 64
"""Different requests of the crowd."""
WATCH = """() => {
    window.typed = 0; window.seen = [];
    const now = () => performance.timeOrigin + performance.now();
    document.addEventListener("keydown", () => { window.typed = now(); }, true);
    document.addEventListener("load", (event) => {
        if (event.target.matches?.("#picture img")) window.seen.push([now(), event.target.src]);
    }, true);
}"""


@dataclass(frozen=True)
class Options:
    """Measure typing in a browser; with --clients, a crowd of API clients instead."""

    model: str = "embedded:solids_sprint"
    """Name of the model that is asked."""
    prompts: int = 20
    """Prompts that are typed, of 20 characters or more."""
    clients: int = 0
    """API clients at a time."""
    seconds: float = 60.0
    """How long they ask."""
    queue_size: int = 32
    """Requests that may wait."""
    crowd: str | None = None
    """Address of a page to crowd: what the command gives to its own second process."""
    output: Path | None = None
    """JSON file for the figures."""


def serve(queue_size: int, model: str) -> tuple[str, "Engine"]:
    """The page in this process; its address and its engine."""
    from app import studio
    from app.engine import Engine
    from app.library import Library

    engine = Engine(Library([]), [model])
    return studio.launch(studio.build_app(engine), queue_size=queue_size), engine


# ------------------------------------------------------------------------------------------------------- typing


def timed(engine: "Engine") -> list[tuple[float, float]]:
    """From now on, when the engine's models were at work: start and end in seconds since the epoch."""
    spans, make = [], engine.make

    def making(*values: Any, **named: Any) -> "Made":
        start = time.time()
        made = make(*values, **named)
        spans.append((start, time.time()))
        return made

    engine.make = making
    return spans


def type_prompt(page: "Page", prompt: str) -> tuple[float, float, bool]:
    """Type it; (when the last key went down, when the last picture was there, whether it is the prompt's)."""
    box = page.locator("#prompt textarea")
    box.fill("")
    page.evaluate("() => { window.seen = []; }")
    box.press_sequentially(prompt, delay=BETWEEN)
    for _ in range(100):  # until the picture of the whole prompt is there, and nothing has come for a while
        page.wait_for_timeout(100)
        seen, typed = page.evaluate("() => [window.seen, window.typed]")
        if seen:
            path = files.serve(page.request.get(seen[-1][1]).body(), "seen.png")
            if files.read_settings(path).prompt == prompt:
                return typed / 1e3, seen[-1][0] / 1e3, True
    return typed / 1e3, time.time(), False


def typing(options: Options) -> dict[str, Any]:
    address, engine = serve(options.queue_size, options.model)
    whole, models, complete = [], [], 0
    spans = timed(engine)
    with browser() as made:
        page = open_page(made, address)
        page.evaluate(WATCH)
        for index in range(options.prompts + 1):
            second = " and a cone" if index // len(SUBJECTS) % 2 else ""
            start, end, right = type_prompt(page, f"a photo of a {SUBJECTS[index % len(SUBJECTS)]}{second}")
            if index > 0:  # the first one warms up
                whole.append(end - start)
                models.append(sum(max(0.0, min(end, b) - max(start, a)) for a, b in spans))
                complete += right
    found: dict[str, Any] = {"prompts": options.prompts, "ended with the whole prompt": complete}
    outside = [t - m for t, m in zip(whole, models, strict=True)]
    for name, values in (("last keystroke to picture", whole), ("model", models), ("outside the model", outside)):
        spread = Spread.of(values)
        found[f"{name}, ms"] = f"{spread.median:.0f} ({spread.low:.0f} to {spread.high:.0f})"
    return found


# -------------------------------------------------------------------------------------------------------- crowd


def digest(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def crowd(address: str, options: Options) -> dict[str, Any]:
    """What the clients got: counts, times, and a digest of the pixels for each seed."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError
    from gradio_client.utils import QueueError

    counts: Counter[str] = Counter()
    pixels: dict[int, set[str]] = {seed: set() for seed in range(SEEDS)}
    times: list[float] = []
    lock, made = threading.Lock(), [Client(address, verbose=False) for _ in range(options.clients)]
    end = time.monotonic() + options.seconds

    def ask(number: int, client: Any) -> None:
        turn = number
        while time.monotonic() < end:
            seed, turn = turn % SEEDS, turn + options.clients + 1
            start = time.monotonic()
            try:
                path, figures = client.predict(
                    options.model, f"a photo of a {SUBJECTS[seed % 5]}", seed, api_name="/generate"
                )
            except QueueError:
                with lock:
                    counts["queue full"] += 1
                time.sleep(0.2)
                continue
            except (AppError, OSError, ValueError) as error:
                with lock:
                    counts[f"error: {str(error)[:100]}"] += 1
                continue
            taken, data = time.monotonic() - start, Path(path).read_bytes()
            Path(path).unlink()
            ask = files.read_settings(files.serve(data, "answer.png"))
            with lock:
                times.append(taken)
                counts["answers"] += 1
                counts["wrong seed"] += not (ask.seed == seed == figures["settings"]["seed"])
                pixels[seed].add(digest(data))

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(made)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"counts": counts, "seconds": times, "pixels": {seed: sorted(found) for seed, found in pixels.items()}}


def crowded(options: Options) -> dict[str, Any]:
    address, engine = serve(options.queue_size, options.model)
    line = [sys.executable, "-W", "ignore", "-m", "app.benchmark", "--crowd", address, "--model", options.model]
    line += ["--clients", str(options.clients), "--seconds", str(options.seconds)]
    process, memory, me = subprocess.Popen(line, stdout=subprocess.PIPE, text=True), [], psutil.Process()
    while process.poll() is None:
        memory.append(me.memory_info().rss / 2**20)
        time.sleep(0.5)
    told = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise UserError("the crowd's process failed; its words stand above")
    got = json.loads(told.splitlines()[-1])
    wrong = 0
    for seed, found in got["pixels"].items():
        pictures = engine.make(Ask(options.model, f"a photo of a {SUBJECTS[int(seed) % 5]}", int(seed))).pictures
        wrong += bool(found) and found != [digest(files.encode(files.mosaic(pictures), None, "png"))]
    spread = Spread.of(got["seconds"])
    third = len(memory) // 3
    early, late = (statistics.median(part) for part in (memory[third : 2 * third], memory[2 * third :]))
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        **got["counts"],
        "seeds whose pixels were not the engine's": wrong,
        "answer, ms": f"{spread.median:.0f} ({spread.low:.0f} to {spread.high:.0f})",
        "memory, MB": f"{memory[0]:.0f} at first, {early:.0f} in the second third, {late:.0f} in the last",
        "growth from the second third to the last": f"{100 * (late / early - 1):.1f} %",
    }


def main(options: Options) -> None:
    if options.clients < 0 or options.prompts < 1 or options.seconds <= 0:
        raise UserError("--prompts and --seconds must be positive, --clients not below 0")
    if options.crowd is not None:
        print(json.dumps(crowd(options.crowd, options)))
        return
    import torch

    setting = environment(torch.device("cpu"))
    found = crowded(options) if options.clients else typing(options)
    found["load of the machine"] = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    print(f"{options.model}, {setting['device']}, {setting['threads']} threads, torch {setting['torch']}")
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.output is not None:
        options.output.write_text(json.dumps(found | {"environment": setting}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
