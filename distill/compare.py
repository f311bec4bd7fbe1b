"""Methods side by side on one teacher: train, score and tabulate; or the reports of runs that are scored already.

    python -m distill.compare --output report/compare                 # the shipped methods, three seeds, equal steps
    python -m distill.compare --seconds 300 --output report/compare   # and once more with equal time
    python -m distill.compare --reports runs/a/report/report.json runs/b/report/report.json

Every run is an ordinary one of distill/train.py in ``runs/compare``, so a repeated command goes on where it stopped.
Equal time: each method takes as many steps as fit into ``seconds`` by the estimate of ``--dry-run``, made of one method
after another before the second table; where that is within a twentieth of the steps in the first table, the runs are
the same.
"""

import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro
import yaml

from distill.benchmark import dry_run
from eval import fid
from eval.features import Protocol, load_extractor, weights_digest
from eval.reference import load_reference
from eval.scoring import protocol
from models import teachers
from models.errors import UserError, run_command
from models.yaml_text import read_yaml

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
    """Time of the training steps of every run in the second table; None: no second table."""
    num_images: int = 4000
    """Pictures to score each student on."""
    jobs: int = 1
    """Runs side by side, each on its share of the CPU cores: done sooner, and their times compare with each other."""
    runs: Path = Path("runs/compare")
    """Where the runs lie."""
    output: Path = Path("report/compare")
    """Folder for compare.json and compare.md."""
    set: tuple[str, ...] = ()
    """Overrides of every configuration: --set train.batch_size=32."""
    reports: tuple[Path, ...] = ()
    """Reports to set side by side, in the place of training. All must be of one protocol."""
    each_protocol: bool = False
    """A table for each protocol among --reports, in the place of an error."""

    @property
    def overrides(self) -> list[str]:
        """``set``, and the threads of one run of several."""
        cores = len(os.sched_getaffinity(0))
        threads = [f"train.cpu_threads={max(1, cores // self.jobs)}"] if self.jobs > 1 else []
        return [*threads, *self.set]


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


