"""The benchmark's table, on a tiny network. What it measures depends on the machine; that it measures does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT, environment, settings


@pytest.mark.parametrize("step, turns", [("f_distill", 2), ("pretrain", 0)])
def test_the_table_has_a_line_for_each_batch(tmp_path: Path, step: str, turns: int):
    values = settings(tmp_path)["data"]
    data = "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"
    line = [sys.executable, "-m", "distill.benchmark", "--step", step, "--teacher", str(tmp_path / "teacher")]
    line += ["--batch", "2", "4", "--data", data]
    if step == "pretrain":
        line += ["--set", "method.channels=[8,32]"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["2", "4"]
    for _, student, critic, _, rate, peak, *_ in rows:
        assert float(student) > 0 and float(rate) > 0 and float(peak) > 0
        assert (float(critic) > 0) == (turns > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "nowhere"], "nowhere"),
        (["--step", "routing", "--teacher", "nowhere"], "nowhere"),
        (["--step", "routing", "--students", "11"], "11 students for 10 classes"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    line = [sys.executable, "-m", "distill.benchmark", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_routing_is_timed_against_one_student(tmp_path: Path):
    settings(tmp_path)
    line = [sys.executable, "-m", "distill.benchmark", "--step", "routing", "--teacher", str(tmp_path / "teacher")]
    line += ["--students", "2", "--batch", "3", "6"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[float(value) for value in row.split()] for row in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [3, 6]
    assert all(row[3] == pytest.approx(row[2] / row[1], rel=0.01) for row in rows)
