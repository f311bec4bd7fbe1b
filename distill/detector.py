"""Train the detector that judges pictures of the solids world, on true renders, and say how often it is right.

python -m distill.detector        # some ten minutes on two CPU cores
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm, trange

from eval.features import quantize
from eval.geneval import judge, summarize
from eval.geneval.solids import OPTIONS, WEIGHTS, SolidsDetector, SolidsNetwork
from models.errors import run_command
from models.scene.captions import COLOURS, SHAPES, prompts
from models.scene.solids import Scene, render, sample_scene

HELD_OUT = 1 << 40
"""First seed of the scenes that the detector is judged on; training counts from 0."""


@dataclass(frozen=True)
class Options:
    """Train the solids detector and measure it on scenes that it has not seen."""

    output: Path = WEIGHTS
    """File for the weights."""
    steps: int = 3000
    """Steps of training."""
    batch: int = 32
    """Pictures of a step."""
    seed: int = 0
    """Seed of weights and augmentation."""
    test: int = 1200
    """True renders to measure it on."""


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


def train(options: Options) -> SolidsNetwork:
    """Cross-entropy of shape and colour per pixel, AdamW with a linear decay."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = SolidsNetwork().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3, fused=True)
    with trange(options.steps, desc="detector", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 100, 1.02 - step / options.steps)
            scenes = [sample_scene(step * options.batch + i) for i in range(options.batch)]
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
        scenes = [sample_scene(HELD_OUT + first + i, wanted) for i, wanted in enumerate(asked)]
        for wanted, (found, colour_of) in zip(asked, detector(quantize(render(scenes).images)), strict=True):
            correct, _ = judge(found, wanted, OPTIONS, colour_of)
            results.append({"tag": wanted["tag"], "prompt": wanted["prompt"], "correct": correct})
    return summarize(results)["tasks"]


def main(options: Options) -> None:
    network = train(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), options.output)
    tasks = measure(SolidsDetector(options.output), options.test)
    metadata = {"command": "python -m distill.detector", "steps": str(options.steps), "seed": str(options.seed)}
    metadata |= {task: f"{share:.4f}" for task, share in tasks.items()} | {"torch": torch.__version__}
    save_file(network.state_dict(), options.output, metadata)
    options.output.chmod(0o644)
    print(", ".join(f"{task}: {share:.1%}" for task, share in tasks.items()))


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
