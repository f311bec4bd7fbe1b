"""Seconds and memory of training turns: ``python -m distill.benchmark --step f_distill``.

Runs the trainer's own dry run in a process for each batch size, so that peaks of memory do not mix. ``--step routing``
times several students on a mixed batch against one of them alone, ``--step scoring`` eval.fid's torch_fidelity protocol
against torch-fidelity itself on folders of ``--batch`` pictures, ``--step adapters`` LoRA against full fine-tuning.
Compare figures of one call only.
"""

import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from distill.workshop import shapes
from distill.workshop.shapes import Shape
from models import teachers
from models.condition import Condition
from models.errors import UserError, run_command
from models.multi_student import MultiStudent, assemble, consecutive

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    """Measure student and critic turns."""

    step: Literal[
        "pretrain",
        "sds",
        "diff_instruct",
        "dmd2",
        "f_distill",
        "sim",
        "sid",
        "sida",
        "uni_instruct",
        "routing",
        "scoring",
        "adapters",
    ] = "f_distill"
    """Method whose turns are measured; routing: generation by several students of this network; scoring: FID; adapters:
    Diff-Instruct on text-to-image teachers of the --shapes, with LoRA and in full."""
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
    shapes: tuple[Shape, ...] = ("tiny_sd", "tiny_sana")
    """Of --step adapters: networks with random weights in published or tiny sizes; the large ones want a GPU."""
    students: int = 4
    """Students of --step routing."""


def measure(options: Options, batch: int) -> dict[str, Any]:
    """One dry run; UserError with its own line if it fails."""
    values = {
        "data": options.data,
        "method": f"{{kind: {options.step}}}",
        "teacher": "null" if options.step == "pretrain" else f"{{path: '{options.teacher}'}}",
        "train.batch_size": str(batch),
        "train.mixed_precision": f"'{options.precision}'",
    }
    return dry_run(_command(values, options.set), cwd=ROOT)


def _command(values: dict[str, str], more: Sequence[str]) -> list[str]:
    """The quickstart's training command with other settings."""
    config = ROOT / "configs" / "fashion_mnist" / "quickstart.yaml"
    overrides = [*(f"{key}={value}" for key, value in values.items()), *more]
    return [str(ROOT / "distill" / "train.py"), "--config", str(config), *(f"--{item}" for item in overrides)]


