"""Positions in a stream: whatever becomes of the number of processes, an epoch holds every row once."""

import copy
import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from distill.build import build_stream
from distill.data import ShuffledStream, StreamedPictures
from distill.epochs import Epochs
from distill.run import build
from distill.settings import Config
from models.errors import UserError
from tests.test_data import webdataset, write_shards
from tests.tiny import settings

ROWS = 48


def rows(shards: int, count: int = ROWS) -> Any:
    plain = datasets.Dataset.from_dict({"n": list(range(count))})
    return plain.to_iterable_dataset(num_shards=shards).shuffle(seed=0, buffer_size=1)


def take(processes: list[Epochs], turns: int) -> list[list[int]]:
    """What each process reads in so many turns of one row each."""
    return [[process.next()["n"] for _ in range(turns)] for process in processes]


def go_on(processes: list[Epochs], data: Any, world: int) -> list[Epochs]:
    """As a run does that is resumed by ``world`` processes."""
    states = copy.deepcopy([process.state_dict() for process in processes])
    after = [Epochs(data, rank, world) for rank in range(world)]
    for process in after:
        process.load_states(states)
    return after


@pytest.mark.parametrize("shards", [12, 4, 1])
@pytest.mark.parametrize("worlds", list(itertools.product([1, 2, 3, 4], repeat=2)))
def test_an_epoch_holds_every_row_once_whatever_the_number_of_processes(shards: int, worlds: tuple[int, int]):
    first, second = worlds
    data = rows(shards)
    processes = [Epochs(data, rank, first) for rank in range(first)]
    seen = list(itertools.chain(*take(processes, 12 // first)))
    processes = go_on(processes, data, second)
    seen += itertools.chain(*take(processes, (ROWS - 12) // second))
    assert sorted(seen) == list(range(ROWS))
    following = list(itertools.chain(*take(processes, ROWS // second)))
    assert sorted(following) == list(range(ROWS))
    alone = [Epochs(data, rank, second) for rank in range(second)]
    assert take(alone, 2 * ROWS // second)[0][ROWS // second :] == following[: ROWS // second]


@pytest.mark.parametrize("worlds", [(2, 4, 1, 3), (3, 2, 3, 2), (4, 1, 4, 4), (1, 6, 2, 1)])
def test_it_may_change_again_and_again_within_an_epoch(worlds: tuple[int, ...]):
    data = rows(6, 72)
    processes, seen = [Epochs(data, rank, worlds[0]) for rank in range(worlds[0])], []
    for world in worlds[1:]:
        seen += itertools.chain(*take(processes, 12 // len(processes)))
        processes = go_on(processes, data, world)
    seen += itertools.chain(*take(processes, 36 // len(processes)))
    assert sorted(seen) == list(range(72))


def test_processes_that_are_an_epoch_apart_lose_nothing():
    """Shares of three rows and of two: behind three turns the second process is in the next epoch."""
    data = rows(1, 5)
    processes = [Epochs(data, rank, 2) for rank in range(2)]
    seen = take(processes, 3)
    assert processes[0].epoch != processes[1].epoch
    left = go_on(processes, data, 1)
    rest = list(itertools.chain(*take(left, 10 - 6)))
    assert sorted([*itertools.chain(*seen), *rest]) == sorted(2 * list(range(5)))


def test_a_resumed_process_reads_what_it_would_have_read():
    data = rows(4)
    for turns in (0, 1, 13, 24, 25, 60):
        processes = [Epochs(data, rank, 2) for rank in range(2)]
        take(processes, turns)
        states = copy.deepcopy([process.state_dict() for process in processes])
        again = [Epochs(data, rank, 2) for rank in range(2)]
        for process, state in zip(again, states, strict=True):
            process.load_state_dict(state)
            assert process.state_dict() == state  # also before it has read anything
        assert take(again, 30) == take(processes, 30)


def test_one_processs_position_is_not_that_of_all(tmp_path: Path):
    data = rows(4)
    state = Epochs(data, 0, 2).state_dict()
    with pytest.raises(UserError, match="one of 2 processes does not tell 3"):
        Epochs(data, 1, 3).load_state_dict(state)
    alone = Epochs(data)
    take([alone], 8)
    halves = [Epochs(data, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(alone.state_dict())
    assert len(set(itertools.chain(*take(halves, 20), *take([Epochs(data)], 8)))) == ROWS


def test_positions_of_earlier_checkpoints_are_read():
    """They held the epoch and the library's position, of each process in order."""
    data = rows(4)
    processes = [Epochs(data, rank, 2) for rank in range(2)]
    seen = take(processes, 6)
    old = [{"epoch": p.epoch, "dataset": p.state_dict()["left"]["dataset"]} for p in processes]
    (alone,) = [Epochs(data)]
    alone.load_states(old)
    assert sorted([*itertools.chain(*seen), *take([alone], 36)[0]]) == list(range(ROWS))


def test_a_source_that_has_changed_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Shards or pictures were added: positions mean nothing there, so an epoch is begun and that is said."""
    process = Epochs(rows(4))
    take([process], 5)
    other = Epochs(rows(5))
    other.load_states([process.state_dict()])
    assert "the stream has 5 shards, not 4 as before: its epoch is begun anew" in capsys.readouterr().err
    assert sorted(take([other], ROWS)[0]) == list(range(ROWS))
    config = Config.model_validate(settings(tmp_path))
    stream, _, _ = build_stream(config, 0, 1)
    assert isinstance(stream, ShuffledStream)
    stream.next()
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert capsys.readouterr().err == "" and stream.position == 8
    stream.load_states([state | {"count": 20}])
    assert "24 pictures, not 20 as before: a new epoch is begun" in capsys.readouterr().err and stream.position == 24


def test_a_run_takes_over_the_positions_of_two_processes(tmp_path: Path):
    """Through the trainer: two streams' positions in a checkpoint of one, as two processes leave them."""
    write_shards(tmp_path / "s", 4, 6)
    source = webdataset(tmp_path, True) | {"data_files": str(tmp_path / "s" / "*.tar"), "size": 16}
    config = Config.model_validate(settings(tmp_path, data=source, train__batch_size=4))
    numbers = lambda batch: [round((float(v) + 1) * 12.75) for v in batch.images[:, 0, 0, 0]]
    halves = [build_stream(config, rank, 2)[0] for rank in range(2)]
    seen = [number for half in halves if half for _ in range(2) for number in numbers(half.next())]
    trainer = build(config)
    trainer.run_step()
    trainer.config.output.mkdir()
    of_both = [half.state_dict() for half in halves if half]
    assert isinstance(trainer.stream, StreamedPictures)
    trainer.stream.state_dict = lambda: of_both[0]  # type: ignore[method-assign]
    trainer.save()
    path = next((tmp_path / "run" / "checkpoints").iterdir()) / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"streams": of_both}, path)
    resumed = build(config)
    resumed.resume()
    assert resumed.step == 1 and resumed.stream is not None
    rest = [number for _ in range(4) for number in numbers(resumed.stream.next())]
    assert sorted(seen + rest) == list(range(24))
