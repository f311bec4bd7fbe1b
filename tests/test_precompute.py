"""Latents and embeddings computed once: exact, resumable, shared between processes, refused for another teacher."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import nn

from distill import precompute, stored
from distill.build import build_stream, load_teacher
from distill.data import ImageFolder, ShuffledStream
from distill.run import build, train
from distill.settings import Config, check
from distill.stored import Stored
from eval.binding import RATIOS
from models.errors import UserError
from models.teachers import load
from models.teachers.base import TextSpec
from models.teachers.pipeline import PipelineSpec
from models.teachers.sana import SanaSpec
from tests import families
from tests.test_families import consistency, f_distill, values
from tests.tiny import ROOT, environment, save_sana, settings, torch_threads

FAMILY = "stable_diffusion_3"


def make(base: Path, config: dict[str, Any], output: str, keys: tuple[str, ...] = (), **options: Any) -> Path:
    """``python -m distill.precompute`` for a configuration."""
    (base / "precompute.yaml").write_text(yaml.safe_dump(config))
    chosen: dict[str, Any] = {"dtype": "float32", "per_shard": 3, "batch": 2} | options
    precompute.main(precompute.Options(base / output, base / "precompute.yaml", **chosen), keys)
    return base / output


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged, every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["grad_norm/student"] > 0 and line["skipped_steps"] == 0 for line in lines)
    return lines


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums over several threads are not of one order on every CPU."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with three text encoders, and its embedded pictures in float32, in shards of three."""
    folder = tmp_path_factory.mktemp("precompute")
    families.save(folder / "teacher", FAMILY)
    make(folder, configuration(folder), "latents")
    return folder


def configuration(base: Path, output: str = "plain", **changes: Any) -> dict[str, Any]:
    return values(base, base / "teacher", output, f_distill(FAMILY), False, 2.0) | changes


def precomputed(base: Path, folder: str = "latents", **more: Any) -> dict[str, Any]:
    return {"kind": "precomputed", "path": str(base / folder)} | more


# ----------------------------------------------------------------------------------------------------- round trip


def test_what_is_read_is_what_the_teacher_makes(base: Path):
    stream, _, _ = build_stream(check(configuration(base), "test"), 0, 1)
    _, spec = load(base / "teacher", 16, 32)
    assert isinstance(stream, ShuffledStream) and isinstance(spec, TextSpec)
    read = Stored(base / "latents")
    for indices in ([0, 1], [6, 7]):
        direct, got = stream.pictures.get(indices).through(spec, [0, 0]), read.get(indices)
        assert got.encoded and torch.equal(got.images, direct.images)
        for name in ("text", "pooled", "null_text", "null_pooled"):
            assert torch.equal(getattr(got.cond, name), getattr(direct.cond, name)), name
        assert got.cond.text_mask is None and got.through(spec, [0, 0]) is got
    order = read.get([7, 0, 3])
    assert torch.equal(order.images[1:2], read.get([0]).images)


@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_rounds_to_nearest(base: Path, dtype: str, step: float):
    exact, rounded = Stored(base / "latents").get([0, 3]), Stored(make(base, configuration(base), dtype, dtype=dtype))
    got = rounded.get([0, 3])
    for a, b in ((exact.images, got.images), (exact.cond.text, got.cond.text), (exact.cond.pooled, got.cond.pooled)):
        assert a is not None and b is not None and a.shape == b.shape and not torch.equal(a, b)
        assert bool(((a - b).abs() <= step * a.abs() + 2**-24).all())


