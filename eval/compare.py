"""Methods side by side on one teacher: train, score and tabulate.

    python -m eval.compare --output report/compare                 # the shipped methods, three seeds, equal steps
    python -m eval.compare --seconds 300 --output report/compare   # and once more with equal time

Every run is an ordinary one of distill/train.py in ``runs/compare``, so a repeated command goes on where it stopped.
Equal time: each method takes as many steps as fit into ``seconds`` at the pace of its first run in the other table.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from eval import fid
from models import teachers
from models.errors import UserError

ROOT = Path(__file__).parent.parent
SHIPPED = ("diff_instruct", "dmd2", "f_distill", "uni_instruct", "sim", "sid", "multi_student")


@dataclass(frozen=True)
class Options:
    """Train each configuration with each seed, score it, and write compare.json and compare.md."""

    configs: tuple[Path, ...] = tuple(ROOT / f"configs/fashion_mnist/{name}.yaml" for name in SHIPPED)
    """Configurations of runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training."""
    steps: int = 400
    """Student steps of every run in the first table."""
    seconds: float | None = None
    """Training time of every run in the second table; None: no second table."""
    num_images: int = 4000
    """Pictures to score each student on."""
    runs: Path = Path("runs/compare")
    """Where the runs lie."""
    output: Path = Path("report/compare")
    """Folder for compare.json and compare.md."""
    set: tuple[str, ...] = ()
    """Overrides of every configuration: --set train.batch_size=32."""


@dataclass(frozen=True)
class Row:
    """One configuration in one table; ``scores`` and ``seconds`` by seed."""

    name: str
    steps: int
    scores: list[float]
    seconds: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; nan for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else float("nan")


def train(config: Path, folder: Path, seed: int, steps: int, overrides: tuple[str, ...]) -> float:
    """Train into ``folder``; returns the seconds it took in all, those of interrupted calls included."""
    record = folder.with_name(f"{folder.name}.seconds")
    spent = float(record.read_text()) if record.is_file() else 0.0
    if (folder / "student" / "model_index.json").is_file():
        return spent
    every = [f"train.steps={steps}", f"train.seed={seed}", f"output={folder}", f"train.sample_every={steps}"]
    line = [sys.executable, str(ROOT / "distill" / "train.py"), "--config", str(config)]
    line += [f"--{item}" for item in (*every, *overrides)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    finally:
        record.write_text(f"{spent + time.monotonic() - started:.1f}\n")
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return float(record.read_text())


def score(folder: Path, num_images: int) -> dict[str, Any]:
    """The report of the run's student, made once."""
    path = folder / f"score-{num_images}.json"
    if not path.is_file():
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        result = fid.evaluate(folder / "student", teachers.resolve(settings["teacher"]["path"]), num_images)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return json.loads(path.read_text())


def table(options: Options, name: str, steps: dict[Path, int]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of one table, and the scores of the teacher that all of them share."""
    rows, shared = [], []
    for config in options.configs:
        scores, seconds = [], []
        for seed in options.seeds:
            folder = options.runs / name / f"{config.stem}-{seed}"
            seconds.append(train(config, folder, seed, steps[config], options.set))
            found = score(folder, options.num_images)["scores"]
            scores.append(found[0]["fd"])
            shared = shared or found[1:]
            if found[1:] and found[1]["fd"] != shared[0]["fd"]:
                raise UserError(f"{config} has another teacher than {options.configs[0]}: compare them separately")
            print(f"{name}: {config.stem}, seed {seed}, {steps[config]} steps: {scores[-1]:.3f}", flush=True)
        rows.append(Row(config.stem, steps[config], scores, seconds))
    return rows, shared


def markdown(title: str, rows: list[Row], shared: list[dict[str, Any]]) -> str:
    """A table, best first; the standard deviation is over seeds."""
    lines = [f"{title}\n", "| | steps | seconds | score | by seed |", "|---|---|---|---|---|"]
    lines += [f"| {row['sampler']} | | | {row['fd']:.3f} | |" for row in shared]
    for row in sorted(rows, key=lambda row: row.mean):
        each = ", ".join(f"{value:.3f}" for value in row.scores)
        spread = f" ± {row.spread:.3f}" if len(row.scores) > 1 else ""
        lines.append(
            f"| {row.name} | {row.steps} | {statistics.mean(row.seconds):.0f} | {row.mean:.3f}{spread} | {each} |"
        )
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Both tables; written after each, so that an interrupted comparison has what it has."""
    if missing := [str(config) for config in options.configs if not config.is_file()]:
        raise UserError(f"--configs: {missing[0]} is not a file")
    if len({config.stem for config in options.configs}) < len(options.configs):
        raise UserError("--configs: two files have one name")
    options.output.mkdir(parents=True, exist_ok=True)
    texts, found = [], {}

    def keep(key: str, title: str, rows: list[Row], shared: list[dict[str, Any]]) -> None:
        texts.append(markdown(title, rows, shared))
        found[key] = {"title": title, "teacher": shared, "rows": [row.__dict__ for row in rows]}
        (options.output / "compare.md").write_text("\n".join(texts))
        (options.output / "compare.json").write_text(json.dumps(found, indent=2) + "\n")
        print("\n" + texts[-1])

    equal = {config: options.steps for config in options.configs}
    rows, shared = table(options, f"steps-{options.steps}", equal)
    keep("steps", f"Equal steps ({options.steps}), {len(options.seeds)} seeds", rows, shared)
    if options.seconds is not None:
        pace = {config: row.seconds[0] / row.steps for config, row in zip(options.configs, rows, strict=True)}
        fitting = {config: max(1, round(options.seconds / pace[config])) for config in options.configs}
        rows, shared = table(options, f"seconds-{options.seconds:g}", fitting)
        keep("seconds", f"Equal time ({options.seconds:g} s), {len(options.seeds)} seeds", rows, shared)


if __name__ == "__main__":
    fid.run(lambda: main(tyro.cli(Options)))
