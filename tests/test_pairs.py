"""Pairs of noise and teacher picture: made by the command, read by the regression term."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.pairs import Arguments, Pairs
from distill.pairs import make as make_pairs
from distill.run import build
from distill.settings import Config
from models.condition import Condition
from models.errors import UserError
from models.seeds import Draws
from models.student import heun
from models.teachers import load
from tests.tiny import ROOT, environment, save_network, settings

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, pictures and seven pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    settings(folder)
    made = make(folder, "--count", "7", "--steps", "3", "--batch", "4")
    assert made.returncode == 0, made.stderr
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "distill.pairs", "--teacher", str(folder / "teacher")]
    line += ["--output", str(folder / "pairs.safetensors"), *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["count", "steps", "batch"])
def test_no_pairs_and_no_steps_are_one_line(base: Path, name: str):
    arguments = Arguments(str(base / "teacher"), base / "none.safetensors", **{name: 0})
    with pytest.raises(UserError, match="must be at least 1"):
        make_pairs(arguments)


def test_a_pair_is_the_teachers_picture_of_its_noise(base: Path):
    tensors = load_file(base / "pairs.safetensors")
    assert tensors["class_ids"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    teacher, _ = load(base / "teacher")
    z = Draws([5]).normal(*SHAPE)
    expected = heun(teacher, z, Condition(class_ids=torch.tensor([1])), 3)
    torch.testing.assert_close(tensors["z"][5:6], z)
    torch.testing.assert_close(tensors["target"][5:6], expected, rtol=1e-4, atol=1e-4)


def test_sampled_rows_stay_together(base: Path):
    pairs = Pairs(base / "pairs.safetensors", SHAPE, every=3)
    z, cond, target = pairs.sample(Draws(list(range(40))))
    assert len(z) == len(target) == 14 and cond.class_ids is not None
    for row in range(14):
        index = int((pairs.z - z[row]).flatten(1).norm(dim=1).argmin())
        assert torch.equal(pairs.target[index], target[row]) and pairs.class_ids[index] == cond.class_ids[row]


def test_regression_alone_moves_the_student_onto_its_pairs(base: Path):
    """With so large a weight the other terms are noise. Half the error is below what any wrong pairing can reach, which
    is the targets' variance, about the error at the start."""
    regression = {"path": str(base / "pairs.safetensors"), "weight": 1e4, "every": 1}
    method = {"kind": "dmd2", "critic_turns": 1, "gan": {"width": 8}, "regression": regression}
    student = {"lr": 1e-2, "warmup_steps": 0, "max_grad_norm": 1e9}
    trainer = build(Config.model_validate(settings(base, method=method, student=student)))
    pairs = Pairs(base / "pairs.safetensors", SHAPE, every=1)

    def error() -> float:
        made = trainer.method.sample(pairs.z, Condition(class_ids=pairs.class_ids))
        return float((made - pairs.target).square().mean())

    start = error()
    for _ in range(60):
        trainer.turn("student", 0)
    assert error() < start / 2


def test_pairs_are_of_the_teacher_that_made_them(base: Path, capsys: pytest.CaptureFixture[str]):
    regression = {"path": str(base / "pairs.safetensors")}
    method = {"kind": "dmd2", "gan": {"width": 8}, "regression": regression}
    save_network(base / "other", None, 1, size=16, classes=2)
    config = settings(base, method=method, teacher__path=str(base / "other"))
    with pytest.raises(UserError, match=r"pairs.safetensors was made by another teacher, .*distill.pairs` again"):
        build(Config.model_validate(config))
    old = load_file(base / "pairs.safetensors")  # as earlier versions wrote them
    save_file(old, base / "old.safetensors")
    teacher, _ = load(base / "other")
    Pairs(base / "old.safetensors", SHAPE, 1, teacher)
    assert "does not tell whose pairs they are" in capsys.readouterr().err


def test_a_wrong_file_is_one_line(base: Path):
    with pytest.raises(UserError, match=r"pairs of shape \(1, 16, 16\), the teacher's is \(1, 32, 32\)"):
        Pairs(base / "pairs.safetensors", (1, 32, 32), every=1)
    save_file({"z": torch.zeros(1)}, base / "other.safetensors")
    with pytest.raises(UserError, match="is not a file of pairs"):
        Pairs(base / "other.safetensors", SHAPE, every=1)
    done = make(base, "--teacher", "embedded:nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing" in done.stderr