def dry_run(arguments: list[str], cwd: Path | None = None) -> dict[str, Any]:
    """The estimate of a training command; UserError with the command's own last line if it fails."""
    done = subprocess.run([sys.executable, *arguments, "--dry-run"], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(lines[-1].removeprefix("error: "))
    return json.loads(done.stdout[done.stdout.index("\n{") :])


def routing(options: Options, repeats: int = 15) -> None:
    """Print the seconds of one student and of several on the same mixed batch, medians of alternating calls."""
    source = teachers.resolve(options.teacher)
    _, spec = teachers.load_class_conditional(source)
    if not 1 <= options.students <= spec.num_classes:
        raise UserError(f"--students: {options.students} students for {spec.num_classes} classes")
    with tempfile.TemporaryDirectory() as temporary:
        part, folder = Path(temporary) / "part", Path(temporary) / "several"
        shutil.copytree(source, part)
        index = json.loads((part / "model_index.json").read_text()) | {"sigma_init": 2.5}
        (part / "model_index.json").write_text(json.dumps(index))
        owner = consecutive(index["num_classes"], options.students).tolist()
        assemble(folder, [part] * options.students, owner, "")
        several = MultiStudent(folder)
        one = several.student(0)
        print(f"routing, {options.teacher}, {options.students} students")
        print(f"{'batch':>6}{'one s':>11}{'several s':>11}{'ratio':>8}")
        for batch in options.batch:
            z = torch.randn(batch, index["channels"], index["size"], index["size"])
            cond = Condition(class_ids=torch.arange(batch) % index["num_classes"])
            seconds: dict[str, list[float]] = {"one": [], "several": []}
            for name, make in [("one", one), ("several", several.generate)] * (repeats + 1):
                started = time.perf_counter()
                with torch.no_grad():
                    make(z, cond)
                seconds[name].append(time.perf_counter() - started)
            alone, mixed = (statistics.median(values[1:]) for values in seconds.values())
            print(f"{batch:>6}{alone:>11.6f}{mixed:>11.6f}{mixed / alone:>8.3f}", flush=True)


def scoring(options: Options, repeats: int = 2) -> None:
    """Print the seconds of torch-fidelity and of eval.fid for FID, Inception Score and KID of a folder of pictures.

    Random weights; both tools see the same files, and the last column is how far their FIDs are apart.
    """
    print(f"FID, IS and KID, random Inception\n{'pictures':>9}{'torch-fidelity s':>18}{'eval.fid s':>12}", end="")
    print(f"{'ratio':>8}{'difference':>12}")
    for count in options.batch:
        with tempfile.TemporaryDirectory() as temporary:
            _write_pictures(Path(temporary), count)
            calls = {"theirs": lambda path=Path(temporary): _theirs(path), "mine": lambda p=Path(temporary): _mine(p)}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            values: dict[str, float] = {}
            for name, call in [*calls.items()] * repeats:
                started = time.perf_counter()
                values[name] = call()
                seconds[name].append(time.perf_counter() - started)
        theirs, mine = (min(found) for found in seconds.values())
        apart = abs(values["mine"] / values["theirs"] - 1)
        print(f"{count:>9}{theirs:>18.2f}{mine:>12.2f}{mine / theirs:>8.3f}{apart:>12.1e}", flush=True)


def adapters(options: Options) -> None:
    """Print seconds and peak memory of turns with LoRA and in full, with and without gradient checkpointing."""
    title = f"{'shape':<12}{'trained':>8}{'checkpointing':>15}{'batch':>6}{'student s':>11}{'critic s':>10}"
    print(f"{title}{'foreseen GiB':>14}{'peak GiB':>10}{'largest batch':>15}  device")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(temporary)
            shapes.write(base / "teacher", shape)
            (base / "prompts.txt").write_text("a red cube\na photo of a blue sphere\n")
            for lora, checkpointing, batch in itertools.product((True, False), (False, True), options.batch):
                values = {
                    "data": f"{{kind: conditions_only, prompts: '{base / 'prompts.txt'}'}}",
                    "method": "{kind: diff_instruct}",
                    "teacher": f"{{path: '{base / 'teacher'}'}}",
                    "lora": "{rank: 64}" if lora else "null",
                    "train.gradient_checkpointing": str(checkpointing).lower(),
                    "train.batch_size": str(batch),
                    "train.mixed_precision": f"'{options.precision}'",
                }
                found = dry_run(_command(values, options.set), cwd=ROOT)
                name = f"{shape:<12}{'LoRA' if lora else 'full':>8}"
                times = f"{found['seconds_per_student_turn']:>11.3f}{found['seconds_per_critic_turn']:>10.3f}"
                peak = "not run" if found["measured_peak_gib"] is None else f"{found['measured_peak_gib']:.3f}"
                name += f"{'yes' if checkpointing else 'no':>15}{batch:>6}{times}"
                line = f"{name}{found['foreseen_peak_gib']:>14.3f}{peak:>10}{found['largest_micro_batch']:>15}"
                print(f"{line}  {found['device']}", flush=True)


def _write_pictures(base: Path, count: int) -> None:
    """Weights and two folders, ``made`` and ``real``, of smooth random pictures."""
    import numpy as np
    from PIL import Image

    from eval.inception import save_random

    save_random(base / "random.pth")
    generator = np.random.default_rng(0)
    for name in ("made", "real"):
        (base / name).mkdir()
        for index in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((64, 64), Image.Resampling.BICUBIC).save(base / name / f"{index:05d}.png")


def _theirs(base: Path) -> float:
    import torch_fidelity

    size = len(list((base / "real").iterdir())) // 2
    return torch_fidelity.calculate_metrics(
        input1=str(base / "made"),
        input2=str(base / "real"),
        feature_extractor_weights_path=str(base / "random.pth"),
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=size,
        cuda=False,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]


def _mine(base: Path) -> float:
    from eval import fid

    made, weights, real = base / "made", base / "random.pth", base / "real"
    return fid.evaluate_pictures(made, "torch_fidelity", weights, real, device="cpu")["scores"][0]["fd"]


def main(options: Options) -> None:
    """Print a table: seconds per turn, pictures per second of the student turn, GiB at the peak."""
    if options.step == "routing":
        return routing(options)
    if options.step == "scoring":
        return scoring(options)
    if options.step == "adapters":
        return adapters(options)
    title = f"{options.step}, {'own network' if options.step == 'pretrain' else options.teacher}"
    print(f"{title}, precision {options.precision}")
    print(f"{'batch':>6}{'student s':>11}{'critic s':>10}{'ratio':>8}{'pictures/s':>12}{'peak GiB':>10}  device")
    for batch in options.batch:
        found = measure(options, batch)
        student, critic = found["seconds_per_student_turn"], found["seconds_per_critic_turn"]
        numbers = f"{batch:>6}{student:>11.3f}{critic:>10.3f}{student / critic if critic else 0:>8.2f}"
        peak = found["measured_peak_gib"] or 0.0
        print(f"{numbers}{batch / student:>12.1f}{peak:>10.4f}  {found['device']}", flush=True)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
