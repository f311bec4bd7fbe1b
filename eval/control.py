"""Does a sketch student put its solids where they were drawn?

    python -m eval.control --student runs/solids/control

Edges of true renders that nothing was trained on are the drawings; the silhouettes behind them are known. Beside the
student stand the detector on the true renders (the ceiling) and the same student with an empty canvas (chance).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm.auto import trange

from eval.features import quantize
from eval.geneval.prompts import HELD_OUT
from eval.geneval.solids import SIDE, SolidsDetector
from eval.latency import Spread, now
from eval.machine import environment, home_of
from eval.text_to_image import Painter, painter
from models.controlnet import NOTHING, edges
from models.errors import UserError, run_command
from models.scene.captions import prompts
from models.scene.solids import render, sample_scene
from models.seeds import Draws


@dataclass(frozen=True)
class Options:
    """Measure silhouettes and the time of a frame."""

    student: Path
    """A run folder, an exported student with controlnet/, or embedded:NAME."""
    steps: int = 1
    """Steps of the student."""
    num_images: int = 240
    """Drawings, the six tasks in turn."""
    seed: int = 2026
    """Seed of the prompts."""
    repeats: int = 30
    """Frames that are timed."""
    batch: int = 120
    """Pictures at a time."""
    output: Path | None = None
    """Folder for control.json and a picture; default: control/ in the folder of --student,
    or in report/NAME of an embedded one."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def overlap(detector: SolidsDetector, pictures: Tensor, truth: Tensor) -> list[float]:
    """IoU of what is detected in uint8 pictures (B, 3, H, W) with the silhouettes (B, H, W); 0 where nothing is."""
    shares = []
    for solids, mask in zip(detector(pictures), truth, strict=True):
        found = torch.zeros_like(mask)
        for solid in solids:
            found |= torch.from_numpy(solid.mask)
        shares.append(float((found & mask).sum() / (found | mask).sum()))
    return shares


@torch.inference_mode()
def frame_time(student: Painter, prompt: str, picture: Tensor, repeats: int) -> Spread:
    """From a picture (1, 3, H, W) through its edges to a new one; the prompt's embedding is kept between frames."""
    device = student.spec.device
    cond, taken = student.embed([prompt]), []
    for _ in range(repeats + 3):
        start = now(device)
        cond = student.redrawn(cond, edges(picture.to(device)))
        quantize(student.spec.decode(student.latents(cond, Draws([0], device)))).cpu()
        taken.append(now(device) - start)
    return Spread.of(taken[3:])


def measure(student: Painter, count: int, seed: int, batch: int) -> tuple[dict[str, list[float]], Tensor]:
    """IoU of each drawing by who made the picture, and rows of drawings with their pictures."""
    detector = SolidsDetector(device=student.spec.device)
    asked = prompts(seed, count)
    shares: dict[str, list[float]] = {"true renders": [], student.name: [], "empty canvas": []}
    shown: list[Tensor] = []
    for start in trange(0, count, batch, desc="drawings", unit="batch"):
        part = asked[start : start + batch]
        scenes = [sample_scene(HELD_OUT + (1 << 30) + start + i, wanted) for i, wanted in enumerate(part)]
        made, truth = render(scenes, student.spec.picture[1]), render(scenes, SIDE).index >= 0
        lines = edges(made.images)
        texts, seeds = [m["prompt"] for m in part], range(start, start + len(part))
        real, drawn = quantize(made.images), student(texts, seeds, lines)
        blank = student(texts, seeds, torch.full_like(lines, NOTHING))
        for name, pictures in zip(shares, (real, drawn, blank), strict=True):
            shares[name] += overlap(detector, pictures, truth)
        if not shown:
            canvas = quantize(lines.expand(-1, 3, -1, -1))
            shown = [torch.cat(list(row[:12]), 2) for row in (real, canvas, drawn, blank)]
    return shares, torch.cat(shown, 1)


def as_text(shares: Mapping[str, Sequence[float]], frame: Spread) -> str:
    lines = [f"{'IoU with the drawn silhouettes':<32}{'mean':>8}{'10 % have less than':>22}"]
    for name, values in shares.items():
        ordered = torch.tensor(sorted(values))
        lines.append(f"{name:<32}{float(ordered.mean()):>8.3f}{float(ordered.quantile(0.1)):>22.3f}")
    lines.append(f"a frame: {frame.median:.1f} ms ({frame.low:.1f} to {frame.high:.1f})")
    return "\n".join(lines)


def main(options: Options) -> None:
    if min(options.num_images, options.repeats, options.batch) < 1:
        raise UserError("--num-images, --repeats and --batch must be at least 1")
    student = painter(options.student, options.steps, device=options.device)
    if student.spec.control is None:
        raise UserError(f"--student: {options.student} has no controlnet/, so it follows no lines")
    shares, rows = measure(student, options.num_images, options.seed, options.batch)
    picture = render([sample_scene(HELD_OUT)], student.spec.picture[1]).images
    frame = frame_time(student, student.spec.examples[0], picture, options.repeats)
    folder = options.output or home_of(options.student) / "control"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.permute(1, 2, 0).numpy()).save(folder / "drawings.png")
    report = {
        "iou": {name: sum(values) / len(values) for name, values in shares.items()},
        "drawings": options.num_images,
        "frame_ms": asdict(frame),
        "environment": environment(student.spec.device),
    }
    (folder / "control.json").write_text(json.dumps(report, indent=2) + "\n")
    print(as_text(shares, frame))
    print(f"drawings, pictures with them and without: {folder / 'drawings.png'}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