class Record:
    """What is known of one run, in a file beside it: what it was made by, how long it took, its score."""

    def __init__(self, options: Options, config: Path, steps: int, seed: int):
        self.folder = options.runs / f"{config.stem}-{steps}-{seed}"
        self.path, self.log = self.folder.with_name(f"{self.folder.name}.json"), self.folder.with_suffix(".log")
        try:
            settings = json.dumps(read_yaml(config.read_text()), sort_keys=True, default=str)  # comments may change
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{config} cannot be read: {' '.join(str(error).split())}") from error
        digest = hashlib.sha256(settings.encode()).hexdigest()
        made_by = {"config_sha256": digest, "steps": steps, "seed": seed, "set": options.overrides}
        self.values: dict[str, Any] = {"made_by": made_by, "seconds": 0.0}
        if self.path.is_file():
            self.values = json.loads(self.path.read_text())
        elif self.folder.exists():
            raise UserError(f"{self.folder} is a run of another command: choose another --runs")
        if self.values["made_by"] != made_by:
            raise UserError(f"{self.folder} was made from {config} as it was then, or other --set: choose other --runs")
        self.line = [sys.executable, str(ROOT / "distill" / "train.py"), "--config", str(config)]
        every = [f"train.seed={seed}", f"output={self.folder}", f"train.sample_every={steps}"]
        self.line += [f"--{item}" for item in (*every, *options.overrides)]
        self.steps = steps

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=2) + "\n")
        temporary.rename(self.path)

    def train(self, stop: threading.Event | None = None) -> float:
        """Train, or go on, until ``stop``; returns the seconds it took in all, to within five where it was killed."""
        if (self.folder / "student" / "model_index.json").is_file():
            return self.values["seconds"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before, started = self.values["seconds"], time.monotonic()
        with self.log.open("w") as log:
            process = subprocess.Popen([*self.line, f"--train.steps={self.steps}"], stdout=log, stderr=log)
            try:
                status = None
                while status is None and not (stop and stop.is_set()):
                    self.values["seconds"] = before + time.monotonic() - started
                    self.save()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(5)
            finally:
                process.terminate()  # it saves and ends
                process.wait()
                self.values["seconds"] = before + time.monotonic() - started
                self.save()
        if status:
            lines = self.log.read_text().strip().splitlines()
            reason = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
            raise UserError(f"{self.folder}: {reason} (all of it is in {self.log})")
        return self.values["seconds"]

    def score(self, num_images: int) -> list[dict[str, Any]]:
        """Scores of the student and its teacher; measured once, unless the protocol or the weights change."""
        settings = read_yaml((self.folder / "config.yaml").read_text())
        if settings["teacher"] is None:
            raise UserError(f"{self.folder} has no teacher: there is nothing to compare")
        student = self.folder / "student"
        spec, judge = teachers.load_class_conditional(student)[1], load_extractor("fd_fmnist_cnn", "cpu")
        rules = protocol(judge, load_reference(judge.name), num_images, 0, spec.num_classes)
        key = f"{rules.digest()} {weights_digest(student)}"
        if self.values.get("scored") != key:
            result = fid.evaluate(student, teachers.resolve(settings["teacher"]["path"]), num_images, timed=False)
            self.values |= {"scored": key, "scores": result["scores"]}
            self.save()
        return self.values["scores"]


def train(options: Options, records: list[Record]) -> None:
    """Train all of them, ``options.jobs`` at a time."""
    stop = threading.Event()

    def one(record: Record) -> None:
        try:
            if not stop.is_set() and (seconds := record.train(stop)) and not stop.is_set():
                print(f"{record.folder.name}: trained in {seconds:.0f} s", flush=True)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for finished in [pool.submit(one, record) for record in records]:
                finished.result()
        finally:
            stop.set()


def table(options: Options, steps: dict[Path, int]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of one table, and the scores of the teacher that all of them share."""
    records = {path: [Record(options, path, steps[path], seed) for seed in options.seeds] for path in options.configs}
    train(options, [record for several in records.values() for record in several])
    rows, shared = [], []
    for config, several in records.items():
        scores = []
        for record in several:
            found = record.score(options.num_images)
            scores.append(found[0]["fd"])
            shared = shared or found[1:]
            if found[1:] and found[1]["fd"] != shared[0]["fd"]:
                raise UserError(f"{config} has another teacher than {options.configs[0]}: compare them separately")
            print(f"{record.folder.name}: {scores[-1]:.3f}", flush=True)
        seconds = [record.values["seconds"] for record in several]
        rows.append(Row(config.stem, steps[config], scores, seconds))
    return rows, shared


def pace(options: Options, config: Path) -> float:
    """Seconds a step of all students of a run takes; measured once, then read from beside the runs."""
    record = Record(options, config, options.steps, options.seeds[0])
    if "seconds_per_step" not in record.values:
        estimate = dry_run([*record.line[1:], "--train.steps=100000"])
        record.values["seconds_per_step"] = estimate["hours"] * 3600 / 100000
        record.save()
    return record.values["seconds_per_step"]


def steps_in(seconds: float, pace: float, steps: int) -> int:
    """Steps that fit into ``seconds`` at ``pace``; ``steps`` where they are within a twentieth of it."""
    found = max(1, round(seconds / pace))
    return steps if abs(found - steps) <= steps / 20 else found


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


def read_report(path: Path) -> tuple[Protocol, list[dict[str, Any]]]:
    """Protocol and scores of a report.json; UserError if it is none, or if its protocol was edited."""
    try:
        found = json.loads(path.read_text())
        digest = found["protocol"].pop("digest")
        rules, scores = Protocol(**found["protocol"]), found["scores"]
        for row in scores:
            _ = row["sampler"], row["nfe"], float(row["fd"]), row["protocol_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--reports: {path} is no report.json of eval.fid: {error}") from error
    if rules.digest() != digest or any(row["protocol_digest"] != digest for row in scores):
        raise UserError(f"--reports: {path}: its protocol and its scores do not belong together")
    return rules, scores


def compare_reports(paths: tuple[Path, ...], each_protocol: bool) -> str:
    """A table of all scores, best first; one for each protocol if that is asked for, else UserError."""
    groups: dict[str, tuple[Protocol, list[tuple[str, dict[str, Any]]]]] = {}
    for path in paths:
        rules, scores = read_report(path)
        if groups and not each_protocol:
            first, _ = next(iter(groups.values()))
            first.require_same(rules)
        run = path.parent.parent.name if path.parent.name == "report" else path.parent.name
        groups.setdefault(rules.digest(), (rules, []))[1].extend((run, row) for row in scores)
    texts = []
    for digest, (rules, rows) in groups.items():
        seeds = f"{rules.images} pictures, seeds {rules.seeds}"
        texts.append(f"{rules.extractor}, {seeds}, against {rules.reference} (protocol {digest[:12]})\n")
        texts.append("| run | generator | network calls | distance |\n|---|---|---|---|")
        for run, row in sorted(rows, key=lambda item: item[1]["fd"]):
            texts.append(f"| {run} | {row['sampler']} | {row['nfe'] or '-'} | {row['fd']:.3f} |")
        texts.append("")
    return "\n".join(texts)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(options: Options) -> None:
    """Both tables; written after each, so that an interrupted comparison has what it has."""
    if options.reports:
        text = compare_reports(options.reports, options.each_protocol)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "reports.md").write_text(text)
        print(text)
        return
    if not options.configs or not options.seeds:
        raise UserError("--configs and --seeds: give at least one of each")
    if options.jobs < 1:
        raise UserError("--jobs: at least 1")
    if missing := [str(config) for config in options.configs if not config.is_file()]:
        raise UserError(f"--configs: {missing[0]} is not a file")
    if len({config.stem for config in options.configs}) < len(options.configs):
        raise UserError("--configs: two files have one name")
    signal.signal(signal.SIGTERM, _interrupt)
    options.output.mkdir(parents=True, exist_ok=True)
    texts, found = [], {}

    def keep(key: str, title: str, rows: list[Row], shared: list[dict[str, Any]]) -> None:
        texts.append(markdown(title, rows, shared))
        found[key] = {"title": title, "teacher": shared, "rows": [row.__dict__ for row in rows]}
        (options.output / "compare.md").write_text("\n".join(texts))
        (options.output / "compare.json").write_text(json.dumps(found, indent=2) + "\n")
        print("\n" + texts[-1])

    equal = {config: options.steps for config in options.configs}
    rows, shared = table(options, equal)
    keep("steps", f"Equal steps of each student ({options.steps}), {len(options.seeds)} seeds", rows, shared)
    if options.seconds is not None:
        paces = {config: pace(options, config) for config in options.configs}
        fitting = {config: steps_in(options.seconds, paces[config], options.steps) for config in options.configs}
        rows, shared = table(options, fitting)
        keep("seconds", f"Equal time ({options.seconds:g} s), {len(options.seeds)} seeds", rows, shared)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
