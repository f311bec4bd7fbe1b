"""Pictures, streams and their positions."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.build import build_stream
from distill.data import (
    Columns,
    FashionMNIST,
    ImageFolder,
    ShuffledStream,
    SolidsPictures,
    Subset,
    fashion_mnist,
    to_tensor,
)
from distill.run import build, dry_run
from distill.settings import Config
from models.errors import UserError
from tests.tiny import ROOT, save_network, save_pictures, save_sana, settings

FASHION = ROOT / "data" / "fashion-mnist"


def test_fashion_mnist_is_what_it_should_be():
    pictures = FashionMNIST(FASHION)
    batch = pictures.get([0, 1, 59999])
    assert len(pictures) == 60000 and batch.images.shape == (3, 1, 32, 32)
    assert batch.images.min() == -1 and batch.images.max() == 1 and bool((batch.images[..., :2, :] == -1).all())
    assert batch.cond.class_ids is not None and batch.cond.class_ids.tolist() == [9, 0, 5]
    assert torch.bincount(pictures.labels).tolist() == [6000] * 10


def test_fetch_verifies_and_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whole files are left alone; a broken source is noticed; with none, one line says what to do."""
    fashion_mnist.fetch_fashion_mnist(FASHION)

    def broken(folder: Path) -> None:
        for name in fashion_mnist.FASHION_MNIST_FILES:
            (folder / name).write_bytes(b"something else")

    def unreachable(folder: Path) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist, "_from_debian", broken)
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", unreachable)
    monkeypatch.setattr(unreachable, "__name__", "_from_torchvision")
    with pytest.raises(UserError, match=r"not reachable .*put its four .gz files into"):
        fashion_mnist.fetch_fashion_mnist(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        FashionMNIST(tmp_path)


def test_pictures_are_cropped_at_the_centre_and_scaled():
    image = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8)[None, :] * 5, (16, 1)))
    tensor = to_tensor(image, 16, 1)
    assert tensor.shape == (1, 16, 16) and tensor[0, 0, 0] == pytest.approx(16 * 5 / 127.5 - 1)
    assert to_tensor(image, 8, 3).shape == (3, 8, 8)


def test_image_folder_classes_and_order(tmp_path: Path):
    pictures = ImageFolder(save_pictures(tmp_path), size=16, channels=1)
    assert len(pictures) == 24 and pictures.class_names == ["T-shirt", "trouser"]
    batch = pictures.get([0, 23])
    assert batch.cond.class_ids is not None and batch.cond.class_ids.tolist() == [0, 1]


def test_a_subset_holds_the_pictures_of_its_classes(tmp_path: Path):
    pictures = ImageFolder(save_pictures(tmp_path / "pictures", count=11), 16, 1)
    part = Subset(pictures, [1])
    assert len(part) == 5 and part.labels.tolist() == [1] * 5 and part.class_names == pictures.class_names
    expected = [i for i in range(11) if int(pictures.labels[i]) == 1]
    assert torch.equal(part.get([4, 0]).images, pictures.get([expected[4], expected[0]]).images)
    with pytest.raises(UserError, match="no picture is of"):
        Subset(pictures, [5])


def test_shuffled_stream_covers_each_epoch_and_resumes(tmp_path: Path):
    class Numbers:
        shape, class_names = (1, 1, 1), ["all"]

        def __len__(self) -> int:
            return 20

        def get(self, indices: list[int]) -> Any:
            return indices

    stream = ShuffledStream(Numbers(), size=8, seed=3)
    seen: list[int] = [i for _ in range(5) for i in stream.next()]  # type: ignore[attr-defined]
    assert sorted(seen[:20]) == list(range(20)) == sorted(seen[20:]) and seen[:20] != seen[20:]
    resumed = ShuffledStream(Numbers(), size=8, seed=3)
    resumed.load_state_dict({"position": 16})
    assert [i for _ in range(3) for i in resumed.next()] == seen[16:]  # type: ignore[attr-defined]
    halves = [ShuffledStream(Numbers(), 4, 3, rank, 2) for rank in range(2)]
    shared = [i for _ in range(5) for half in halves for i in half.next()]  # type: ignore[attr-defined]
    assert shared == seen


