"""A sheet of pictures with their captions: python -m models.scene.solids OUT.png --seed 0 --count 16"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from models.errors import run_command
from models.scene.solids.world import contact_sheet


@dataclass
class Arguments:
    """Write a sheet of pictures with their captions."""

    output: tyro.conf.Positional[Path]
    """Picture file to write (.png)."""
    seed: int = 0
    """Seed of the first scene."""
    count: int = 16
    """Number of scenes."""
    size: int = 64
    """Pixels a side."""


if __name__ == "__main__":
    arguments = tyro.cli(Arguments)
    run_command(lambda: contact_sheet(arguments.seed, arguments.count, arguments.output, arguments.size))
