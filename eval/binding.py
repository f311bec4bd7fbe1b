"""Does a text-to-image teacher heed which word belongs to which? Its loss under false captions says so.

    python -m eval.binding embedded:solids

A network that reads a caption as a bag of words denoises 'a red cube and a blue sphere' as well when it is told of a
blue cube and a red sphere. The rise of its denoising loss under such a caption is measured by noise level, on scenes
that nothing was trained on: exchanged colours, the opposite relation, another count. 0 is blind; it needs no samples.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from eval.geneval.prompts import HELD_OUT
from eval.machine import place_of
from models import teachers
from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError, run_command
from models.scene.captions import NUMBERS, OPPOSITE, RELATIONS, SHAPES, Metadata, Thing, describe, draw, pick, things_of
from models.scene.solids import render, sample_scene
from models.seeds import Draws
from models.teachers.base import TextSpec

RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Noise levels sigma / alpha at which losses are compared."""
FIRST = HELD_OUT + (1 << 33)
"""Seed of the first scene."""


def exchanged_colours(rng: random.Random) -> tuple[Metadata, Metadata]:
    """Two solids of two colours, and the same with the colours exchanged."""
    true = draw(rng, "color_attr")
    (first, a), (second, b) = things_of(true)
    return true, describe([Thing(first, b), Thing(second, a)])


def opposite_relation(rng: random.Random) -> tuple[Metadata, Metadata]:
    """Two solids in a relation, and the same in the opposite one."""
    true = draw(rng, "position")
    second, first = things_of(true)  # the reference comes first in the metadata, last in the words
    relation = true["include"][1].get("position", [RELATIONS[0]])[0]
    return true, describe([first, second], OPPOSITE[relation])


def other_count(rng: random.Random) -> tuple[Metadata, Metadata]:
    """Two to four of one shape, and another number of them."""
    shape, count = pick(rng, SHAPES), pick(rng, list(NUMBERS))
    other = pick(rng, [n for n in NUMBERS if n != count])
    return describe([Thing(shape)] * count), describe([Thing(shape)] * other)


KINDS: dict[str, Callable[[random.Random], tuple[Metadata, Metadata]]] = {
    "colours": exchanged_colours,
    "relation": opposite_relation,
    "count": other_count,
}


@dataclass(frozen=True)
class Pairs:
    """x0 (N, C, H, W) of scenes with their captions' conditions and false ones; all made by one teacher's encoders."""

    x0: Tensor
    true: Condition
    false: Condition


class Binding:
    """Scenes with true and false captions, ``count`` of each of :data:`KINDS`, as the teacher of ``spec`` sees them.

    They are made at the first call, since that takes a second or two.
    """

    def __init__(self, spec: TextSpec, count: int = 48, batch: int = 48):
        self.spec, self.count, self.batch = spec, count, batch
        self._pairs: dict[str, Pairs] = {}

    @torch.no_grad()
    def pairs(self) -> dict[str, Pairs]:
        if not self._pairs:
            place = self.spec.device
            for number, (name, make) in enumerate(KINDS.items()):
                rng = random.Random(number)
                asked = [make(rng) for _ in range(self.count)]
                scenes = [sample_scene(FIRST + number * self.count + i, true) for i, (true, _) in enumerate(asked)]
                pictures = render(scenes, self.spec.picture[1]).images.to(place)
                x0 = torch.cat([self.spec.encode(part) for part in pictures.split(self.batch)])
                texts = [self.spec.text([m["prompt"] for m in side]) for side in zip(*asked, strict=True)]
                self._pairs[name] = Pairs(x0, *texts)
        return self._pairs

    @torch.no_grad()
    def rises(self, denoiser: Denoiser, ratios: Sequence[float] = RATIOS) -> dict[str, Tensor]:
        """By kind the relative rise of the loss under the false captions at each of ``ratios`` (R,); 0 is blind."""
        return {
            name: torch.stack([self._rise(denoiser, pairs, ratio) for ratio in ratios])
            for name, pairs in self.pairs().items()
        }

    def _rise(self, denoiser: Denoiser, pairs: Pairs, ratio: float) -> Tensor:
        process, x0 = denoiser.process, pairs.x0
        noise = Draws(list(range(len(x0))), x0.device).normal(*x0.shape[1:])
        time = process.time_from_ratio(torch.tensor(ratio, dtype=torch.float64)).clamp(process.t_min, process.t_max)
        t = time.to(x0.device, x0.dtype).expand(len(x0))
        x_t = process.add_noise(x0, noise, t)
        errors = x0.new_zeros(2)
        for rows in self._parts(x0):
            for side, cond in enumerate((pairs.true, pairs.false)):
                errors[side] += (denoiser.denoise(x_t[rows], t[rows], cond[rows]) - x0[rows]).square().sum()
        return errors[1] / errors[0] - 1

    def _parts(self, x0: Tensor) -> Iterator[slice]:
        return (slice(first, first + self.batch) for first in range(0, len(x0), self.batch))


@dataclass(frozen=True)
class Options:
    """By how much a teacher's loss rises under captions whose words are exchanged, by noise level."""

    teacher: tyro.conf.Positional[str]
    """Folder of a teacher, a run folder, or embedded:NAME."""
    count: int = 200
    """Scenes of each kind."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def main(options: Options) -> None:
    if options.count < 1:
        raise UserError("--count must be at least 1")
    denoiser, spec = teachers.load(options.teacher)
    if not isinstance(spec, TextSpec) or spec.student:
        raise UserError(f"{options.teacher} is no teacher that is asked for prompts")
    place = place_of(options.device)
    rises = Binding(spec.to(place), options.count).rises(denoiser.to(place))
    print(f"{'loss rise at sigma / alpha':<28}" + "".join(f"{ratio:>9g}" for ratio in RATIOS))
    for name, values in rises.items():
        print(f"{name:<28}" + "".join(f"{100 * float(v):>8.1f}%" for v in values))


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