def test_padding_is_not_stored(tmp_path: Path):
    """Sana's prompts have a mask: three words and the first token, of sixteen; the rest is zero when it is read."""
    teacher = save_sana(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red cube\na photo of a blue sphere\na cone\n")
    config = prompts_alone(tmp_path, teacher)
    read = Stored(make(tmp_path, config, "texts"))
    _, spec = load(teacher)
    assert isinstance(spec, TextSpec)
    direct, got = spec.text(["a cone", "a red cube"]), read.texts([2, 0])
    assert direct.text_mask is not None and direct.text is not None and got.text is not None
    assert direct.text_mask.sum(1).tolist() == [3, 4] and torch.equal(got.text_mask, direct.text_mask)  # type: ignore[arg-type]
    assert torch.equal(got.text, direct.text * direct.text_mask.unsqueeze(2))
    assert torch.equal(got.null_text, direct.null_text)  # type: ignore[arg-type]
    rows = [load_bytes(content)["text"].shape for content in read.shards.read("text.safetensors", [0, 1, 2])]
    assert rows == [(4, 32), (7, 32), (3, 32)] and not read.pictures


def test_shards_are_plain_webdataset(base: Path):
    import datasets

    data = datasets.load_dataset(
        "webdataset", data_files=str(base / "latents" / "*.tar"), split="train", streaming=True
    )
    rows = list(data)
    assert [row["txt"] for row in rows] == ["a sphere", "a red cube"] * 4
    x0 = load_bytes(rows[4]["x0.safetensors"])["x0"]
    assert torch.equal(x0, Stored(base / "latents").get([4]).images[0])


# ------------------------------------------------------------------------------------------------------- training


def prompts_alone(base: Path, teacher: Path, output: str = "plain") -> dict[str, Any]:
    """Diff-Instruct from a file of prompts."""
    config = values(base, teacher, output, {"kind": "diff_instruct", "critic_turns": 1}, False, 2.0)
    config["data"] = {"kind": "conditions_only", "prompts": str(base / "prompts.txt")}
    config["teacher"] = {"path": str(teacher), "guidance": 2.0}
    return config


def compare(base: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Both runs log the same losses and export the same weights, those that were dropped too.

    To rounding: what a text encoder makes of a prompt depends, on some CPUs, on how many are encoded with it.
    """
    for config in (first, second):
        assert train(check(config, "test")) == 0
    one, two = Path(first["output"]), Path(second["output"])
    parts = lambda line: [v for value in line.values() for v in (value if isinstance(value, list) else [value])]
    flat = lambda line: [-1.0 if v is None else v for v in parts(line)]  # a bin without a sample
    for mine, other in zip(metrics(one), metrics(two), strict=True):
        assert mine.keys() == other.keys() and flat(mine) == pytest.approx(flat(other), rel=1e-4, abs=1e-6)
    weights = [sorted(path.relative_to(run) for path in (run / "student").rglob("*.safetensors")) for run in (one, two)]
    assert weights[0] == weights[1] and weights[0]
    for path in weights[0]:
        mine, other = load_file(one / path), load_file(two / path)
        assert mine.keys() == other.keys()
        assert all((mine[name].float() - other[name].float()).abs().mean() < 1e-5 for name in mine), path


def test_a_pipelines_student_learns_the_same(base: Path):
    compare(base, configuration(base), configuration(base, "again", data=precomputed(base)))


def test_sanas_student_learns_the_same(tmp_path: Path):
    """sCM + LADD, whose tangents are forward derivatives through the stored embeddings."""
    teacher = save_sana(tmp_path / "teacher")
    config = values(tmp_path, teacher, "plain", consistency(FAMILY, 1.0), False)
    config["teacher"], config["data"]["size"] = {"path": str(teacher)}, 32
    config["method"]["guidance"] = [2.0, 3.0]
    folder = make(tmp_path, config, "latents")
    compare(tmp_path, config, config | {"output": str(tmp_path / "again"), "data": precomputed(tmp_path, folder.name)})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_student_of_classes_learns_the_same(tmp_path: Path, streaming: bool):
    config = settings(tmp_path, train__steps=3, train__log_every=1, train__batch_size=4)
    make(tmp_path, config, "pictures_kept", per_shard=100 if streaming else 5)
    data = precomputed(tmp_path, "pictures_kept", streaming=streaming)
    again = config | {"output": str(tmp_path / "again"), "data": data}
    if not streaming:
        compare(tmp_path, config, again)
        return
    train(check(again, "test"))
    metrics(tmp_path / "again")


def test_prompts_cached_on_disk_change_nothing(base: Path):
    (base / "prompts.txt").write_text("a red cube\na sphere\na red cube\na cone\n")
    config = prompts_alone(base, base / "teacher", "uncached")
    cached = config | {"output": str(base / "cached"), "teacher": config["teacher"] | {"cache": str(base / "cache")}}
    compare(base, config, cached)
    (folder,) = (base / "cache").iterdir()
    read = Stored(folder)
    assert len(read) == 3 + 1 and read.facts["dtype"] == "float32"  # three prompts and that of the sample grid
    before = digests(folder)
    trainer = build(check(cached | {"output": str(base / "third")}, "test"))
    assert digests(folder) == before and isinstance(trainer.spec, PipelineSpec)
    with pytest.raises(ValueError, match="no embedding is kept of the prompt 'a torus'"):
        trainer.spec.text(["a torus"])
    precomputed_prompts = make(base, config, "texts")
    compare(
        base, config, config | {"output": str(base / "fourth"), "data": precomputed(base, precomputed_prompts.name)}
    )


def test_captions_of_pictures_are_cached_too(base: Path):
    teacher = configuration(base)["teacher"] | {"cache": str(base / "captions")}
    trainer = build(check(configuration(base, "captions_run", teacher=teacher), "test"))
    trainer.run_step()
    spec = trainer.spec
    assert (
        isinstance(spec, PipelineSpec) and spec.pipe.text_encoder_3 is None and list(spec.pipe.vae.encoder.parameters())
    )


def test_encoders_are_gone_while_it_trains(base: Path, tmp_path: Path):
    _, spec = load_teacher(check(configuration(base, data=precomputed(base)), "test"))
    assert isinstance(spec, PipelineSpec)
    parts = [name for name, part in spec.pipe.components.items() if isinstance(part, nn.Module)]
    assert parts == ["vae"] and not list(spec.pipe.vae.encoder.parameters())
    assert spec.preview(2).text is not None and spec.decode(torch.zeros(1, *spec.shape)).shape == (1, 3, 16, 16)
    teacher = save_sana(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cube\n")
    config = prompts_alone(tmp_path, teacher)
    _, its = load_teacher(check(config | {"teacher": config["teacher"] | {"cache": str(tmp_path / "cache")}}, "test"))
    assert isinstance(its, SanaSpec) and not list(its.text_encoder.parameters())
    assert its.preview(1).text is not None and not list(its.vae.encoder.parameters())


# --------------------------------------------------------------------------------- interruption, processes, errors


def test_an_interrupted_run_goes_on_to_the_same_files(base: Path, monkeypatch: pytest.MonkeyPatch):
    """It dies within the second shard; the first is kept as it is, nothing of the second is left, the end is equal."""
    encode, calls = stored.Writer._encode, []

    def dying(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(stored.Writer, "_encode", dying)
    with pytest.raises(KeyboardInterrupt):
        make(base, configuration(base), "torn")
    assert sorted(path.suffix for path in (base / "torn").iterdir()) == [".json", ".json", ".safetensors", ".tar"]
    (base / "torn" / "shard-00001.tar.1.partial").write_bytes(b"of a process that was killed")
    calls[:] = [None] * 10
    make(base, configuration(base), "torn")
    assert len(calls) == 10 + 3  # two batches of the second shard, one of the third
    assert digests(base / "torn") == digests(base / "latents")


def test_other_settings_do_not_go_on(base: Path):
    with pytest.raises(UserError, match=r"dtype float32 -> float16.*choose another folder"):
        make(base, configuration(base), "latents", dtype="float16")
    with pytest.raises(UserError, match=r"count 8 -> 4"):
        make(base, configuration(base), "latents", count=4)


def test_two_processes_share_the_work(base: Path):
    """torchrun with gloo: the same files; and as a run of two processes they read what one would."""
    (base / "precompute.yaml").write_text(yaml.safe_dump(configuration(base)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launcher, "-m", "distill.precompute", str(base / "shared"), "--config", str(base / "precompute.yaml")]
    line += ["--dtype", "float32", "--per-shard", "3", "--batch", "2", "--train.seed", "0"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert digests(base / "shared") == digests(base / "latents")


READ = """
import json, sys
import torch
from accelerate import Accelerator
from distill.build import build_stream
from distill.settings import read_config
from pathlib import Path
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
stream, _, _ = build_stream(read_config(Path(sys.argv[1])), rank, world)
seen, state = [], None
for step in range(8):
    if step == 3:
        state = stream.state_dict()
    seen.append(stream.next().images.flatten(1).sum(1).tolist())
again, _, _ = build_stream(read_config(Path(sys.argv[1])), rank, world)
again.load_state_dict(state)
assert [again.next().images.flatten(1).sum(1).tolist() for _ in range(5)] == seen[3:]
Path(sys.argv[2] + f"/rank{rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_read_disjoint_samples_and_resume_exactly(base: Path, tmp_path: Path, streaming: bool):
    """Eight samples, two each a step: every second step ends an epoch, in which each sample was read once."""
    config = configuration(base, data=precomputed(base, streaming=streaming))
    config["train"]["batch_size"] = 4
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "read.py").write_text(READ)
    line = [*launcher, str(tmp_path / "read.py"), str(tmp_path / "run.yaml"), str(tmp_path)]
    done = subprocess.run(
        line, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    everything = Stored(base / "latents").get(list(range(8))).images.flatten(1).sum(1).tolist()
    assert len(set(everything)) == 8
    shard = {value: i // 3 for i, value in enumerate(everything)}
    orders = []
    for epoch in range(4):
        read = [value for step in (2 * epoch, 2 * epoch + 1) for rank in ranks for value in rank[step]]
        assert sorted(read) == sorted(everything)
        orders.append(tuple(read))
        runs = 1 + sum(shard[a] != shard[b] for a, b in pairwise(read))
        if streaming:
            assert runs == 3  # shard after shard
    assert len(set(orders)) == 4
    stream, _, _ = build_stream(check(config, "test"), 0, 1)
    assert stream is not None
    alone = [value for _ in range(2) for value in stream.next().images.flatten(1).sum(1).tolist()]
    assert alone == list(orders[0])


def test_streaming_keeps_to_the_classes_that_were_asked_for(tmp_path: Path):
    config = settings(tmp_path, classes=[1], train__batch_size=4)
    make(tmp_path, settings(tmp_path), "kept", per_shard=5)
    stream, shape, names = build_stream(
        Config.model_validate(config | {"data": precomputed(tmp_path, "kept", streaming=True)}), 0, 1
    )
    assert stream is not None and shape == (1, 16, 16) and names == ["T-shirt", "trouser"]
    batches = [stream.next() for _ in range(3)]
    pictures = ImageFolder(tmp_path / "pictures", 16, 1)
    wanted = {float(pictures.get([i]).images.sum()) for i in range(24) if int(pictures.labels[i]) == 1}
    assert {float(image.sum()) for batch in batches for image in batch.images} == wanted


def classes_kept(base: Path) -> dict[str, Any]:
    """Pictures of two classes, as data settings."""
    make(base, settings(base), "kept", per_shard=5)
    return precomputed(base, "kept")


def error(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        trainer = build(check(config, "test"))
        for _ in range(4):
            trainer.run_step()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_teachers_latents_are_refused(base: Path, tmp_path: Path):
    """Its autoencoder's scale, one of its text encoders, its tokens or its size: any of them makes another teacher. A
    copy of the folder does not."""
    other = families.save(tmp_path / "other", FAMILY)

    def with_teacher(**changes: Any) -> dict[str, Any]:
        config = configuration(base, data=precomputed(base))
        return config | {"teacher": config["teacher"] | {"path": str(other)} | changes}

    assert build(check(with_teacher(), "test")).spec.shape == (4, 8, 8)
    assert "in another way" in error(with_teacher(tokens=16))
    assert "makes (3, 32, 32)" in error(with_teacher(size=32))
    assert "pictures of shape (1, 16, 16)" in error(with_teacher() | {"data": classes_kept(tmp_path)})
    assert "pictures of shape (3, 16, 16)" in error(settings(tmp_path, data=precomputed(base)))
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    make(tmp_path, prompts_alone(tmp_path, other), "texts")
    of_classes = settings(tmp_path, data=precomputed(tmp_path, "texts"))
    of_classes["method"] = {"kind": "sim"}
    assert "asked_for prompts, but that of" in error(of_classes)
    vae, encoder = other / "vae" / "config.json", other / "text_encoder_2" / "model.safetensors"
    as_it_was = vae.read_text()
    vae.write_text(as_it_was.replace("1.5305", "1.0"))
    words = rf"{base / 'latents'} was made by another teacher ({base / 'teacher'}): {other} encodes"
    assert words in error(with_teacher())
    vae.write_text(as_it_was)
    encoder.write_bytes((other / "text_encoder" / "model.safetensors").read_bytes())
    assert words in error(with_teacher())


def test_damage_is_one_line(base: Path, tmp_path: Path):
    config = configuration(base)
    folder = make(base, config, "damaged")
    config["data"] = precomputed(base, "damaged")
    before, tar = digests(folder), folder / "shard-00001.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as file:
        member = file.getmember("000000004.x0.safetensors")
    content[member.offset_data + member.size - 3] ^= 1
    tar.write_bytes(bytes(content))
    assert "shard-00001.tar is damaged: delete it; then run `python -m distill.precompute` again" in error(config)
    tar.write_bytes(bytes(content[:4000]))
    assert "shard-00001.tar is damaged" in error(config)
    tar.unlink()
    assert "1 of 3 shards are missing: run `python -m distill.precompute` again" in error(config)
    make(base, configuration(base), "damaged")
    assert digests(folder) == before
    (folder / "shard-00002.json").write_text("{")
    assert "shard-00002.json is damaged" in error(config)
    (folder / "stored.json").unlink()
    assert "no stored.json" in error(config)


def test_what_cannot_be_computed_is_one_line(base: Path, tmp_path: Path):
    config = configuration(base)
    for changes, words in (
        ({"data": precomputed(base)}, "precomputed is what this command makes"),
        ({"data": {"kind": "conditions_only"}}, "data.prompts: missing"),
        ({"data": config["data"] | {"streaming": True}}, "data.streaming"),
    ):
        with pytest.raises(UserError, match=words):
            make(base, config | changes, "never")
    with pytest.raises(UserError, match=r"unknown key; did you mean 'teacher\.size'"):
        make(base, config, "never", ("--teacher.sise", "16"))
    assert not (base / "never").exists()
    loud = families.save(tmp_path / "loud", FAMILY)
    vae = loud / "vae" / "config.json"
    vae.write_text(vae.read_text().replace("1.5305", "1e9"))
    wide = config | {"teacher": config["teacher"] | {"path": str(loud)}}
    with pytest.raises(UserError, match="a value of x0 is too large for float16: choose bfloat16"):
        make(tmp_path, wide, "loud_latents", dtype="float16")
    classes = settings(tmp_path, data={"kind": "conditions_only"}, teacher__cache="cache")
    classes["method"] = {"kind": "sim"}
    assert "teacher.cache" in error(classes)
    pretrain = settings(tmp_path, data=precomputed(base))
    pretrain["method"] = {"kind": "pretrain", "channels": [8, 16]}
    del pretrain["teacher"]
    assert "learns from pictures, not from their latents" in error(pretrain)


# ---------------------------------------------------------------------------------------------- what it was made of


def edit(folder: Path, times: tuple[int, int] | None = None) -> None:
    """Other pixels in one picture, in as many bytes."""
    path = sorted(folder.rglob("*.png"))[0]
    status, size = path.stat(), Image.open(path).size
    for shade in range(100, 255):
        Image.new("RGB", size, (shade, 255 - shade, 7)).save(path)
        if path.stat().st_size == status.st_size:
            break
    if times is not None:
        os.utime(path, ns=times)


@pytest.fixture
def classes(tmp_path: Path) -> dict[str, Any]:
    """A run on two folders of flat pictures, whose latents are made."""
    config = settings(tmp_path)
    for i, path in enumerate(sorted((tmp_path / "pictures").rglob("*.png"))):
        Image.new("RGB", (16, 16), (9 * i, 255 - 9 * i, 7)).save(path)
    make(tmp_path, config, "latents")
    return config


def test_pictures_that_have_changed_are_not_taken_for_those_that_were_encoded(tmp_path: Path, classes: dict[str, Any]):
    make(tmp_path, classes, "latents")
    edit(tmp_path / "pictures")
    with pytest.raises(UserError, match="made of other pictures or captions, in 1 of 8 shards: choose another folder"):
        make(tmp_path, classes, "latents")
    (tmp_path / "latents" / "shard-00000.tar").unlink()  # the rest goes on
    make(tmp_path, classes, "latents")


def test_pictures_that_were_only_written_again_are_compared_and_kept(tmp_path: Path, classes: dict[str, Any]):
    before = digests(tmp_path / "latents")
    for path in (tmp_path / "pictures").rglob("*.png"):
        os.utime(path, (1, 1))
    make(tmp_path, classes, "latents")
    after = digests(tmp_path / "latents")
    assert before.pop("stored.json") != after.pop("stored.json") and before == after
    data = precomputed(tmp_path)
    build_stream(Config.model_validate(classes | {"data": data}), 0, 1)


def test_verify_reads_everything(tmp_path: Path, classes: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """Also where names, sizes and times are the same."""
    path = sorted((tmp_path / "pictures").rglob("*.png"))[0]
    status = path.stat()
    make(tmp_path, classes, "latents", verify=True)
    edit(tmp_path / "pictures", (status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    make(tmp_path, classes, "latents")
    with pytest.raises(UserError, match="in 1 of 8 shards"):
        make(tmp_path, classes, "latents", verify=True)


def test_latents_whose_pictures_have_changed_are_not_trained_on(
    tmp_path: Path, classes: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    config = Config.model_validate(classes | {"data": precomputed(tmp_path)})
    build_stream(config, 0, 1)
    assert "written again" not in capsys.readouterr().err
    edit(tmp_path / "pictures")
    build_stream(config, 0, 1)
    assert "was written again since, in the same sizes: `python -m distill.precompute --verify`" in (
        capsys.readouterr().err
    )
    Image.new("RGB", (40, 30), (1, 2, 3)).save(sorted((tmp_path / "pictures").rglob("*.png"))[0])
    with pytest.raises(UserError, match="whose files or captions have changed since: encode them again"):
        build_stream(config, 0, 1)
    shutil.rmtree(tmp_path / "pictures")  # gone, as on another machine
    build_stream(config, 0, 1)


def test_pictures_of_linked_folders_are_noticed(tmp_path: Path):
    config = settings(tmp_path)
    (tmp_path / "pictures" / "trouser").rename(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "trouser").symlink_to(tmp_path / "elsewhere")
    make(tmp_path, config, "latents")
    Image.new("L", (40, 30), 3).save(sorted((tmp_path / "elsewhere").iterdir())[0])
    with pytest.raises(UserError, match="made of other pictures or captions"):
        make(tmp_path, config, "latents")
    with pytest.raises(UserError, match="whose files or captions have changed"):
        build_stream(Config.model_validate(config | {"data": precomputed(tmp_path)}), 0, 1)


def test_numbers_of_classes_are_of_one_teacher(tmp_path: Path, classes: dict[str, Any]):
    """Another whose classes are in another order would be told the wrong ones."""
    index = tmp_path / "teacher" / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps(values | {"class_names": values["class_names"][::-1]}))
    assert "'T-shirt', which the teacher" in error(classes | {"data": precomputed(tmp_path)})


def test_captions_that_have_changed_are_noticed(base: Path, tmp_path: Path):
    """In as many letters; both those of pictures and those of a file of prompts."""
    config = configuration(tmp_path, teacher=configuration(base)["teacher"])
    make(tmp_path, config, "latents")
    table = tmp_path / "pictures" / "metadata.csv"
    table.write_text(table.read_text().replace("sphere", "circle"))
    with pytest.raises(UserError, match="made of other pictures or captions, in 3 of 3 shards"):
        make(tmp_path, config, "latents")
    with pytest.raises(UserError, match="whose files or captions have changed"):
        build_stream(check(config | {"data": precomputed(tmp_path)}, "test"), 0, 1)
    (tmp_path / "prompts.txt").write_text("a cone\na cube\n")
    alone = prompts_alone(tmp_path, base / "teacher")
    make(tmp_path, alone, "texts")
    (tmp_path / "prompts.txt").write_text("a cone\na ball\n")
    with pytest.raises(UserError, match="made of other pictures or captions, in 1 of 1 shards"):
        make(tmp_path, alone, "texts")


def test_latents_without_a_digest_are_kept_with_a_line(
    tmp_path: Path, classes: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    """Those of earlier versions."""
    facts = json.loads((tmp_path / "latents" / "stored.json").read_text())
    del facts["source"]
    (tmp_path / "latents" / "stored.json").write_text(json.dumps(facts))
    for path in (tmp_path / "latents").glob("shard-*.json"):
        index = json.loads(path.read_text())
        del index["source"]
        path.write_text(json.dumps(index))
    build_stream(Config.model_validate(classes | {"data": precomputed(tmp_path)}), 0, 1)
    make(tmp_path, classes, "latents")
    assert "8 shards do not tell what they were made of: not compared" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- a new teacher


def new_teacher(base: Path, other: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Settings of a new Sana with the autoencoder and the text encoder of the folder ``other``."""
    sizes = {"width": 32, "depth": 1, "text_width": 32, "text_depth": 1, "max_length": 16}
    sana = sizes | {"autoencoder": str(other), "text_encoder": str(other)}
    config = settings(base, "new", data=data)
    config["method"] = {"kind": "pretrain", "sigma_data": 1.0, "sana": sana}
    config["train"] |= {"steps": 3, "log_every": 1, "sample_every": 2, "batch_size": 4}
    del config["teacher"]
    return config


def test_a_new_teacher_learns_from_latents_with_a_text_encoder_that_stays(tmp_path: Path):
    other = save_sana(tmp_path / "other")
    pictures = {"kind": "solids", "count": 8, "size": 32, "pairs": 0.5}
    folder = make(tmp_path, new_teacher(tmp_path, other, pictures), "latents", dtype="float16")
    config = new_teacher(tmp_path, other, precomputed(tmp_path))
    assert train(check(config, "test")) == 0
    lines = metrics(tmp_path / "new")
    found = {name for line in lines for name in line if name.startswith("binding/")}
    assert found == {"binding/colours", "binding/relation", "binding/count"}
    assert [len(line["binding/colours"]) for line in lines if "binding/colours" in line] == [len(RATIOS)] * 2
    _, spec = load(tmp_path / "new" / "student")
    assert isinstance(spec, SanaSpec)
    for name, value in load_file(other / "text_encoder" / "model.safetensors").items():
        assert torch.equal(spec.text_encoder.state_dict()[name], value)
    student = new_teacher(tmp_path, other, precomputed(tmp_path)) | {"teacher": {"path": str(tmp_path / "new/student")}}
    student |= {"method": {"kind": "consistency", "guidance": [1.0]}, "output": str(tmp_path / "scm")}
    assert build(check(student, "test")).spec.shape == (4, 8, 8)  # its student learns from the same folder
    stranger = save_sana(tmp_path / "stranger", seed=1)
    refused = new_teacher(tmp_path, stranger, precomputed(tmp_path)) | {"output": str(tmp_path / "refused")}
    assert f"{folder} was made by another teacher" in error(refused)
    untaught = new_teacher(tmp_path, other, pictures)
    untaught["method"]["sana"]["text_encoder"] = None
    with pytest.raises(UserError, match=r"method\.sana\.text_encoder: missing"):
        make(tmp_path, untaught, "never")
