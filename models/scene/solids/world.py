"""The world as a source of training batches, and a sheet of its pictures."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.errors import UserError
from models.scene.captions import PAIRS
from models.scene.solids.rendering import render
from models.scene.solids.scenes import Scene, sample_scene, sample_turntable
from models.seeds import mix


@dataclass(frozen=True)
class Solids:
    """The world as a source of training batches, ``size`` pixels a side, without the captions in ``exclude``.

    In a share ``turntable`` of the pictures one solid is seen from all sides. In a share ``pairs`` of the others there
    are two solids, named apart (:data:`~models.scene.captions.PAIRS`); the rest are of any task. They are rendered on
    ``device`` and returned on the CPU.
    """

    size: int = 64
    exclude: frozenset[str] = frozenset()
    turntable: float = 0.0
    pairs: float = 0.0
    device: str = "cpu"

    def _scene(self, seed: int) -> Scene:
        if mix(seed, 2) < self.turntable * 2**63:
            return sample_turntable(seed)
        return sample_scene(seed, exclude=self.exclude, tasks=PAIRS if mix(seed, 4) < self.pairs * 2**63 else None)

    def batch(self, seeds: Sequence[int]) -> tuple[Tensor, list[Scene]]:
        """Pictures (B, 3, H, W) in [-1, 1] and scenes of the seeds."""
        scenes = [self._scene(seed) for seed in seeds]
        return render(scenes, self.size, device=self.device).images.cpu(), scenes

    def captioned(self, seeds: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Pictures as of :meth:`batch`, and their captions."""
        images, scenes = self.batch(seeds)
        return images, [scene.prompt for scene in scenes]


def contact_sheet(seed: int, count: int, path: Path, size: int = 64, zoom: int = 3) -> None:
    """Write pictures of the seeds ``seed``, ``seed + 1``, ..., enlarged without smoothing, with their captions.

    Raises UserError for numbers out of range or another file type than PNG.
    """
    from PIL import Image, ImageDraw, ImageFont

    if seed < 0 or count < 1 or size < 8 or path.suffix != ".png":
        raise UserError(f"seed {seed}, count {count}, size {size}, {path}: at least 0, 1 and 8, and a name in .png")
    images, scenes = Solids(size).batch(range(seed, seed + count))
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns, side, head = min(count, 6), size * zoom, 30
    sheet = Image.new("RGB", (columns * (side + 6), -(-count // columns) * (side + head)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, scene in enumerate(scenes):
        left, top = i % columns * (side + 6), i // columns * (side + head)
        lines = textwrap.fill(scene.prompt.removeprefix("a photo of "), side // 6)
        canvas.text((left + side / 2, top + head / 2), lines, "black", font, anchor="mm", align="center", spacing=1)
        sheet.paste(Image.fromarray(pixels[i]).resize((side, side), Image.Resampling.NEAREST), (left, top + head))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
