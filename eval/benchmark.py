"""Seconds and memory of training turns: ``python -m eval.benchmark --step f_distill``.

Runs the trainer's own dry run in a process for each batch size, so that peaks of memory do not mix. Compare figures of
one call only.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from eval.fid import run
from models.errors import UserError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    """Measure student and critic turns."""

    step: Literal["pretrain", "diff_instruct", "dmd2", "f_distill"] = "f_distill"
    """Method whose turns are measured."""
    teacher: str = "embedded:fashion_mnist"
    """Network: folder of a teacher, or embedded:NAME. Its resolution is the resolution measured."""
    batch: tuple[int, ...] = (32, 64, 128)
    """Batch sizes."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast."""
    data: str = "{kind: fashion_mnist, path: data/fashion-mnist}"
    """Data settings, as YAML."""
    set: tuple[str, ...] = ()
    """More overrides of the training settings: --set method.reuse_samples=false."""


def measure(options: Options, batch: int) -> dict[str, Any]:
    """One dry run; UserError with its own line if it fails."""
    values = {
        "data": options.data,
        "method": f"{{kind: {options.step}}}",
        "teacher": "null" if options.step == "pretrain" else f"{{path: '{options.teacher}'}}",
        "train.batch_size": str(batch),
        "train.mixed_precision": f"'{options.precision}'",
    }
    line = [sys.executable, str(ROOT / "distill" / "train.py"), "--dry-run"]
    line += ["--config", str(ROOT / "configs" / "fashion_mnist" / "quickstart.yaml")]
    line += [f"--{key}={value}" for key, value in values.items()]
    line += [f"--{item}" for item in options.set]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(done.stdout[done.stdout.index("\n{") :])


def main(options: Options) -> None:
    """Print a table: seconds per turn, pictures per second of the student turn, GiB at the peak."""
    title = f"{options.step}, {'own network' if options.step == 'pretrain' else options.teacher}"
    print(f"{title}, precision {options.precision}")
    print(f"{'batch':>6}{'student s':>11}{'critic s':>10}{'ratio':>8}{'pictures/s':>12}{'peak GiB':>10}  device")
    for batch in options.batch:
        found = measure(options, batch)
        student, critic = found["seconds_per_student_turn"], found["seconds_per_critic_turn"]
        numbers = f"{batch:>6}{student:>11.3f}{critic:>10.3f}{student / critic if critic else 0:>8.2f}"
        print(f"{numbers}{batch / student:>12.1f}{found['peak_memory_gib']:>10.2f}  {found['device']}", flush=True)


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options)))
