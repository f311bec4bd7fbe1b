"""What counts as data: class folders, their names and the teacher's, captions, samples that cannot be used."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.build import build_stream, load_teacher
from distill.class_names import KnownClasses
from distill.data import Columns, HFPictures, ImageFolder, StreamedPictures
from distill.run import build
from distill.settings import Config
from models import teachers
from models.errors import UserError
from models.teachers import class_names
from tests import families
from tests.tiny import NAMES, save_network, save_sana, settings


def picture(path: Path, value: int = 9, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(path)
    return path


def values(batch: Any) -> list[int]:
    return [round((float(v) + 1) * 127.5) for v in batch.images[:, 0, 0, 0]]


# -------------------------------------------------------------------------------------------------------------- folders


def test_what_programs_leave_behind_is_no_class(tmp_path: Path):
    for name in ("cat/1.png", "dog/deep/2.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "@eaDir/3.png"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / "._1.png").write_bytes(b"x")
    (tmp_path / "dog" / "notes.json").write_text("{}")
    found = ImageFolder(tmp_path, 8, 1)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 1]
    said = found.content.walked.said()
    assert "5 hidden or made by a program" in said and "1 folders without pictures (empty)" in said
    assert "1 no pictures (notes.json)" in said


def test_folders_within_class_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As where the folder above train/ and val/ is given."""
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png"):
        picture(tmp_path / name)
    assert ImageFolder(tmp_path, 8, 1).class_names == ["train", "val"]
    said = "pictures of 3 folders within others (train/cat, ...) are of the outer classes (train, val, ...)"
    assert said in capsys.readouterr().err
    assert ImageFolder(tmp_path / "train", 8, 1).class_names == ["cat", "dog"]
    assert "outer" not in capsys.readouterr().err


def test_what_is_left_out_is_said_when_a_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = settings(tmp_path)
    (tmp_path / "pictures" / ".cache").mkdir()
    build_stream(Config.model_validate(config), 0, 1)
    assert "24 pictures are read; left out: 1 hidden or made by a program (.cache)" in capsys.readouterr().err


def test_loose_pictures_beside_classes_are_refused(tmp_path: Path):
    picture(tmp_path / "1.png")
    assert len(ImageFolder(tmp_path, 8, 1)) == 1
    picture(tmp_path / ".thumbnails" / "1.png")
    assert len(ImageFolder(tmp_path, 8, 1)) == 1
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match=r"1 pictures of .* lie beside its 1 class folders \(cat\)"):
        ImageFolder(tmp_path, 8, 1)


def test_links_are_followed_once(tmp_path: Path):
    folder = tmp_path / "p"
    picture(folder / "cat" / "1.png")
    picture(tmp_path / "disk" / "2.png")
    os.symlink(tmp_path / "disk", folder / "dog")
    os.symlink(folder, folder / "cat" / "loop")
    found = ImageFolder(folder, 8, 1)
    assert found.labels.tolist() == [0, 1] and "1 links back" in found.content.walked.said()


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["sneaker", "bag"], [7, 8]),
        (["ankle_boot", "T-Shirt", "COAT"], [9, 0, 4]),
        (["7", "08", "9"], [7, 8, 9]),
        (["class1", "class0"], [1, 0]),
    ],
)
def test_classes_are_the_teachers_by_name_or_number(names: list[str], wanted: list[int]):
    assert KnownClasses(NAMES, "t").ids(names) == wanted


@pytest.mark.parametrize(
    ("names", "known", "words"),
    [
        (["cat", "dog"], NAMES, "the class 'cat' is none of those"),
        (["sneaker", "dog"], NAMES, "the class 'dog' is none"),
        (["7", "10"], NAMES, "classes_by: position"),
        (["7", "007"], NAMES, "are all the teacher's 'sneaker'"),
        (["t-shirt", "T-shirt"], NAMES, "are all the teacher's"),
        (["crane"], ["crane", "crane"], "'crane' is several of those"),
        (["a", "b", "c"], ["a", "b"], "3 classes, but the teacher t knows 2"),
    ],
)
def test_other_classes_are_refused(names: list[str], known: list[str], words: str):
    with pytest.raises(UserError, match=words):
        KnownClasses(known, "t").ids(names)


