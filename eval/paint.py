"""Pictures of many prompts into a folder, each from its own seed; a repeated command goes on where it stopped.

    python -m eval.paint runs/solids/sprint prompts.txt pictures --steps 1
    python -m eval.fid --images pictures --protocol coco30k --weights WEIGHTS --reference val2014
    python -m eval.clip pictures ViT-g-14:laion2b_s12b_b42k

The layout is GenEval's: ``NNNNN/metadata.jsonl`` and ``NNNNN/samples/NNNNN.png``. ``torchrun`` splits the prompts.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from eval.features import QUANTISATIONS
from eval.geneval import folder
from eval.machine import share
from eval.protocols import Quantisation
from eval.text_to_image import painter
from models.errors import UserError, run_command
from models.prompts import read_prompts
from models.scene.captions import Metadata


@dataclass(frozen=True)
class Options:
    """Paint every line of a file."""

    model: tyro.conf.Positional[str]
    """A run folder, an exported student or teacher, or embedded:NAME."""
    prompts: tyro.conf.Positional[Path]
    """Text file with a prompt in each line."""
    output: tyro.conf.Positional[Path]
    """Folder for the pictures."""
    steps: int = 1
    """Steps; a teacher wants 20."""
    guidance: float | None = None
    """Guidance scale; default: a student's own, none for a teacher."""
    each: int = 1
    """Pictures of each prompt."""
    seed: int = 0
    """Picture k of prompt p has the noise of seed + each p + k."""
    quantise: Quantisation = "edm"
    """How values become bytes: the protocol coco30k truncates."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def main(options: Options) -> None:
    """Paint what is missing."""
    lines = read_prompts(options.prompts, "prompts")
    if options.each < 1:
        raise UserError(f"--each: {options.each} must be at least 1")
    asked: list[Metadata] = [{"tag": "caption", "include": [], "prompt": line} for line in lines]
    made = painter(options.model, options.steps, options.guidance, options.device)
    made = replace(made, to_uint8=QUANTISATIONS[options.quantise].function)
    folder.paint(made, asked, options.output, options.each, options.seed, *share(), identity=made.identity)
    print(f"{made.name}: {len(lines) * options.each} pictures in {options.output}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
