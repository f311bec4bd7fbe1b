"""Time and memory of a run, from turns really made on this device."""

import resource
import statistics
import sys
import time
from typing import Any

import torch

from distill.trainer import Trainer


def _seconds(trainer: Trainer, kind: str, index: int) -> float:
    """Wall time of one turn, the device's queue drained before and after."""
    wait = torch.cuda.synchronize if trainer.accelerator.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    trainer.turn(kind, index)
    wait()
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> float:
    """Most memory used up to now, GiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def network_memory(trainer: Trainer) -> dict[str, float]:
    """GiB that parameters take, with gradients, two moments and (student) the average where trained."""
    gib = lambda modules: sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / 2**30
    trained = {name: gib([network]) * (5 if name == "student" else 4) for name, network in trainer.bare.items()}
    return trained | {"frozen": gib(trainer.method.frozen)}


def estimate(trainer: Trainer, repeats: int = 3) -> dict[str, Any]:
    """Seconds per student and critic turn (median of ``repeats`` after one of warm-up), time of the whole run, memory.

    The turns change the trainer's networks: use it for nothing else afterwards. Nothing is written.
    """
    critic_turns = trainer.method.critic_turns
    _seconds(trainer, "student", 0)
    student = statistics.median(_seconds(trainer, "student", 0) for _ in range(repeats))
    critic = 0.0
    if critic_turns:
        _seconds(trainer, "critic", 1)
        critic = statistics.median(_seconds(trainer, "critic", 1) for _ in range(repeats))
    step = student + critic_turns * critic
    device = trainer.accelerator.device
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "processes": trainer.accelerator.num_processes,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in trainer.bare.items()},
        "seconds_per_student_turn": round(student, 4),
        "seconds_per_critic_turn": round(critic, 4),
        "critic_turns_per_student_turn": critic_turns,
        "hours": round(step * trainer.config.train.steps / 3600, 3),
        "network_memory_gib": {name: round(value, 4) for name, value in network_memory(trainer).items()},
        "peak_memory_gib": round(peak_memory(device), 3),
    }
