"""Endless streams of batches, with a position that can be resumed."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from distill.bad_samples import BadSamples
from distill.data.batch import Batch, Pictures
from distill.data.hub import Columns, row_name
from distill.data.sample import Sample, collate
from distill.epochs import Epochs
from models.errors import BadSample, UserError
from models.seeds import mix


class ShuffledStream:
    """Epoch after epoch of a shuffled set. The order is a function of the seed, the position one number.

    ``size`` is this process's batch; processes take consecutive slices of one global batch, so the pictures of a step
    do not depend on how many processes share it. The next batch is prepared while the current one is used.
    With ``groups`` (N,), numbers of the files that pictures are in, those of a file come one after another, which is
    how files that do not fit into memory are read: files in a random order, and what is in them too.
    """

    def __init__(
        self, pictures: Pictures, size: int, seed: int, rank: int = 0, world: int = 1, groups: Tensor | None = None
    ):
        self.pictures, self.size, self.seed, self.rank, self.world = pictures, size, seed, rank, world
        self.groups = groups
        self.position = 0
        self._order: tuple[int, Tensor] | None = None
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._pool = ThreadPoolExecutor(1)

    def _index(self, sample: int) -> int:
        epoch, offset = divmod(sample, len(self.pictures))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(len(self.pictures), generator=generator)
            if self.groups is not None:
                places = torch.randperm(int(self.groups.max()) + 1, generator=generator)
                order = order[places[self.groups[order]].argsort(stable=True)]
            self._order = (epoch, order)
        return int(self._order[1][offset])

    def _load(self, position: int) -> Batch:
        start = position + self.rank * self.size
        return self.pictures.get([self._index(start + i) for i in range(self.size)])

    def next(self) -> Batch:
        if self._ahead is not None and self._ahead[0] == self.position:
            batch = self._ahead[1].result()
        else:
            batch = self._pool.submit(self._load, self.position).result()
        self.position += self.size * self.world
        self._ahead = (self.position, self._pool.submit(self._load, self.position))
        return batch

    def resize(self, size: int) -> None:
        self.size, self._ahead = size, None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "count": len(self.pictures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whatever the number of processes; a line where the number of pictures is another, hence their order."""
        count, before = len(self.pictures), state.get("count")
        self.position = state["position"]
        if before not in (None, count):
            self.position = -(-self.position // before) * count  # the epoch after that one
            if self.rank == 0:
                print(f"data: {count} pictures, not {before} as before: a new epoch is begun", file=sys.stderr)

    def load_states(self, states: list[dict[str, Any]]) -> None:
        self.load_state_dict(states[0])


class StreamedPictures:
    """An iterable Hugging Face data set (streaming, webdataset shards), split over processes.

    Each epoch takes the shards in another order and reads several by turns; pictures within a shard keep theirs, since
    a buffer that shuffles them could not be resumed exactly. Positions are those of :class:`~distill.epochs.Epochs`.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        shape: tuple[int, int, int],
        columns: Columns,
        rank: int = 0,
        world: int = 1,
        skip: bool = False,
    ):
        self.size, self.shape, self.columns = size, shape, columns
        self.rows, self.bad = Epochs(dataset, rank, world), BadSamples(skip)
        self._read, self._good = 0, 0
        """Rows since the stream was opened, for messages; the epoch of the last one that could be used."""

    def next(self) -> Batch:
        samples: list[Sample] = []
        while len(samples) < self.size:
            row = self.rows.next()
            if self.rows.epoch > self._good + 1:
                raise UserError("data: a whole epoch of the stream has no picture, or none that can be used")
            self._read += 1
            try:
                samples.append(self.columns.sample(row, self.shape, row_name(row, self._read - 1)))
                self._good = self.rows.epoch
            except BadSample as error:
                self.bad.meet(error)
        return collate(samples, self.columns.caption is not None)

    def resize(self, size: int) -> None:
        self.size = size

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)
        self._good = self.rows.epoch

    def load_states(self, states: list[dict[str, Any]]) -> None:
        self.rows.load_states(states)
        self._good = self.rows.epoch
