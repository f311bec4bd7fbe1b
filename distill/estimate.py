"""Time and memory of a run, from turns really made on this device.

Memory is what is always there (weights, moments, average, frozen networks) and what a turn needs beside it (gradients,
activations). The latter grows with the batch, from some number of samples on by the same amount for each, so turns of
1, 2, 4, ... samples tell it for any number, and the largest batch that fits.
"""

import statistics
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.reduce import any_process
from distill.trainer import Trainer

GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that tensors may fill; the rest is the libraries' and fragmentation."""


SETTLED = 8
"""Samples from which on two doublings alike are taken for the rule."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made and not yet freed since it began, and the most there were; for CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._see(value, given)
        return result

    def _see(self, value: Tensor, given: set[int]) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._live:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _bytes(tensors: Iterable[Any]) -> int:
    """Of this process's own storages, each once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def fixed_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes that are always there, by part: each trained network with its moments (student: and average), and the
    frozen networks, which those with adapters share."""
    parts: dict[str, int] = {}
    for name, network in trainer.bare.items():
        moments = [v for state in trainer.optimizers[name].optimizer.state.values() for v in state.values()]
        average = trainer.ema.shadow_params if name == "student" else []
        parts[name] = _bytes([*_tensors([network]), *moments, *average])
    device = trainer.accelerator.device.type
    own = {t.untyped_storage().data_ptr() for t in _tensors(trainer.bare.values()) if not isinstance(t, DTensor)}
    frozen = _tensors([*trainer.method.frozen, *trainer.method.buffers.values(), *trainer.spec.parts()])
    kept = [t for t in frozen if t.device.type == device]
    parts["frozen"] = _bytes(t for t in kept if isinstance(t, DTensor) or t.untyped_storage().data_ptr() not in own)
    return parts


def _turn(trainer: Trainer, kind: str) -> float:
    """Wall time of one turn, the device's queue drained before and after."""
    wait = torch.cuda.synchronize if trainer.accelerator.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    trainer.turn(kind, 0 if kind == "student" else 1)
    wait()
    return time.perf_counter() - started


def turn_memory(trainer: Trainer, kind: str) -> int:
    """Most bytes that a turn has beside the fixed ones."""
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _turn(trainer, kind)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        _turn(trainer, kind)
    return live.peak


def _resize(trainer: Trainer, samples: int) -> None:
    """Micro-batches of ``samples`` from now on."""
    trainer.size = samples
    if trainer.stream is not None:
        trainer.stream.resize(samples)


def _kinds(trainer: Trainer) -> list[str]:
    return ["student", "critic"] if trainer.method.critic_turns else ["student"]


@dataclass
class Peaks:
    """Most bytes of one kind of turn beside the fixed ones, by the number of samples, ascending.

    They are the largest of many lines, one for each moment of the turn: few samples leave the optimizer's step at the
    top, many the activations. So they grow the faster the more samples there are, up to the steepest line.
    """

    found: dict[int, int] = field(default_factory=dict)

    def _line(self) -> tuple[int, float]:
        """Bytes for no sample and for each one more, by two large numbers apart; of one alone, all is its samples'."""
        if len(self.found) == 1:
            ((count, peak),) = self.found.items()
            return 0, peak / count
        many, high = max(self.found.items())
        few, low = max((count, peak) for count, peak in self.found.items() if count <= 0.75 * many)
        each = max(1.0, (high - low) / (many - few))
        return round(high - many * each), each

    def at(self, samples: int) -> int:
        fewest, each = self._line()
        return self.found.get(samples, round(fewest + samples * each))

    def largest(self, memory: float) -> int:
        """Samples that ``memory`` bytes are enough for."""
        fewest, each = self._line()
        return max(0, int((memory - fewest) // each))

    def settled(self) -> bool:
        """Whether the last doubling went on as the one before, and there are eight samples or more."""
        if len(self.found) < 3 or max(self.found) < SETTLED:
            return False
        (a, first), (b, second), (c, third) = sorted(self.found.items())[-3:]
        before, after = (second - first) / (b - a), (third - second) / (c - b)
        return abs(after - before) <= 0.01 * after


def measure(trainer: Trainer, peaks: dict[str, Peaks], samples: int) -> None:
    """Add the peaks of micro-batches of ``samples``, behind a turn of each kind that makes what is made once."""
    _resize(trainer, samples)
    for kind in peaks:
        _turn(trainer, kind)
    for kind, peak in peaks.items():
        peak.found[samples] = turn_memory(trainer, kind)


def plan_memory(trainer: Trainer, usable: float) -> tuple[dict[str, int], dict[str, Peaks]]:
    """Fixed bytes by part, and the peaks of each kind of turn, of 1, 2, 4, ... samples: until they are settled, the
    next would be more than are asked for, or it would take more than ``usable`` bytes."""
    size, peaks = trainer.size, {kind: Peaks() for kind in _kinds(trainer)}
    samples, fixed, goes_on = 1, {}, True
    while goes_on:
        measure(trainer, peaks, samples)
        fixed = fixed_memory(trainer)
        samples *= 2
        fits = all(sum(fixed.values()) + peak.at(samples) <= usable for peak in peaks.values())
        ends = samples > size or not fits or all(peak.settled() for peak in peaks.values())
        goes_on = not any_process(ends, trainer.accelerator.device)
    _resize(trainer, size)
    return fixed, peaks


def device_memory(device: torch.device) -> int:
    """Bytes that a process's device has in all."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total


def estimate(trainer: Trainer, repeats: int = 3) -> dict[str, Any]:
    """Seconds per student and critic turn (median of ``repeats``), time of the whole run, and memory of a process: by
    part, at the micro-batch that was asked for, measured where it fits, else foreseen from smaller ones; and the
    largest one that fits.

    The turns change the trainer's networks: use it for nothing else afterwards. Nothing is written.
    """
    device, size = trainer.accelerator.device, trainer.size
    usable = USABLE * device_memory(device)
    fixed, peaks = plan_memory(trainer, usable)
    room = usable - sum(fixed.values())
    foreseen = sum(fixed.values()) + max(peak.at(size) for peak in peaks.values())
    seconds, measured = dict.fromkeys(peaks, 0.0), None
    if not any_process(size > min(peak.largest(room) for peak in peaks.values()), device):
        if any(size not in peak.found for peak in peaks.values()):
            measure(trainer, peaks, size)
        measured = sum(fixed.values()) + max(peak.at(size) for peak in peaks.values())
        seconds = {kind: statistics.median(_turn(trainer, kind) for _ in range(repeats)) for kind in peaks}
    step = seconds["student"] + trainer.method.critic_turns * seconds.get("critic", 0.0)
    gib = lambda value: round(value / GIB, 4)
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "processes": trainer.accelerator.num_processes,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in trainer.bare.items()},
        "seconds_per_student_turn": round(seconds["student"], 4),
        "seconds_per_critic_turn": round(seconds.get("critic", 0.0), 4),
        "critic_turns_per_student_turn": trainer.method.critic_turns,
        "hours": round(step * trainer.config.train.steps / 3600, 3) if measured else None,
        "memory_gib": {name: gib(value) for name, value in fixed.items()}
        | {f"{kind}_turn": gib(peak.at(size)) for kind, peak in peaks.items()}
        | {"total": gib(measured or foreseen), "device": gib(device_memory(device))},
        "foreseen_peak_gib": gib(foreseen),
        "measured_peak_gib": gib(measured) if measured else None,
        "micro_batch": size,
        "largest_micro_batch": min(peak.largest(room) for peak in peaks.values()),
    }
