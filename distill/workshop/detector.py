"""Train the detector that judges pictures of the solids world, on true renders, and say how often it is right.

python -m distill.workshop.detector                   # 17 minutes on one CPU core
python -m distill.workshop.detector --second          # the second judge: another network, seed and scenes
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm, trange

from distill.workshop.references import floors
from eval.features import REFERENCES, extract, quantize
from eval.frechet import Statistics
from eval.geneval import judge, summarize
from eval.geneval.prompts import HELD_OUT, true_renders
from eval.geneval.solids import (
    OPTIONS,
    SECOND,
    WEIGHTS,
    SecondNetwork,
    SolidsDetector,
    SolidsFeatures,
    SolidsNetwork,
    colour_of,
)
from eval.reference import Reference
from models.errors import run_command
from models.scene.captions import COLOURS, SHAPES, TASKS, prompts
from models.scene.solids import Scene, render, sample_scene

FLOOR_SIZES = (300, 600, 1200, 3000)
KEPT = 2000


@dataclass(frozen=True)
class Options:
    """Train the solids detector and measure it on scenes that it has not seen."""

    output: Path = REFERENCES
    """Folder for solids_detector.safetensors and fd_solids.npz."""
    second: bool = False
    """The second judge, solids_detector_second.safetensors, which has no reference."""
    retrain: bool = False
    """Train even if the weights are there. New weights make a new metric."""
    steps: int = 2600
    """Steps of training."""
    batch: int = 32
    """Pictures of a step."""
    seed: int = 0
    """Seed of weights and augmentation."""
    test: int = 1200
    """True renders to measure it on."""
    reference: int = 20000
    """True renders of the reference that distances are measured to."""


def targets(scenes: list[Scene], index: Tensor) -> tuple[Tensor, Tensor]:
    """Shape (0 background) and colour (-1 background) of every pixel, each (B, H, W), of rendered solid indices."""
    shapes, colours = torch.zeros_like(index), torch.full_like(index, -1)
    for row, scene in enumerate(scenes):
        for number, solid in enumerate(scene.solids):
            mask = index[row] == number
            shapes[row][mask] = 1 + SHAPES.index(solid.shape)
            colours[row][mask] = COLOURS.index(solid.colour)
    return shapes, colours


def blemish(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Softened, noised and shifted in brightness, each at random: a student's pictures are not true renders."""
    draw = lambda: torch.rand(len(pictures), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), "replicate"), 3, 1)
    pictures = torch.lerp(pictures, soft, draw() * (draw() < 0.5))
    noise = torch.randn(pictures.shape, generator=generator)
    pictures = pictures + 0.12 * draw() * (draw() < 0.5) * noise
    return (pictures * (0.92 + 0.16 * draw()) + 0.12 * (draw() - 0.5)).clamp(-1, 1)


OTHER_SCENES = 1 << 36
"""First seed of the scenes that the second judge learns from."""


def train(options: Options) -> SolidsNetwork | SecondNetwork:
    """Cross-entropy of shape and colour per pixel, AdamW with a linear decay."""
    seed = options.seed + options.second
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = (SecondNetwork() if options.second else SolidsNetwork()).train()
    first = OTHER_SCENES if options.second else 0
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3, fused=True)
    with trange(options.steps, desc="detector", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 100, 1.02 - step / options.steps)
            scenes = [sample_scene(first + step * options.batch + i) for i in range(options.batch)]
            made = render(scenes)
            shapes, colours = targets(scenes, made.index)
            logits = network(blemish(made.images, generator))
            shape_loss = F.cross_entropy(logits[:, : 1 + len(SHAPES)], shapes)
            loss = shape_loss + F.cross_entropy(logits[:, 1 + len(SHAPES) :], colours, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    return network.eval()


def measure(detector: SolidsDetector, count: int, batch: int = 100) -> dict[str, float]:
    """Share of true renders of held-out scenes that are judged right, by task."""
    results = []
    metadata = prompts(HELD_OUT, count)
    for first in tqdm(range(0, count, batch), desc="true renders", unit="batch"):
        asked = metadata[first : first + batch]
        for wanted, found in zip(asked, detector(true_renders(asked, HELD_OUT + first)), strict=True):
            correct, _ = judge(found, wanted, OPTIONS, colour_of)
            results.append({"tag": wanted["tag"], "prompt": wanted["prompt"], "correct": correct})
    return summarize(results)["tasks"]


def make_reference(extractor: SolidsFeatures, count: int, batch: int = 250) -> Reference:
    """Statistics of true renders of ``count`` held-out scenes, and the floor of as many others as are scored."""
    made = lambda first, n: extract(
        extractor,
        (
            quantize(render([sample_scene(HELD_OUT + first + i) for i in range(start, min(start + batch, n))]).images)
            for start in trange(0, n, batch, desc="reference", unit="batch")
        ),
    )
    features = made(1 << 20, count)
    others = made(1 << 24, max(FLOOR_SIZES))
    statistics = Statistics.of(features)
    statistics.provenance = {
        "extractor": extractor.name,
        "weights_sha256": extractor.sha256,
        "resize": extractor.resize,
        "data": f"true renders of {count:,} scenes of the solids world with captions of all six tasks",
        "covariance_divisor": "n - 1",
        "floors": "Fréchet distance of n other true renders from the reference, mean over at most 8 disjoint subsets",
        "features": f"float16 features of {KEPT} of them, for the kernel distance",
        "torch": torch.__version__,
        "command": "python -m distill.workshop.detector",
    }
    return Reference(extractor.name, statistics, features[:KEPT], floors(others, statistics, FLOOR_SIZES))


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    weights = options.output / (SECOND if options.second else WEIGHTS).name
    if options.retrain or not weights.is_file():
        network = train(options)
        save_file(network.state_dict(), weights)
        tasks = measure(SolidsDetector(weights, second=options.second), options.test)
        metadata = {
            "command": f"python -m distill.workshop.detector{' --second' if options.second else ''}",
            "steps": str(options.steps),
            "seed": str(options.seed),
        }
        metadata |= {task: f"{share:.4f}" for task, share in tasks.items()} | {"torch": torch.__version__}
        save_file(network.state_dict(), weights, metadata)
        weights.chmod(0o644)
    with safe_open(weights, "pt") as stored:
        print("true renders judged right:", {task: stored.metadata()[task] for task in TASKS})
    if options.second:
        return
    reference = make_reference(SolidsFeatures(weights), options.reference)
    reference.save(options.output / f"{reference.name}.npz")
    print("floor by number of pictures:", {n: round(value, 4) for n, value in reference.floors.items()})


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
