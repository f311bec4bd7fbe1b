"""bf16 is chosen where the machine computes in it, and a run keeps what it was started with."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distill import precision
from distill.run import check_same_run, with_precision
from distill.settings import Config, check
from tests.tiny import ROOT, environment, settings, train, write_settings

CPU = torch.device("cpu")


def config(base: Path, asked: str) -> Config:
    return check(settings(base, train__mixed_precision=asked), "test")


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "no")])
def test_auto_asks_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, chosen: str):
    monkeypatch.setattr(precision, "native_bf16", lambda device: (native, "it said so"))
    found, reason = precision.resolved(config(tmp_path, "auto"), CPU)
    assert (found.train.mixed_precision, reason) == (chosen, "it said so")
    for asked in ("no", "bf16"):
        assert precision.resolved(config(tmp_path, asked), CPU)[0].train.mixed_precision == asked


def test_a_run_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Started where bf16 is native, resumed where it is not: the same run."""
    monkeypatch.setattr(precision, "native_bf16", lambda device: (False, "no such CPU"))
    asked = config(tmp_path, "auto")
    asked.output.mkdir()
    started = asked.model_copy(update={"train": asked.train.model_copy(update={"mixed_precision": "bf16"})})
    (asked.output / "config.yaml").write_text(yaml.safe_dump(started.model_dump(mode="json")))
    resumed, reason = with_precision(asked)
    assert resumed.train.mixed_precision == "bf16" and "started" in reason
    check_same_run(resumed)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable is for x86 CPUs")
def test_a_cpu_of_avx2_alone_has_none():
    code = "import torch; from distill.precision import native_bf16; print(*native_bf16(torch.device('cpu')))"
    limited = environment() | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.startswith("False this CPU has no AVX512-bf16"), said.stderr


def test_the_dry_run_says_which_and_why(tmp_path: Path):
    path = write_settings(tmp_path, "dry", train__mixed_precision="auto")
    done = train("--config", path, "--dry-run")
    assert done.returncode == 0 and "train.mixed_precision: auto is " in done.stdout, done.stderr
    assert "mixed_precision: auto" not in done.stdout.split("auto is")[0]