def test_position_and_a_single_class():
    assert KnownClasses(NAMES, "t", "position").ids(["dog", "cat"]) == [0, 1]
    assert KnownClasses(["all"], "t").ids(["whatever"]) == [0]
    assert KnownClasses(["tench, Tinca tinca", "goldfish"], "t").ids(["goldfish", "Tinca tinca"]) == [1, 0]


def test_numbers_are_of_the_classes_that_they_name():
    KnownClasses(NAMES, "t").check_places(NAMES[:3])
    KnownClasses([str(i) for i in range(10)], "t").check_places(NAMES)  # a teacher without names
    KnownClasses(["crane", "ibis", "crane"], "t").check_places(["crane", "Ibis", "crane"])
    with pytest.raises(UserError, match="class 0 is 'bag', which the teacher t knows as 8: its classes are in another"):
        KnownClasses(NAMES, "t").check_places(["bag", "coat"])


def folder_of(base: Path, names: list[str]) -> dict[str, Any]:
    for i, name in enumerate(names):
        picture(base / name / "a.png", 10 * i, 16)
    return {"kind": "image_folder", "path": str(base), "size": 16, "channels": 1}


def test_a_run_labels_pictures_as_its_teacher_does(tmp_path: Path):
    save_network(tmp_path / "ten", None, 0, size=16, classes=10)
    data = folder_of(tmp_path / "p", ["sneaker", "bag", "trouser"])
    config = settings(tmp_path, data=data, teacher={"path": str(tmp_path / "ten")})
    stream, shape, names = build_stream(Config.model_validate(config), 0, 1)
    _, spec = load_teacher(Config.model_validate(config), shape, names)
    assert stream is not None and names == spec.class_names  # type: ignore[union-attr]
    batch = stream.pictures.get([0, 1, 2])  # type: ignore[attr-defined]
    assert batch.cond.class_ids.tolist() == [8, 7, 1] and values(batch) == [10, 0, 20]
    only, _, _ = build_stream(Config.model_validate(config | {"classes": [7]}), 0, 1)
    assert only is not None and set(values(only.next())) == {0}
    place = Config.model_validate(config | {"data": data | {"classes_by": "position"}})
    assert build_stream(place, 0, 1)[0].pictures.labels.tolist() == [0, 1, 2]  # type: ignore[union-attr]
    loose = {"kind": "image_folder", "path": str(tmp_path / "p" / "bag"), "size": 16, "channels": 1}
    assert build_stream(Config.model_validate(config | {"data": loose}), 0, 1)[0].pictures.labels.tolist() == [8]  # type: ignore[union-attr]
    (tmp_path / "p" / "bag").rename(tmp_path / "photographs")
    with pytest.raises(UserError, match="the class 'photographs' is none of those"):
        build_stream(Config.model_validate(config | {"data": loose | {"path": str(tmp_path / "photographs")}}), 0, 1)


def test_folders_called_by_numbers_are_in_their_values_order(tmp_path: Path):
    folder_of(tmp_path / "p", ["10", "9", "1"])
    assert ImageFolder(tmp_path / "p", 16, 1).class_names == ["1", "9", "10"]


