"""The memory that a dry run foresees, against what a batch is then measured to take."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.estimate import LiveBytes, Peaks, estimate, fixed_memory, measure, plan_memory, turn_memory
from distill.optimizers import new_optimizer
from distill.run import build
from distill.settings import Optimizer, check
from models.errors import UserError
from tests import families, tiny
from tests.test_families import f_distill, values


def trainer(
    base: Path, family: str, method: dict[str, Any], lora: bool, batch: int, checkpointing: bool = False
) -> Any:
    teacher = base / family
    if not teacher.is_dir():
        tiny.save_sana(teacher) if family == "sana" else families.save(teacher, family)
    made = values(base, teacher, "run", method, lora, 1.0)
    if family == "sana":
        made["teacher"] = {"path": str(teacher), "guidance": 1.0}
        made["data"] = {"kind": "solids", "size": 32}
        made["method"]["gan"]["taps"] = ["transformer.transformer_blocks.0"]
    made["train"] |= {"batch_size": batch, "gradient_checkpointing": checkpointing}
    return build(check(made, "test"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["stable_diffusion", "sana"])
def test_foreseen_memory_is_what_is_measured(family: str, lora: bool, tmp_path: Path) -> None:
    found = estimate(trainer(tmp_path, family, f_distill(family), lora, 12), repeats=1)
    assert found["memory_gib"]["total"] == pytest.approx(found["measured_peak_gib"], rel=0.15)
    assert found["foreseen_peak_gib"] == pytest.approx(found["measured_peak_gib"], rel=0.15)
    assert found["micro_batch"] == 12 and found["largest_micro_batch"] > 12
    parts = found["memory_gib"]
    assert parts["frozen"] > 0 and parts["student_turn"] > 0 and parts["critic_turn"] > 0


def foreseen(made: Any, sizes: list[int]) -> list[tuple[int, int]]:
    """Bytes of micro-batches of ``sizes``, as those of less than the first foresee them, and as they are."""
    made.size = sizes[0]
    fixed, peaks = plan_memory(made, 1e15)
    assert max(max(peak.found) for peak in peaks.values()) <= sizes[0] < sizes[-1]
    guesses = [sum(fixed.values()) + max(peak.at(size) for peak in peaks.values()) for size in sizes[1:]]
    found = []
    for size in sizes[1:]:
        measure(made, peaks, size)
        found.append(sum(fixed.values()) + max(peak.at(size) for peak in peaks.values()))
    return list(zip(guesses, found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_larger_batches_are_foreseen_from_smaller_ones(lora: bool, checkpointing: bool, tmp_path: Path) -> None:
    made = trainer(tmp_path, "stable_diffusion", f_distill("stable_diffusion"), lora, 16, checkpointing)
    for guess, found in foreseen(made, [16, 64, 96]):
        assert guess == pytest.approx(found, rel=0.05)


def test_the_optimizers_step_is_not_taken_for_the_activations(tmp_path: Path) -> None:
    """The embedded teacher's U-Net: with one and two samples its optimizers' step is the larger part."""
    teacher, method = {"path": "embedded:fashion_mnist"}, {"kind": "diff_instruct", "critic_turns": 1}
    values = tiny.settings(tmp_path, teacher=teacher, data={"kind": "conditions_only"}, method=method)
    made = build(check(values, "test"))
    ((guess, found),) = foreseen(made, [16, 32])
    assert guess == pytest.approx(found, rel=0.05)
    made.size = 16
    small = {kind: turn_memory(made, kind) for kind in ("student",)}
    assert small["student"] < found


def test_peaks_are_lines_by_their_steepest_part() -> None:
    def peaks(*counts: int) -> Peaks:
        return Peaks({count: max(100, 40 + 10 * count) for count in counts})

    assert not peaks(1, 2, 4).settled() and not peaks(1, 2, 4, 8, 16).settled() and peaks(4, 8, 16, 32).settled()
    assert peaks(8, 16).at(64) == 680 and peaks(8, 16).largest(680) == 64 and peaks(8, 16, 17).largest(680) == 64
    assert peaks(4).at(8) == 200 and peaks(8, 16).largest(3) == 0


def test_adapters_take_less_than_copies_and_checkpointing_less_than_keeping(tmp_path: Path) -> None:
    family = "stable_diffusion_3"
    sizes = {}
    for lora in (False, True):
        made = trainer(tmp_path, family, f_distill(family), lora, 2)
        made.turn("student", 0)
        made.turn("critic", 1)
        sizes[lora] = fixed_memory(made)
    count = sum(p.numel() for p in made.method.teacher.parameters() if not p.requires_grad)
    assert sizes[False]["student"] > 4 * 4 * count  # weights, two moments and the average, in float32
    assert sizes[True]["student"] + sizes[True]["critic"] < 0.5 * sizes[False]["student"]
    turns = {}
    for checkpointing in (False, True):
        made = trainer(tmp_path, family, f_distill(family), False, 8, checkpointing)
        made.turn("student", 0)
        turns[checkpointing] = turn_memory(made, "critic")
    assert turns[True] < turns[False]


def test_live_bytes_counts_what_is_held() -> None:
    weights = torch.ones(1000)
    with LiveBytes() as live:
        a = weights + 1
        b = a.view(10, 100)[2:]  # a view holds nothing of its own
        c = torch.cat([a, a])
        assert live.now == 4 * 3000 and live.peak == 4 * 3000
        del a, b
        assert live.now == 4 * 2000
        del c
        assert live.now == 0
        weights.add_(1)
        assert live.now == 0 and live.peak == 4 * 3000


def test_eight_bits_without_the_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        new_optimizer(torch.nn.Linear(2, 2), Optimizer(lr=1e-3, eight_bit=True))
