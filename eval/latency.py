"""Seconds of a picture: a text-to-image student in few steps against its teacher, part by part.

    python -m eval.latency --student runs/solids/sprint --teacher embedded:solids

Rounds go through all samplers in turn, so that whatever else the machine does hits them alike: compare the figures of
one call only.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from tqdm.auto import trange

from eval.machine import environment
from eval.text_to_image import Painter, painter
from models.errors import UserError, run_command
from models.seeds import Draws

PARTS = ("text encoder", "network", "decoder")


@dataclass(frozen=True)
class Options:
    """Measure text encoder, network and decoder apart."""

    student: Path
    """A run folder, an exported student, or embedded:NAME."""
    teacher: str | None = None
    """Folder of a teacher, or embedded:NAME."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Steps of the student."""
    teacher_steps: int = 20
    """Heun steps of the teacher."""
    teacher_guidance: float = 3.0
    """Classifier-free guidance of the teacher; at 1 it makes half of the work."""
    batch: int = 1
    """Pictures at a time."""
    repeats: int = 10
    """Rounds that are measured, after one that is not."""
    output: Path | None = None
    """JSON file for the figures."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        ordered = sorted(1e3 * s for s in seconds)
        at = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
        return cls(statistics.median(ordered), at(0.1), at(0.9))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def measure(painters: Sequence[Painter], prompts: Sequence[str], repeats: int) -> dict[str, dict[str, Spread]]:
    """Time of each of :data:`PARTS` and of the whole, by the painter's name, for one batch of ``prompts``."""
    taken: dict[str, dict[str, list[float]]] = {p.name: {part: [] for part in (*PARTS, "whole")} for p in painters}
    for round_ in trange(repeats + 1, desc="latency", unit="round"):
        for made in painters:
            device = made.spec.device
            marks = [now(device)]
            cond = made.embed(prompts)
            marks.append(now(device))
            latents = made.latents(cond, Draws(range(len(prompts)), device))
            marks.append(now(device))
            made.spec.decode(latents)
            marks.append(now(device))
            if round_ > 0:
                for part, (start, end) in zip(PARTS, pairwise(marks), strict=True):
                    taken[made.name][part].append(end - start)
                taken[made.name]["whole"].append(marks[-1] - marks[0])
    return {name: {part: Spread.of(seconds) for part, seconds in parts.items()} for name, parts in taken.items()}


def as_text(found: dict[str, dict[str, Spread]], calls: dict[str, int], teacher: str | None) -> str:
    """A table in milliseconds, with the teacher's time over each student's."""
    lines = [
        f"{'ms, median (10th to 90th percentile)':<38}{'calls':>6}" + "".join(f"{p:>24}" for p in (*PARTS, "whole"))
    ]
    for name, parts in found.items():
        cells = "".join(f"{f'{s.median:.1f} ({s.low:.1f} to {s.high:.1f})':>24}" for s in parts.values())
        lines.append(f"{name:<38}{calls[name]:>6}{cells}")
    if teacher is not None:
        for name, parts in found.items():
            if name != teacher:
                network, whole = (found[teacher][part].median / parts[part].median for part in ("network", "whole"))
                lines.append(f"{name}: {network:.1f} x as fast as {teacher} in the network, {whole:.1f} x as a whole")
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.batch < 1 or options.repeats < 1:
        raise UserError(f"--batch ({options.batch}) and --repeats ({options.repeats}) must be at least 1")
    painters = [painter(options.student, steps, device=options.device) for steps in options.steps]
    teacher = None
    if options.teacher is not None:
        made = painter(options.teacher, options.teacher_steps, options.teacher_guidance, options.device)
        painters, teacher = [made, *painters], made.name
    examples = painters[-1].spec.examples
    found = measure(painters, [examples[i % len(examples)] for i in range(options.batch)], options.repeats)
    calls = {p.name: p.nfe for p in painters}
    setting = environment(painters[-1].spec.device)
    print(f"batch {options.batch}, {setting['device']}, {setting['threads']} threads, torch {setting['torch']}")
    print(as_text(found, calls, teacher))
    if options.output is not None:
        scores = {name: {part: asdict(s) for part, s in parts.items()} for name, parts in found.items()}
        report = {"batch": options.batch, "repeats": options.repeats, "unit": "ms", "network_calls": calls}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report | {"latency": scores, "environment": setting}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