def test_names_of_a_data_sets_labels_are_the_teachers_too(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    save_network(tmp_path / "ten", None, 0, size=8, classes=10)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bag", "coat"])})
    rows = {"image": [Image.new("L", (8, 8), 10 * i) for i in range(4)], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    data = {"kind": "hf_dataset", "path": "parquet", "data_files": str(tmp_path / "a.parquet"), "size": 8}
    for streaming in (False, True):
        config = settings(tmp_path, data=data | {"channels": 1, "streaming": streaming}, train__batch_size=4)
        config |= {"teacher": {"path": str(tmp_path / "ten")}}
        stream, _, names = build_stream(Config.model_validate(config), 0, 1)
        assert stream is not None and names == NAMES
        batch = stream.next()
        assert batch.cond.class_ids is not None
        assert dict(zip(values(batch), batch.cond.class_ids.tolist(), strict=True)) == {0: 8, 10: 4, 20: 8, 30: 4}
        only, _, _ = build_stream(Config.model_validate(config | {"classes": [4]}), 0, 1)
        assert only is not None and set(values(only.next())) == {10, 30}


@pytest.mark.parametrize("family", ["dit", "ddpm"])
def test_class_names_are_read_without_the_network(tmp_path: Path, family: str):
    folder = families.save(tmp_path / "t", family)
    assert class_names(folder) == teachers.load_class_conditional(folder)[1].class_names
    assert class_names("embedded:fashion_mnist") == NAMES and class_names("embedded:solids") is None


# ------------------------------------------------------------------------------------------------------------- captions


def captioned(base: Path, texts: dict[str, str | None]) -> Path:
    for i, (name, text) in enumerate(texts.items()):
        picture(base / f"{name}.png", 10 * i)
        if text is not None:
            (base / f"{name}.txt").write_text(text, encoding="utf-8-sig")
    return base


def test_caption_files_beside_pictures(tmp_path: Path):
    folder = captioned(tmp_path / "p", {"a": "a cube\n", "b/c": "a sphere"})
    found = ImageFolder(folder, 8, 1)
    assert found.get([0, 1]).captions == ("a cube", "a sphere") and found.class_names == []
    assert found.texts == ["a cube", "a sphere"] and not found.content.walked.left_out
    assert ImageFolder(folder / "b", 8, 1, captions_from="none").get([0]).captions == ()
    captioned(folder, {"d": None})
    with pytest.raises(UserError, match=r"1 of 3 pictures in .* have no caption \(d.png\)"):
        ImageFolder(folder, 8, 1)
    rest = ImageFolder(folder, 8, 1, skip=True)
    assert len(rest) == 2 and "1 pictures without a caption (d.png)" in rest.content.walked.said()


def test_caption_files_of_several_lines(tmp_path: Path):
    folder = captioned(tmp_path / "p", {"a": "a cube\na box\n"})
    with pytest.raises(UserError, match="has 2 lines: give first, random or whole"):
        ImageFolder(folder, 8, 1).get([0])
    assert ImageFolder(folder, 8, 1, caption="first").get([0]).captions == ("a cube",)
    assert ImageFolder(folder, 8, 1, caption="whole").get([0]).captions == ("a cube\na box",)
    batch = ImageFolder(folder, 8, 1, caption="random").get([0])
    assert batch.choices == (("a cube", "a box"),) and batch.captions[0] in batch.choices[0]


def test_metadata(tmp_path: Path):
    folder = tmp_path / "p"
    for i, name in enumerate(["a", "b/c"]):
        picture(folder / f"{name}.png", 10 * i)
    rows = [{"file_name": "a.png", "text": "a\u2028cube"}, {"file_name": "b/c.png", "text": ["x", "y"]}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    assert ImageFolder(folder, 8, 1, caption="first").get([0, 1]).captions == ("a\u2028cube", "x")
    with pytest.raises(UserError, match=r"c\.png has 2 captions: give first or random"):
        ImageFolder(folder, 8, 1).get([0, 1])
    (folder / "metadata.jsonl").write_text(text.replace('"text": ["x"', '"text": 1, "text": ["x"'))
    with pytest.raises(UserError, match=r"line 2: .*the key 'text' is given twice"):
        ImageFolder(folder, 8, 1)
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1, has no 'prompt'; it has file_name, text"):
        ImageFolder(folder, 8, 1, caption_column="prompt")
    (folder / "a.txt").write_text("other")
    with pytest.raises(UserError, match="give metadata, files or none"):
        ImageFolder(folder, 8, 1)
    assert ImageFolder(folder, 8, 1, caption="first", captions_from="metadata").texts == ["a\u2028cube", "x"]
    (folder / "metadata.jsonl").write_text(text + '\n{"file_name": "gone.png", "text": "z"}\n')
    with pytest.raises(UserError, match=r"names .*gone\.png, which is no picture"):
        ImageFolder(folder, 8, 1, captions_from="metadata")
    (folder / "metadata.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="line 1: no JSON object with a file_name"):
        ImageFolder(folder, 8, 1, captions_from="metadata")


def test_an_image_folder_feeds_a_teacher_of_prompts(tmp_path: Path):
    save_sana(tmp_path / "sana")
    folder = tmp_path / "p"
    for i in range(4):
        picture(folder / f"{i}.png", 60 * i, 32)
        (folder / f"{i}.txt").write_text("a photo of a red cube\na photo of a blue sphere\n")
    data = {"kind": "image_folder", "path": str(folder), "size": 32, "caption": "random"}
    method = {"kind": "diff_instruct", "critic_turns": 1}
    config = settings(tmp_path, data=data, teacher={"path": str(tmp_path / "sana")}, method=method, train__batch_size=4)
    trainer = build(Config.model_validate(config))
    trainer.run_step()
    batch = trainer.stream.next()  # type: ignore[union-attr]
    told = {tuple(batch.through(trainer.spec, [s, s + 1, s + 2, s + 3]).cond.text[0, :, 0].tolist()) for s in range(8)}  # type: ignore[index]
    assert len(told) == 2
    cached = config | {"teacher": {"path": str(tmp_path / "sana"), "cache": str(tmp_path / "cache")}}
    build(Config.model_validate(cached)).run_step()
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"asked for prompts: put captions beside them, name.txt or metadata.jsonl"):
        build(Config.model_validate(config))


def test_captions_are_no_classes(tmp_path: Path):
    captioned(tmp_path / "p", {"a": "a cube"})
    data = {"kind": "image_folder", "path": str(tmp_path / "p"), "size": 16, "channels": 1}
    with pytest.raises(UserError, match=r"captions, but the teacher .* knows classes: data.captions_from: none"):
        build(Config.model_validate(settings(tmp_path, data=data)))


# ------------------------------------------------------------------------------------------------------ samples to skip


def test_a_damaged_file_ends_a_run_or_is_replaced_by_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(3):
        picture(tmp_path / "cat" / f"{i}.png", i)
        picture(tmp_path / "dog" / f"{i}.png", 100 + i)
    (tmp_path / "cat" / "2.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"2\.png is not a readable .*on_bad_picture: skip"):
        ImageFolder(tmp_path, 8, 1).get([0, 1, 2])
    found = ImageFolder(tmp_path, 8, 1, skip=True)
    batch = found.get([2, 3, 2])
    assert values(batch) == [0, 100, 0] and len(found.bad) == 1
    assert batch.cond.class_ids is not None and batch.cond.class_ids.tolist() == [0, 1, 0]
    assert capsys.readouterr().err.count("left out (1 up to now)") == 1
    for i in range(2):
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no sample can be used"):
        found.get([0])


def shard(path: Path, count: int = 8, bad: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("L", (8, 8), 10 * i).save(buffer, "PNG")
            content = buffer.getvalue()[:40] if i in bad else buffer.getvalue()
            for suffix, data in (("png", content), ("txt", f"caption {i}\n".encode())):
                if not (suffix == "txt" and i in silent):
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_samples_of_shards(tmp_path: Path, streaming: bool, capsys: pytest.CaptureFixture[str]):
    files = shard(tmp_path / "s/0.tar", bad=(1, 6), silent=(7,))
    data = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(files), "image_column": "png", "size": 8}
    data |= {"channels": 1, "streaming": streaming, "caption_column": "txt", "label_column": None}
    config = settings(tmp_path, data=data, train__batch_size=5)
    with pytest.raises(UserError, match=r"sample 001 of .*0\.tar|sample 00[67] of"):
        stream = build_stream(Config.model_validate(config), 0, 1)[0]
        for _ in range(4):
            stream.next()  # type: ignore[union-attr]
    skipping = Config.model_validate(config | {"data": data | {"on_bad_picture": "skip"}})
    stream = build_stream(skipping, 0, 1)[0]
    assert stream is not None
    seen, state, following = [], {}, None
    for _ in range(6):
        state, following = stream.state_dict(), stream.next()
        assert [f"caption {value // 10}" for value in values(following)] == list(following.captions)
        seen += values(following)
    assert set(seen) == {0, 20, 30, 40, 50}
    again = build_stream(skipping, 0, 1)[0]
    assert again is not None and following is not None
    again.load_state_dict(state)
    assert torch.equal(again.next().images, following.images)
    source = stream if isinstance(stream, StreamedPictures) else stream.pictures  # type: ignore[attr-defined]
    assert isinstance(source, StreamedPictures | HFPictures) and len(source.bad) == 3
    assert "(3 up to now)" in capsys.readouterr().err


def test_streams_of_nothing_but_damage_end(tmp_path: Path):
    files = shard(tmp_path / "s/0.tar", bad=tuple(range(8)))
    data = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(files), "image_column": "png", "size": 8}
    data |= {"channels": 1, "streaming": True, "label_column": None, "on_bad_picture": "skip"}
    stream = build_stream(Config.model_validate(settings(tmp_path, data=data, train__batch_size=2)), 0, 1)[0]
    with pytest.raises(UserError, match="none that can be used"):
        stream.next()  # type: ignore[union-attr]


def test_a_shard_that_is_cut_off_is_one_line(tmp_path: Path):
    files = shard(tmp_path / "s/0.tar", 40)
    files.write_bytes(files.read_bytes()[: 28 * 1024 + 532])  # within the content of the 15th picture
    data = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(files), "image_column": "png", "size": 8}
    data |= {"channels": 1, "label_column": None}
    for streaming in (True, False):
        config = Config.model_validate(settings(tmp_path, data=data | {"streaming": streaming}, train__batch_size=8))
        with pytest.raises(UserError, match="data") as caught:
            stream = build_stream(config, 0, 1)[0]
            for _ in range(8):
                stream.next()  # type: ignore[union-attr]
        assert "\n" not in " ".join(str(caught.value).split())


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("damage", ["at a header", "in a header", "header", "no"])
def test_no_sample_of_a_shard_is_lost_without_a_word(tmp_path: Path, streaming: bool, damage: str):
    """Python takes a header that is missing, cut off or damaged for the end of the archive."""
    files = shard(tmp_path / "s/0.tar", 12)
    content, place = bytearray(files.read_bytes()), 2 * 4 * 1024  # of the ninth member, the fifth picture
    match damage:
        case "at a header":
            content = content[:place]
        case "in a header":
            content = content[: place + 200]
        case "header":
            content[place + 3] ^= 1
        case _:
            content = content[: 12 * 2 * 1024 + 512]  # one block of zeros does
    files.write_bytes(content)
    data = {"kind": "hf_dataset", "path": "webdataset", "data_files": str(files), "image_column": "png", "size": 8}
    data |= {"channels": 1, "label_column": None, "streaming": streaming}
    config = Config.model_validate(settings(tmp_path, data=data, train__batch_size=4))

    def read() -> set[int]:
        stream = build_stream(config, 0, 1)[0]
        assert stream is not None
        return {value for _ in range(3) for value in values(stream.next())}

    if damage == "no":
        assert read() == {10 * i for i in range(12)}
    else:
        with pytest.raises(UserError, match=f"cut off or damaged at byte {place}"):
            read()


@pytest.mark.parametrize("label", [1.5, float("nan"), float("inf"), -1, "shirt", None, ""])
def test_a_label_is_a_whole_number(label: Any):
    columns = Columns("image", "label")
    assert columns.class_id(2.0) == 2 == columns.class_id("2") == columns.class_id(b"2\n")
    with pytest.raises(UserError, match="not a number from 0 on"):
        columns.class_id(label)


def test_pictures_in_columns_of_other_types(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    data = picture(tmp_path / "a.png", 50).read_bytes()
    cases: list[tuple[Any, str | None]] = [(data, None), (str(tmp_path / "a.png"), None), ([[1, 2]], "not a file's")]
    for i, (value, words) in enumerate(cases):
        datasets.Dataset.from_dict({"image": [value] * 2, "label": [0, 0]}).to_parquet(str(tmp_path / f"{i}.parquet"))
        source = {"kind": "hf_dataset", "path": "parquet", "data_files": str(tmp_path / f"{i}.parquet"), "size": 8}
        config = settings(tmp_path, data=source | {"channels": 1, "label_column": None}, train__batch_size=2)
        stream = build_stream(Config.model_validate(config), 0, 1)[0]
        assert stream is not None
        if words is None:
            assert values(stream.next()) == [50, 50]
        else:
            with pytest.raises(UserError, match=words):
                stream.next()
