"""Runs that are killed without warning, at any moment, go on as if nothing had been.

python -m tests.test_kills 20   # twenty moments of each kind of data: some minutes on two cores
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import precompute
from distill.run import train
from distill.settings import check
from tests.test_data import webdataset
from tests.tiny import settings

KINDS = ["streamed", "precomputed", "image_folder"]
STEPS: dict[str, Any] = {
    "train": {"steps": 12, "batch_size": 8, "cpu_threads": 1, "mixed_precision": "no", "ema_decay": 0.9}
    | {"checkpoint_every": 3, "log_every": 2, "sample_every": 4},
    "method__critic_turns": 1,
    "evaluation": {"teacher_steps": 1},
}


def prepare(base: Path, kind: str) -> dict[str, Any]:
    """A run of twelve steps on data of this kind."""
    values = settings(base, "whole", **STEPS)
    match kind:
        case "streamed":
            values["data"] = webdataset(base, True) | {"size": 16}
        case "precomputed":
            (base / "c.yaml").write_text(yaml.safe_dump(values))
            precompute.main(precompute.Options(base / "latents", base / "c.yaml", per_shard=5))
            values["data"] = {"kind": "precomputed", "path": str(base / "latents"), "streaming": True}
    return values


def _begin(values: dict[str, Any], said: Path) -> None:
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(train(check(values, "test")))


def launch(values: dict[str, Any], said: Path) -> Any:
    """The training in a process of its own, which shares what is imported here."""
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(values, said))
    process.start()
    return process


def finish(values: dict[str, Any], said: Path) -> list[dict[str, Any]]:
    """Train to the end; the lines of metrics.jsonl."""
    process = launch(values, said)
    process.join()
    assert process.exitcode == 0, said.read_text()[-2000:]
    lines = (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def killed(base: Path, kind: str, moments: int) -> list[tuple[int, bool]]:
    """Of ``moments`` runs, each killed once at a random moment and then resumed: the steps logged by then, and whether
    the metrics are those of the run that was left alone. Moments are told by lines and the time behind them, so that
    they lie all over the run however busy the machine is."""
    values, said, found = prepare(base, kind), base / "said.txt", []
    lines = lambda log: log.read_text().count("\n") if log.is_file() else 0
    whole = finish(values, said)
    for number in range(moments):
        run = values | {"output": str(base / f"run-{number}")}
        log, draw = Path(run["output"]) / "metrics.jsonl", random.Random(f"{kind} {number}")
        wanted, wait = draw.randrange(len(whole) + 1), draw.random()
        process, since = launch(run, said), time.monotonic()
        while lines(log) < wanted and process.is_alive():
            time.sleep(0.001)
        process.join(wait * (time.monotonic() - since) / max(1, wanted) + 0.1 * wait)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        steps = 2 * lines(log)
        found.append((steps, finish(run, said) == whole))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_to_the_same_metrics(kind: str, tmp_path: Path):
    assert all(same for _, same in killed(tmp_path, kind, 2))


if __name__ == "__main__":
    for each in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            results = killed(Path(folder), each, int(sys.argv[1]))
        print(f"{each}: {sum(same for _, same in results)} of {len(results)} are the uninterrupted run's", flush=True)
        print("  killed behind step", *sorted(steps for steps, _ in results), flush=True)
