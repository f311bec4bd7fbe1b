"""Pictures of the solids world, rendered as they are needed."""

import atexit
import itertools
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor
from torch.multiprocessing import get_context

from distill.data.batch import Batch
from models.condition import Condition
from models.errors import UserError
from models.scene import captions
from models.scene.solids import Solids


class SolidsPictures:
    """The solids world: scene i depends on i alone. Captions kept for evaluation are in no scene."""

    def __init__(
        self,
        count: int,
        size: int = 64,
        turntable: float = 0.0,
        pairs: float = 0.0,
        device: str = "cpu",
        workers: int = 0,
        keep: bool = False,
    ):
        self.count, self.shape, self.workers = count, (3, size, size), workers
        self.class_names: list[str] = []
        self.world = Solids(size, captions.held_out(), turntable, pairs, device)
        self._kept: dict[int, tuple[Tensor, str]] | None = {} if keep else None
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
            atexit.register(self._pool.shutdown, cancel_futures=True)

    @property
    def labels(self) -> Tensor:
        raise UserError("classes: the solids world has captions, not classes")

    def __len__(self) -> int:
        return self.count

    def get(self, indices: list[int]) -> Batch:
        if self._kept is None:
            images, prompts = self._rendered(indices)
            return Batch(images, Condition(), tuple(prompts))
        if new := [index for index in indices if index not in self._kept]:
            images, prompts = self._rendered(new)
            pixels = ((images + 1) * 127.5).round().byte()
            self._kept |= zip(new, zip(pixels, prompts, strict=True), strict=True)
        pixels, prompts = zip(*(self._kept[index] for index in indices), strict=True)
        return Batch(torch.stack(pixels).float() / 127.5 - 1, Condition(), prompts)

    def _rendered(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        if self._pool is None:
            return self.world.captioned(indices)
        share = -(-len(indices) // self.workers)
        parts = [indices[i : i + share] for i in range(0, len(indices), share)]
        images, prompts = zip(*self._pool.map(self.world.captioned, parts), strict=True)
        return torch.cat(images), list(itertools.chain(*prompts))
