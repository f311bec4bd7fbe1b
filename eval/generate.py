"""Pictures for scoring: picture i has its own noise and class, whatever the batch size or the number of processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval.features import quantize
from models.condition import Condition
from models.errors import UserError
from models.seeds import Draws
from models.student import Denoises, OneStepStudent, heun
from models.teachers.base import Spec

Sample = Callable[[Tensor, Condition], Tensor]
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A way to make pictures: ``function(z, cond, noise)`` with unit noise z (B, C, H, W) to x0 of the same shape.

    ``noise()`` gives fresh noise like z, for samplers that need more.
    ``nfe`` is the number of network calls for a picture.
    """

    name: str
    nfe: int
    function: Callable[[Tensor, Condition, Noise], Tensor]

    @classmethod
    def student(cls, student: OneStepStudent, times: Sequence[float] = ()) -> "Sampler":
        """The student in one step, or in one more for each of ``times``."""
        steps = 1 + len(times)
        name = f"student, {steps} step{'s' if steps > 1 else ''}"
        return cls(name, steps, lambda z, cond, noise: student.generate(z, cond, times, noise))

    @classmethod
    def teacher(cls, denoiser: Denoises, steps: int) -> "Sampler":
        """The teacher with Heun's method: ``2 steps - 1`` network calls."""
        name = f"teacher, {steps} Heun steps" if steps > 1 else "teacher, 1 step"
        return cls(name, 2 * steps - 1, lambda z, cond, _noise: heun(denoiser, z, cond, steps))


def painted(spec: Spec, quantise: Callable[[Tensor], Tensor] = quantize) -> Callable[[Tensor], Tensor]:
    """x0 (B, *spec.shape), pixels or latents, to uint8 pictures (B, *spec.picture)."""
    return lambda x0: quantise(spec.decode(x0))


class Generated:
    """Batches of uint8 pictures (B, C, H, W) on the CPU; may be iterated again, with the same result.

    Iterating raises UserError if the sampler gives NaN or infinity, which quantisation would hide. ``seconds`` is the
    time that making pictures has taken.
    """

    seconds = 0.0

    def __init__(
        self,
        sample: Sampler | Sample,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        num_classes: int,
        batch: int,
        seed: int,
        device: torch.device | str,
        description: str | None,
        to_uint8: Callable[[Tensor], Tensor] = quantize,
    ):
        self.to_uint8 = to_uint8
        self.sample, self.indices, self.shape, self.num_classes = sample, indices, shape, num_classes
        self.batch, self.seed, self.device, self.description = batch, seed, device, description

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.indices) // self.batch)

    @torch.no_grad()
    def _make(self, indices: Sequence[int]) -> Tensor:
        draws = Draws([self.seed + i for i in indices], self.device)
        cond = Condition(class_ids=torch.tensor([i % self.num_classes for i in indices], device=self.device))
        z, noise = draws.normal(*self.shape), lambda: draws.normal(*self.shape)
        x0 = self.sample.function(z, cond, noise) if isinstance(self.sample, Sampler) else self.sample(z, cond)
        if not bool(x0.isfinite().all()):
            name = f"{self.sample.name}: " if isinstance(self.sample, Sampler) else ""
            raise UserError(f"{name}some pictures are not finite: the weights are damaged, or the training diverged")
        return self.to_uint8(x0).cpu()

    def __iter__(self) -> Iterator[Tensor]:
        starts = range(0, len(self.indices), self.batch)
        for start in tqdm(starts, desc=self.description, unit="batch", disable=self.description is None):
            started = time.perf_counter()
            made = self._make(self.indices[start : start + self.batch])
            self.seconds += time.perf_counter() - started
            yield made


def images(
    sample: Sampler | Sample,
    n: int,
    shape: tuple[int, int, int],
    num_classes: int,
    batch: int,
    seed: int,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    description: str | None = None,
    to_uint8: Callable[[Tensor], Tensor] = quantize,
) -> Generated:
    """n pictures (C, H, W) = ``shape``: picture i has noise from seed ``seed + i`` and class ``i % num_classes``.

    Process ``rank`` of ``world`` makes the pictures rank, rank + world, ... ``description`` turns a progress bar on.
    Raises ValueError for sizes that are not positive.
    """
    if min(n, batch, num_classes, world) < 1 or not 0 <= rank < world:
        raise ValueError(f"need positive sizes: n {n}, batch {batch}, classes {num_classes}, rank {rank} of {world}")
    return Generated(sample, range(rank, n, world), shape, num_classes, batch, seed, device, description, to_uint8)
