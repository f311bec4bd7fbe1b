"""Diagnostics of a run: sums on the device, one line of metrics.jsonl at a time."""

import json
from pathlib import Path
from typing import Any

import torch

from distill.methods.base import Logs
from distill.reduce import of_all_processes, sum_over_processes


class Metrics:
    """Means of what methods log, over the steps between two lines and over all processes.

    ``sums`` maps a name to this process's (2, ...) sums and counts; those of all processes belong to a checkpoint, so
    that a resumed run writes the very lines of the uninterrupted one. Nothing in the file depends on time.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, logs: Logs) -> None:
        """Add detached tensors without waiting for the device; a pair is (sums, counts), as of bins."""
        for name, value in logs.items():
            pair = torch.stack(value if isinstance(value, tuple) else (value, torch.ones_like(value))).float()
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def flush(self, step: int, skipped_steps: int, write: bool) -> dict[str, Any]:
        """The means since the last call; appended to the file where ``write`` is true."""
        line: dict[str, Any] = {"step": step}
        for name, pair in self.sums.items():
            total, count = sum_over_processes(pair)
            mean = (total / count).tolist()
            line[name] = [None if v != v else v for v in mean] if isinstance(mean, list) else mean
        line["skipped_steps"] = skipped_steps
        self.sums = {}
        if write:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def state(self) -> list[dict[str, torch.Tensor]]:
        """The sums of each process; all must call it."""
        return of_all_processes({name: pair.cpu() for name, pair in self.sums.items()})

    def load(self, state: list[dict[str, torch.Tensor]], rank: int, world: int, device: torch.device) -> None:
        """Take over what :meth:`state` told, of any number of processes."""
        state = state if isinstance(state, list) else [state]  # checkpoints used to hold the first process's alone
        self.sums = {
            name: sum((part[name].to(device) for part in state[rank::world]), torch.zeros_like(pair, device=device))
            for name, pair in state[0].items()
        }

    def rewind(self, step: int) -> None:
        """Drop the lines behind ``step``, and one that a crash cut short: they will be written again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                break
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