def write_shards(folder: Path, shards: int = 3, rows: int = 4) -> Path:
    """Webdataset shards of 8 x 8 pictures whose gray value is their number."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for row in range(rows):
                number, buffer = shard * rows + row, io.BytesIO()
                Image.new("L", (8, 8), number * 10).save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def webdataset(folder: Path, streaming: bool) -> dict[str, Any]:
    """Data settings for shards written into ``folder``."""
    return {
        "kind": "hf_dataset",
        "path": "webdataset",
        "data_files": str(write_shards(folder / "shards") / "*.tar"),
        "streaming": streaming,
        "image_column": "png",
        "label_column": "cls",
        "size": 8,
        "channels": 1,
    }


@pytest.mark.parametrize("streaming", [True, False])
def test_only_the_classes_that_were_asked_for(tmp_path: Path, streaming: bool):
    source = webdataset(tmp_path, streaming)
    config = Config.model_validate(settings(tmp_path, data=source, classes=[1], train__batch_size=4))
    stream, _, _ = build_stream(config, 0, 1)
    assert stream is not None
    batches = [stream.next() for _ in range(4)]
    assert all(bool((batch.cond.class_ids == 1).all()) for batch in batches)
    state, following = stream.state_dict(), stream.next()
    again, _, _ = build_stream(config, 0, 1)
    assert again is not None
    again.load_state_dict(state)
    assert torch.equal(again.next().images, following.images)


@pytest.mark.parametrize("streaming", [True, False])
def test_webdataset_through_the_same_interface_with_exact_position(tmp_path: Path, streaming: bool):
    source = webdataset(tmp_path, streaming)
    config = Config.model_validate(settings(tmp_path, data=source, train__batch_size=5))
    numbers = lambda batch: [round((float(v) + 1) * 12.75) for v in batch.images[:, 0, 0, 0]]

    def fresh() -> Any:
        stream, shape, _ = build_stream(config, 0, 1)
        assert shape == (1, 8, 8) and stream is not None
        return stream

    stream = fresh()
    first, state = [numbers(stream.next()) for _ in range(3)], stream.state_dict()
    rest = [numbers(stream.next()) for _ in range(4)]
    assert sorted([number for batch in first for number in batch][:12]) == list(range(12))
    resumed = fresh()
    resumed.load_state_dict(state)
    assert [numbers(resumed.next()) for _ in range(4)] == rest
    labels = fresh().next()
    assert labels.cond.class_ids.tolist() == [number % 2 for number in numbers(labels)]


def test_streams_are_split_over_processes(tmp_path: Path):
    source = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(write_shards(tmp_path / "s", 2) / "*.tar")}
    source |= {"streaming": True, "image_column": "png", "label_column": "cls", "size": 8, "channels": 1}
    config = Config.model_validate(settings(tmp_path, data=source, train__batch_size=8))
    halves = []
    for rank in range(2):
        stream, _, _ = build_stream(config, rank, 2)
        assert stream is not None
        halves.append({round((float(v) + 1) * 12.75) for v in stream.next().images[:, 0, 0, 0]})
    assert halves[0] | halves[1] == set(range(8)) and not halves[0] & halves[1]


def test_streams_mix_their_shards_in_an_order_that_seed_and_epoch_decide(tmp_path: Path):
    source = webdataset(tmp_path, True) | {"data_files": str(write_shards(tmp_path / "eight", 8, 2) / "*.tar")}

    def epochs(seed: int) -> list[list[int]]:
        config = Config.model_validate(settings(tmp_path, data=source, train__batch_size=16, train__seed=seed))
        stream, _, _ = build_stream(config, 0, 1)
        assert stream is not None
        return [[round((float(v) + 1) * 12.75) for v in stream.next().images[:, 0, 0, 0]] for _ in range(2)]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(16)) and first != second
    assert len({number // 2 for number in first[:8]}) > 4 and epochs(1)[0] != first == epochs(0)[0]


def test_classes_without_names_are_counted_or_refused(tmp_path: Path):
    source = webdataset(tmp_path, False)
    pretrain = {"data": source, "teacher": None, "method": {"kind": "pretrain", "channels": [8, 32], "patch": 2}}
    values = settings(tmp_path, **pretrain)
    trainer = build(Config.model_validate(values))
    trainer.run_step()
    assert trainer.spec.class_names == ["0", "1"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="label_column: null"):
        build(Config.model_validate(values | {"data": source | {"streaming": True}}))
    alone = values | {"data": source | {"streaming": True, "label_column": None}}
    assert build(Config.model_validate(alone)).spec.class_names == ["all"]  # type: ignore[attr-defined]


def test_classes_that_a_network_does_not_know_are_named(tmp_path: Path):
    save_network(tmp_path / "one", None, 0, size=8, classes=1)
    source = webdataset(tmp_path, True)
    method = {"kind": "score_matching", "channels": [8, 16], "patch": 4}
    values = settings(tmp_path, data=source, teacher={"path": str(tmp_path / "one")}, method=method)
    trainer = build(Config.model_validate(values))
    with pytest.raises(UserError, match="class 1, but the network knows 0 to 0"):
        trainer.run_step()
    for value in ("cube", None, -1, b"x"):
        with pytest.raises(UserError, match="for a class, not a number"):
            Columns("png", "cls").class_id(value)
    assert [Columns("png", "cls").class_id(value) for value in (3, "3", b"3\n", True)] == [3, 3, 3, 1]
    save_sana(tmp_path / "sana")
    changes = {"data": source | {"size": 32, "channels": 3}, "teacher": {"path": str(tmp_path / "sana")}}
    with pytest.raises(UserError, match="pictures of classes, but the teacher"):
        build(Config.model_validate(values | changes))


def test_wrong_columns_are_named(tmp_path: Path):
    source = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(write_shards(tmp_path / "w") / "*.tar")}
    config = Config.model_validate(settings(tmp_path, data=source | {"image_column": "jpg", "label_column": "cls"}))
    with pytest.raises(UserError, match="no column 'jpg'; it has"):
        build_stream(config, 0, 1)
    with pytest.raises(ValueError, match="captions or classes"):
        Config.model_validate(settings(tmp_path, data=source | {"caption_column": "txt", "label_column": "cls"}))
    missing = Config.model_validate(settings(tmp_path, data={"kind": "hf_dataset", "path": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match="cannot be loaded"):
        build_stream(missing, 0, 1)


@pytest.mark.parametrize("streaming", [True, False])
def test_shards_that_are_missing_or_damaged_are_a_line(tmp_path: Path, streaming: bool):
    """Where the library ends in an IndexError or reads whatever lies in the folder that it was started in."""
    source = webdataset(tmp_path, streaming) | {"size": 16}
    for name, content in (("empty", b""), ("cut", next((tmp_path / "shards").iterdir()).read_bytes()[:700])):
        (tmp_path / f"{name}.tar").write_bytes(content)
    for files, message in (
        (str(tmp_path / "nowhere" / "*.tar"), "there is no file"),
        (str(tmp_path / "shards" / "{000..002}.tar"), "there is no file"),
        (None, "data.data_files: missing; webdataset reads files"),
        (str(tmp_path / "empty.tar"), "empty file"),
        (str(tmp_path / "cut.tar"), "unexpected end of data"),
    ):
        config = Config.model_validate(settings(tmp_path, data=source | {"data_files": files}))
        with pytest.raises(UserError, match=message):
            dry_run(config)


def test_the_solids_world_is_the_same_from_other_processes_and_from_memory():
    indices = [5, 2, 9, 2]
    plain = SolidsPictures(10, 32, turntable=0.5).get(indices)
    assert any("seen from" in caption for caption in plain.captions) and plain.captions[1] == plain.captions[3]
    rendered = SolidsPictures(10, 32, turntable=0.5, workers=2).get(indices)
    assert rendered.captions == plain.captions and torch.equal(rendered.images, plain.images)
    kept = SolidsPictures(10, 32, turntable=0.5, keep=True)
    first, again = kept.get(indices[:2]), kept.get(indices)
    assert torch.equal(first.images, again.images[:2]) and again.captions == plain.captions
    assert float((again.images - plain.images).abs().max()) <= 1 / 255 + 1e-6
