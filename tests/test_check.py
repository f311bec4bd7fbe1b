"""The conversion's self-test, from the command line and on teachers whose flow is known to be another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.check import Options as CheckOptions
from models.check import check, main, time_roughness
from models.condition import Condition
from models.denoiser import Denoiser
from models.process import EDM, DiscreteVP, Process, RectifiedFlow
from models.trigflow import TrigFlowView
from tests.test_trigflow import Field, noise
from tests.tiny import ROOT, environment, save_network

VP = DiscreteVP(torch.linspace(0.998, 0.01, 100, dtype=torch.float64))


@pytest.mark.parametrize(
    ("process", "kind"), [(RectifiedFlow(), "velocity"), (VP, "v"), (VP, "eps"), (EDM(), "x0"), (EDM(), "edm")]
)
def test_random_networks_pass(process: Process, kind: str) -> None:
    denoiser = Denoiser(Field(), process, kind)  # type: ignore[arg-type]
    found = check(denoiser, noise(2, 4, 1, 1), Condition(), steps=24)
    assert [row.data_scale for row in found] == [1.0, 0.5]
    for row in found:
        assert row.pointwise <= 1e-9 and row.holds(1e-6), row


def test_a_wrong_conversion_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrigFlowView.velocity
    monkeypatch.setattr(TrigFlowView, "velocity", lambda self, x, t, cond: right(self, x, t, cond) + 0.01 * x)
    found = check(Denoiser(Field(), RectifiedFlow(), "velocity"), noise(2, 4, 1, 1), Condition(), steps=24)
    assert not any(row.holds(1e-4) for row in found)


def test_time_that_is_not_dense_is_seen() -> None:
    class Rough(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return x * torch.sin(self.factor * t).reshape(-1, 1, 1, 1)

    view = lambda factor: TrigFlowView(Denoiser(Rough(factor), RectifiedFlow(), "velocity"))
    z = noise(8, 4, 1, 1)
    assert time_roughness(view(1.0), z, Condition()) < 0.01 and time_roughness(view(1000.0), z, Condition()) > 0.5


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_network(tmp_path / "teacher", None, 0, size=16, classes=2)
    main(CheckOptions(str(folder), steps=6))
    out = capsys.readouterr().out
    assert "edm in EDM" in out and "verdict: the conversion holds" in out and "x0 = 0.5 y0" in out
    right = TrigFlowView.velocity
    monkeypatch.setattr(TrigFlowView, "velocity", lambda self, x, t, cond: -right(self, x, t, cond))
    with pytest.raises(SystemExit, match="1"):
        main(CheckOptions(str(folder), steps=6))
    assert "does NOT hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["no/such/folder"], "has no model_index.json"), (["embedded:fashion_mnist", "--steps", "0"], "at least 1")],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    line = [sys.executable, "-m", "models.check", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
