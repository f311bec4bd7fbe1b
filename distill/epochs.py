"""Epochs of an iterable data set, divided over processes, with a position that any number of them takes over."""

import copy
import math
import sys
import zlib
from tarfile import TarError
from typing import Any, Protocol

from distill.tars import whole_tars
from models.errors import UserError

Row = dict[str, Any]


class Source(Protocol):
    """Rows that are read once; ``state`` tells, in plain containers, which are left."""

    def next(self) -> Row | None: ...

    def state(self) -> dict[str, Any]: ...


class Share:
    """What process ``rank`` of ``world`` reads in one epoch; ``state``: behind what it has read already."""

    def __init__(self, dataset: Any, rank: int, world: int, epoch: int, state: dict[str, Any] | None = None):
        from datasets.distributed import split_dataset_by_node

        self.place = {"rank": rank, "world": world, "epoch": epoch}
        self._dataset: Any = split_dataset_by_node(dataset, rank, world)
        self._dataset.set_epoch(epoch)
        self._state, self._rows = state, None
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))

    def next(self) -> Row | None:
        """UserError where a file is missing, cut short or damaged."""
        try:
            if self._rows is None:
                self._rows = iter(self._dataset)
            with whole_tars():
                return next(self._rows, None)
        except (OSError, EOFError, LookupError, ValueError, TarError, zlib.error) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"data: the stream cannot be read on: {reason}") from error

    def state(self) -> dict[str, Any]:
        return self.place | {"dataset": self._state if self._rows is None else self._dataset.state_dict()}


class Chain:
    """One source after another."""

    def __init__(self, sources: list[Source]):
        self.sources = sources

    def next(self) -> Row | None:
        while self.sources:
            if (row := self.sources[0].next()) is not None:
                return row
            self.sources.pop(0)
        return None

    def state(self) -> dict[str, Any]:
        return {"chain": [source.state() for source in self.sources]}


class ByTurns:
    """A row of each source by turns, and of these rows one in ``each``: behind ``skip`` of them, the next one."""

    def __init__(self, sources: list[Source], each: int, skip: int, turn: int = 0):
        self.sources, self.each, self.skip, self.turn = sources, each, skip, turn

    def next(self) -> Row | None:
        while self.sources:
            self.turn %= len(self.sources)
            row = self.sources[self.turn].next()
            if row is None:
                self.sources.pop(self.turn)
                continue
            self.turn += 1
            if self.skip == 0:
                self.skip = self.each - 1
                return row
            self.skip -= 1
        return None

    def state(self) -> dict[str, Any]:
        parts = [source.state() for source in self.sources]
        return {"by_turns": parts, "each": self.each, "skip": self.skip, "turn": self.turn}


def _source(dataset: Any, state: dict[str, Any]) -> Source:
    """The source that told ``state``."""
    match state:
        case {"by_turns": parts, "each": each, "skip": skip, "turn": turn}:
            return ByTurns([_source(dataset, part) for part in parts], each, skip, turn)
        case {"chain": parts}:
            return Chain([_source(dataset, part) for part in parts])
        case _:
            return Share(dataset, state["rank"], state["world"], state["epoch"], state["dataset"])


class Epochs:
    """Rows without end: epoch after epoch of ``dataset``, of which process ``rank`` of ``world`` reads its share.

    When a run goes on with another number of processes, those that there are now divide what the former ones had left
    of the epoch, so that each row is read once; the next epoch is divided as if there had never been others.
    """

    def __init__(self, dataset: Any, rank: int = 0, world: int = 1):
        self.dataset, self.rank, self.world, self.epoch = dataset, rank, world, 0
        self._left: Source = Share(dataset, rank, world, 0)

    def next(self) -> Row:
        """The next row; UserError if there is none in a whole epoch."""
        for _ in range(3):  # the rest of one epoch, and one more, whose rest may be another's
            if (row := self._left.next()) is not None:
                return row
            self.epoch += 1
            self._left = Share(self.dataset, self.rank, self.world, self.epoch)
        raise UserError("data: the streamed data set gives no picture to this process: fewer shards than processes?")

    def state_dict(self) -> dict[str, Any]:
        place = {"rank": self.rank, "world": self.world, "shards": self.dataset.num_shards}
        return place | {"epoch": self.epoch, "left": self._left.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a process of this place was, or the only one; UserError if the others' positions are needed."""
        world = state.get("world", self.world)
        if world not in (1, self.world):
            raise UserError(
                f"data: a position in the stream of one of {world} processes does not tell {self.world} where to go "
                "on: the positions of all are needed"
            )
        if world == self.world:
            self._go_on(state)
        else:
            self.load_states([state])

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Go on where the processes of a run were, which told ``states``, one each in order; any number of them."""
        count = len(states)
        # Checkpoints used to hold epoch and position alone.
        states = [
            state if "left" in state else state | {"left": {"rank": rank, "world": count, **state}}
            for rank, state in enumerate(states)
        ]
        if count == self.world:
            self._go_on(states[self.rank])
            return
        last, rests = max(state["epoch"] for state in states), []
        for rank, state in enumerate(states):
            later = range(state["epoch"] + 1, last + 1)  # some process may be an epoch behind
            unread = [{"rank": rank, "world": count, "epoch": epoch, "dataset": None} for epoch in later]
            rests.append({"chain": [state["left"], *unread]})
        groups = math.gcd(count, self.world)
        mine = rests[self.rank % groups :: groups]
        left = {"by_turns": mine, "each": self.world // groups, "skip": self.rank // groups, "turn": 0}
        self._go_on({**states[0], "epoch": last, "left": left})

    def _go_on(self, state: dict[str, Any]) -> None:
        shards, before = self.dataset.num_shards, state.get("shards")
        self.epoch = state["epoch"]
        if before not in (None, shards):
            if self.rank == 0:
                print(
                    f"data: the stream has {shards} shards, not {before} as before: its epoch is begun anew",
                    file=sys.stderr,
                )
            self._left = Share(self.dataset, self.rank, self.world, self.epoch)
            return
        self._left = _source(self.dataset, state["left"])
