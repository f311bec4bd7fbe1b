"""The app without a browser: settings, files, runs, models, and the API under friendly and hostile calls."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import tyro
from PIL import Image, PngImagePlugin

from models.errors import UserError
from models.multi_student import assemble
from models.seeds import Draws
from tests.tiny import NAMES, ROOT, environment, save_network

gradio = pytest.importorskip("gradio", reason="the app's packages are not installed: pip install -e '.[app]'")

import httpx  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

from app import __main__ as command  # noqa: E402
from app import files, scenes, studio  # noqa: E402
from app.ask import MAX_PROMPT, MAX_SEED, Ask  # noqa: E402
from app.engine import Engine  # noqa: E402
from app.library import Library, inside, matching  # noqa: E402
from app.networks import Walk  # noqa: E402
from app.scores import scores  # noqa: E402

SPRINT, CONTROL, CLASSES = "embedded:solids_sprint", "embedded:solids_control", "embedded:fashion_mnist"
SIDE = 128
"""Of SPRINT's pictures."""
CUBE = "a photo of a red cube"


def save_run(run: Path, steps: int = 3) -> Path:
    """A run as the trainer leaves it, with curves, samples, a report and several students."""
    (run / "samples").mkdir(parents=True)
    lines = [json.dumps({"step": i, "matching": 1.0 / i, "critic_loss": 0.5}) for i in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "config.yaml").write_text("method: {prompt: a red cube}\ntrain: {steps: 3}\n")
    for step in (0, steps):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("<h1>A report</h1>")
    protocol = {"extractor": "fd_fmnist_cnn", "images": 10}
    (run / "report" / "report.json").write_text(
        json.dumps({"protocol": protocol, "scores": [{"sampler": "student", "fd": 1.5}]})
    )
    students = [save_network(run / f"one-{k}", 2.5, k, classes=4) for k in range(2)]
    assemble(run / "student", students, [0, 0, 1, 1], "A card.")
    for student in students:
        shutil.rmtree(student)
    return run


def save_mesh(path: Path) -> Path:
    """A red cube as binary glTF 2.0."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    faces = "013032 467475 045051 237276 026064 157173"
    index = np.array([int(c) for c in faces if c != " "], np.uint16).tobytes()
    data = index + corners.tobytes()
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 1}, "indices": 0, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorFactor": [0.9, 0.2, 0.1, 1]}, "doubleSided": True}],
        "buffers": [{"byteLength": len(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(index)},
            {"buffer": 0, "byteOffset": len(index), "byteLength": len(data) - len(index)},
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5123, "count": 36, "type": "SCALAR"},
            {"bufferView": 1, "componentType": 5126, "count": 8, "type": "VEC3", "min": [-1] * 3, "max": [1] * 3},
        ],
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunk = lambda kind, content: len(content).to_bytes(4, "little") + kind + content
    chunks = chunk(b"JSON", text) + chunk(b"BIN\0", data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little") + chunks)
    return path


# ----------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a" * 10**6}, "prompt: 1,000,000 characters are too many; 1,000 are the most"),
        ({"prompt": "a\x00b"}, "control character U\\+0000"),
        ({"prompt": "a\x1b[31mb"}, "control character U\\+001B"),
        ({"prompt": "a\ud800"}, "control character U\\+D800"),
        ({"prompt": ["a"]}, "prompt: a text is needed, not list"),
        ({"seed": -1}, "seed: -1 is not from 0 to 4294967295"),
        ({"seed": MAX_SEED + 1}, "seed: 4294967296 is not from"),
        ({"seed": math.nan}, "seed: nan is not a whole number"),
        ({"seed": True}, "seed: True is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"steps": 0}, "steps: 0 is not from 1 to 100"),
        ({"steps": math.inf}, "steps: inf is not a whole number"),
        ({"steps": "9" * 5000}, "steps: 9{60}\\.\\.\\. is not a whole number"),
        ({"count": 17}, "count: 17 is not from 1 to 16"),
        ({"guidance": math.nan}, "guidance: nan is not a number from 0 to 30"),
        ({"walk": math.nan}, "walk: nan is not a number from 0 to 1"),
        ({"walk": 1.01}, "walk: 1.01 is not a number"),
        ({"other_seed": None}, "other_seed: None is not a whole number"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as raised:
        Ask.checked(**({"model": "m", "prompt": "p"} | change))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_settings_are_cleaned_and_survive_their_text():
    ask = Ask.checked("m", "  a\tred\n cube é 立方体 ", 3.0, 2, 4, 3.5, 9, 0.25)
    assert ask.prompt == "a red cube é 立方体" and ask.seed == 3 and isinstance(ask.seed, int)
    assert Ask.from_json(ask.as_json()) == ask
    assert len(Ask.checked("m", "x" * MAX_PROMPT).prompt) == MAX_PROMPT


@pytest.mark.parametrize(
    "written", ["", "[]", "{}", "nonsense", "[" * 100_000, '{"model": "m"}', '{"model": 1, "prompt": "p"}']
)
def test_text_that_is_no_settings_is_refused(written: str):
    with pytest.raises(UserError):
        Ask.from_json(written)


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_settings_travel_in_the_file(tmp_path: Path, kind: files.Format):
    ask = Ask("m", 'a cube, ünïcode 立方体 "quoted"', 7, 2, 4)
    picture = files.mosaic(torch.arange(3 * 64).view(1, 3, 8, 8).to(torch.uint8))
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(files.encode(picture, ask.as_json(), kind))
    assert files.read_settings(str(path)) == ask
    if kind == "png":
        assert np.array_equal(np.array(Image.open(path)), np.array(picture))


def test_mosaic_puts_pictures_row_by_row():
    pictures = torch.stack([torch.full((1, 2, 3), k, dtype=torch.uint8) for k in range(1, 6)])
    whole = np.array(files.mosaic(pictures))[..., 0]
    assert whole.shape == (4, 9)
    assert whole[0, ::3].tolist() == [1, 2, 3] and whole[2, ::3].tolist() == [4, 5, 0]


def bomb(path: Path, side: int) -> Path:
    """A small PNG that says it has ``side`` x ``side`` pixels."""
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    return path


def hostile_uploads(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no good, with what is said of them."""
    plain, cut, texts = folder / "a.png", folder / "cut.png", folder / "texts.png"
    plain.write_text("#!/bin/sh\nrm -rf /")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    cut.write_bytes(buffer.getvalue()[:600])
    info = PngImagePlugin.PngInfo()
    info.add_text(files.KEY, '{"model": "../../etc/passwd", "prompt": "\\u0000"}')
    Image.new("RGB", (8, 8)).save(texts, pnginfo=info)
    (folder / "empty.png").write_bytes(b"")
    (folder / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    return {
        "script": (plain, "cannot be read as a picture"),
        "empty": (folder / "empty.png", "cannot be read as a picture"),
        "svg": (folder / "vector.svg", "cannot be read as a picture"),
        "bomb": (bomb(folder / "bomb.png", 30_000), "pixels; 50 million are the most"),
        "smaller bomb": (bomb(folder / "bomb2.png", 9_000), "pixels; 50 million are the most"),
        "cut": (cut, "damaged: it cannot be read to its end"),
        "texts": (texts, "control character"),
    }


def test_uploads_that_are_no_good_are_refused(tmp_path: Path):
    for name, (path, message) in hostile_uploads(tmp_path).items():
        read = files.read_settings if name == "texts" else lambda p: files.read_photograph(p, 64)
        with pytest.raises(UserError, match=message):
            read(str(path))
    with pytest.raises(UserError, match="carries no settings"):
        files.read_settings(str(tmp_path / "cut.png"))
    with pytest.raises(UserError, match="is not there any more"):
        files.read_settings(str(tmp_path / "missing.png"))


def test_only_the_latest_files_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MOST_FILES", len(files._served) + 2)
    made = [Path(files.serve(b"x", "x.png")) for _ in range(3)]
    made += [Path(files.serve(b"y", "x.png"))]
    assert made[-1].read_bytes() == b"y" and sum(path.is_file() for path in made) >= 2
    assert len(files._served) == files.MOST_FILES


def test_a_file_is_copied_once_until_it_changes(tmp_path: Path):
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"one")
    copy = scenes.copied(path)
    assert copy and scenes.copied(path) == copy and Path(copy).read_bytes() == b"one"
    path.write_bytes(b"another")
    changed = scenes.copied(path)
    assert changed and changed != copy and Path(changed).read_bytes() == b"another"
    Path(changed).unlink()  # as Gradio does in time
    anew = scenes.copied(path)
    assert anew and anew == scenes.copied(path) and Path(anew).read_bytes() == b"another"


def test_only_so_many_bytes_of_the_most_recently_used_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_served", OrderedDict())
    monkeypatch.setattr(files, "MOST_SERVED", 10)
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"mesh")
    copy, other = scenes.copied(path), files.serve(b"other", "x.png")
    assert copy and scenes.copied(path) == copy
    files.serve(b"third", "x.png")
    assert Path(copy).is_file() and not Path(other).is_file()
    large = files.serve(b"larger than all", "x.png")
    assert Path(large).is_file() and len(files._served) == 1


# --------------------------------------------------------------------------------------------------------- runs


def test_library_lists_runs_and_nothing_else(tmp_path: Path):
    save_run(tmp_path / "runs" / "world" / "a")
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.yaml").write_text("a: 1")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    library = Library([tmp_path / "runs"])
    assert list(library.runs()) == ["runs/world/a"]
    for name in ("../secret", "runs/../secret", "/etc", "runs/no-run", "runs/link", "", None, 3, "runs/world/a/"):
        with pytest.raises(UserError, match="there is no run"):
            library.run(name)
    assert list(Library([tmp_path / "runs" / "world" / "a"]).runs()) == ["a"]


def test_scenes_are_found_wherever_their_files_lie(tmp_path: Path):
    save_mesh(tmp_path / "a" / "mesh" / "mesh.glb")
    save_mesh(tmp_path / "deep" / "a-red-cube" / "student" / "model.glb")
    for stage, prompt in (("volume", "a red cube"), ("geometry", "a red cube")):
        (tmp_path / "deep" / "a-red-cube" / stage).mkdir()
        (tmp_path / "deep" / "a-red-cube" / stage / "config.yaml").write_text(f"method: {{prompt: {prompt}}}\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "turntable.mp4").write_bytes(b"")
    library, root = Library([tmp_path]), tmp_path.name
    assert set(library.scenes()) == {f"{root}/a", f"{root}/deep/a-red-cube", f"{root}/b"}
    assert set(library.runs()) == {f"{root}/deep/a-red-cube/volume", f"{root}/deep/a-red-cube/geometry"}
    assert scenes.prompt_of(library.scene(f"{root}/deep/a-red-cube")) == "a red cube"
    assert scenes.mesh_of(library.scene(f"{root}/b")) is None


def test_progress_is_that_of_the_stage_that_wrote_last(tmp_path: Path):
    assert scenes.progress(tmp_path) == "starting" and scenes.newest_sample(tmp_path) is None
    for stage, steps, age in (("volume", 7, 100), ("geometry", 3, 0)):
        run = save_run(tmp_path / "a-red-cube" / stage, steps)
        (run / "samples" / "step-000000.png").unlink()
        for path in (run / "metrics.jsonl", *(run / "samples").iterdir()):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert scenes.progress(tmp_path) == "geometry: step 3 of 3"
    assert scenes.newest_sample(tmp_path) == tmp_path / "a-red-cube" / "geometry" / "samples" / "step-000003.png"


def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "CONFIG", "configs/solids/teacher.yaml")  # which takes no prompt
    with pytest.raises(UserError, match=r"the training ended with status 2: .*prompt"):
        list(scenes.train("a red cube", Library([tmp_path])))
    with pytest.raises(UserError, match="there is no folder for runs"):
        list(scenes.train("a red cube", Library([])))
    with pytest.raises(UserError, match="control character"):
        list(scenes.train("a\x00", Library([tmp_path])))


TRAINING = """
import pathlib, signal, sys
log = pathlib.Path(sys.argv[-1].removeprefix("--output=")) / "log"
log.parent.mkdir(parents=True, exist_ok=True)

def save(*_):
    with log.open("a") as file:
        file.write("saved ")
    sys.exit()

signal.signal(signal.SIGTERM, save)
signal.alarm(120)  # no longer than its test
with log.open("a") as file:
    file.write("started ")
while True:
    signal.pause()
"""
"""A stand-in for distill/train.py, which tells what happens to it."""


def save_training(root: Path) -> Path:
    """A copy of the studio that trains no scene, but waits to be stopped."""
    for name, text in (("distill/train.py", TRAINING), (scenes.CONFIG, "")):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    return root


def test_a_training_is_stopped_and_saved_when_nobody_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "ROOT", save_training(tmp_path / "studio"))
    monkeypatch.setattr(scenes, "LOOK_EVERY", 0.01)
    log = tmp_path / "runs" / "scenes" / "log"
    lines = scenes.train("a red cube", Library([tmp_path / "runs"]))
    assert next(lines)[0] == "starting"
    while not log.is_file() or log.read_text() != "started ":
        next(lines)
    lines.close()
    assert log.read_text() == "started saved "


def test_nothing_outside_a_run_is_read(tmp_path: Path):
    run = save_run(tmp_path / "run").resolve()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "samples" / "step-000009.png").symlink_to(tmp_path / "secret.png")
    assert inside(run, "..", "secret.png") is None and inside(run, "/etc/passwd") is None
    assert inside(run, "samples", "step-000009.png") is None and inside(run, "config.yaml") == run / "config.yaml"
    assert [path.name for path in matching(run, "samples/*.png")] == ["step-000000.png", "step-000003.png"]


def test_scores_come_from_reports_and_damaged_ones_say_nothing(tmp_path: Path):
    run = save_run(tmp_path / "run")
    assert scores(run / "student") == [("student (fd_fmnist_cnn, 10 pictures)", "1.500")]
    (run / "report" / "report.json").write_text('{"protocol": 3}')
    (run / "geneval").mkdir()
    (run / "geneval" / "geneval.json").write_text('{"name": "g", "scores": {"student, 1 step": {"score": 0.5}}}')
    assert scores(run / "student") == [("student, 1 step (g)", "50.0 %")]


def test_samples_follow_the_newest_step_where_it_was_shown(tmp_path: Path):
    def add(run: Path, *steps: int) -> None:
        for step in steps:
            (run / "samples" / f"step-{step:06d}.png").write_bytes(b"")

    one, other = save_run(tmp_path / "one", 200), save_run(tmp_path / "other", 200)
    add(other, 900_000)
    shown = runs_tab(Engine(Library([one, other])))
    assert shown("choose_runs", ["one"]).step == 200
    assert shown("choose_runs", ["other"]).step == 900_000  # another run, though it has the step as well
    assert shown("choose_step", 200).step == 200
    add(other, 1_000_000)
    assert shown("again").step == 200
    assert shown("choose_step", 900_000).step == 900_000  # the second newest
    add(other, 1_000_100)
    assert shown("again").step == 900_000
    assert shown("choose_step", 1_000_100).step == 1_000_100
    add(other, 1_000_200)
    assert shown("choose_series", "critic_loss").step == 1_000_200  # whatever the page shows as yet
    add(other, 1_000_300)
    assert shown("again").step == 1_000_300 and shown("choose_runs", ["other", "one"]).step == 1_000_300


class Shown(NamedTuple):
    """What the Runs tab shows."""

    runs: list[str]
    series: str | None
    curves: list[str]
    drawing: str
    step: int | None
    report: str


def runs_tab(engine: Engine) -> Callable[..., Shown]:
    """Calls the handlers of a page's Runs tab as the page does: with what was chosen, and what the server keeps."""
    page = studio.build_app(engine)
    handlers: dict[str, Any] = {call.name: call.fn for call in page.fns.values()}
    states: list[Any] = [block for block in page.blocks.values() if isinstance(block, gradio.State)]
    kept = [state.value for state in states]
    view = [value for value in kept if type(value).__name__ == "View"]

    def shown(handler: str, *chosen: Any) -> Shown:
        runs, series, drawing, steps, _, report, _, view[0] = handlers[handler](*chosen, view[0])
        return Shown(runs["value"], series["value"], series["choices"], drawing, steps["value"], report)

    return shown


def test_a_look_that_is_under_way_changes_nothing_that_was_chosen(tmp_path: Path):
    """A curve is chosen while the timer's look, which left the page before, still waits: its answer keeps the curve."""
    run = save_run(tmp_path / "one", 200)
    shown = runs_tab(Engine(Library([run])))
    assert shown("choose_runs", ["one"]).series == "critic_loss"
    assert shown("choose_series", "matching").series == "matching"
    (run / "samples" / "step-000300.png").write_bytes(b"")
    found = shown("again")
    assert (found.series, found.step, found.runs) == ("matching", 300, ["one"])


def test_the_tab_opens_on_the_run_that_is_newest_then(tmp_path: Path):
    old = save_run(tmp_path / "runs" / "old")
    shown = runs_tab(Engine(Library([tmp_path / "runs"])))
    assert shown("opened").runs == ["runs/old"]
    later = old.stat().st_mtime + 100
    new, empty = save_run(tmp_path / "runs" / "new"), tmp_path / "runs" / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("{}")
    for number, path in enumerate([new / "metrics.jsonl", empty / "config.yaml"]):
        os.utime(path, (later + number, later + number))
    assert shown("opened").runs == ["runs/new"]
    assert shown("choose_runs", ["runs/old"]).runs == shown("opened").runs == ["runs/old"]
    assert shown("choose_runs", []).runs == shown("opened").runs == []


def test_a_run_of_several_shows_the_curves_and_samples_of_its_parts(tmp_path: Path):
    run = tmp_path / "runs" / "several"
    for part in ("student-0/tsm", "student-0/dm", "student-1/tsm"):
        save_run(run / part)
    (run / "config.yaml").write_text("method: {kind: multi_student}\n")
    (run / "student-1" / "tsm" / "samples" / "step-000009.png").write_bytes(b"")
    later = run.stat().st_mtime + 100
    os.utime(run / "student-1" / "tsm" / "metrics.jsonl", (later, later))
    shown = runs_tab(Engine(Library([tmp_path / "runs"])))
    found = shown("opened")
    assert found.runs == ["runs/several"] and found.curves == ["critic_loss", "matching"] and found.step == 9
    for part in ("student-0/tsm", "student-0/dm", "student-1/tsm"):
        assert f"runs/several: {part}" in found.drawing
    with (run / "student-0" / "dm" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "matching": 0.01, "new": 0.1}) + "\n")
    assert "new" in shown("again").curves


def test_a_scene_is_sent_to_its_own_judge(tmp_path: Path):
    for name, text, judge in (
        ("scene", "method: {kind: scene_distillation}", "python -m eval.scene"),
        ("solids", "method: {kind: consistency}\ndata: {kind: solids}", "python -m eval.geneval"),
        ("fashion", "method: {kind: f_distill}\ndata: {kind: fashion_mnist}", "python -m eval.fid"),
        ("damaged", "method: [", "python -m eval.fid"),
    ):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(text)
        (run / "metrics.jsonl").write_text('{"step": 1, "matching": 1.0}\n')
        assert judge in runs_tab(Engine(Library([run])))("opened").report


# ------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("app") / "runs"
    save_run(root / "several")
    save_mesh(root / "torus" / "mesh" / "mesh.glb")
    (root / "torus" / "config.yaml").write_text("method: {prompt: a red cube}\n")
    return Engine(Library([root]), max_models=2)


def test_a_picture_depends_on_its_seed_alone(engine: Engine):
    grid = engine.make(Ask(SPRINT, CUBE, 7, 2, 3)).pictures
    assert grid.shape == (3, 3, SIDE, SIDE) and grid.dtype == torch.uint8
    for k in range(3):
        alone = engine.make(Ask(SPRINT, CUBE, 7 + k, 2)).pictures[0]
        assert (alone.int() - grid[k].int()).abs().max() <= 1  # batches of other sizes may round otherwise
    assert not torch.equal(grid[0], grid[1])


def test_the_walk_starts_and_ends_at_the_seeds_and_stays_normal():
    noise = lambda t: Walk([1], [2], t).normal(200, 100)
    assert torch.equal(noise(0.0), Draws([1]).normal(200, 100))
    assert torch.allclose(noise(1.0), Draws([2]).normal(200, 100), atol=1e-6)
    assert abs(float(noise(0.3).std()) - 1) < 0.02


def test_the_engine_holds_so_many_models_and_reads_a_new_export(tmp_path: Path):
    folder = save_network(tmp_path / "a" / "student", 2.5, 0)
    (tmp_path / "a" / "config.yaml").write_text("")
    engine = Engine(Library([tmp_path]), [str(save_network(tmp_path / "named", 2.5, 1))], max_models=2)
    run = f"{tmp_path.name}/a"
    assert engine.names()[0] == "named" and run in engine.names() and engine.loaded() == []
    for name in ("named", run, CLASSES):
        engine.make(Ask(name, "bag"))
    assert engine.loaded() == [run, CLASSES]
    before = engine.make(Ask(run, "bag")).pictures
    save_network(folder, 2.5, 5)
    assert not torch.equal(before, engine.make(Ask(run, "bag")).pictures)


def test_damaged_and_removed_models_are_a_line(tmp_path: Path):
    run = save_run(tmp_path / "run")
    engine = Engine(Library([tmp_path]))
    name = f"{tmp_path.name}/run"
    weights = run / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        engine.make(Ask(name, NAMES[0]))
    (run / "student" / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        engine.make(Ask(name, NAMES[0]))
    shutil.rmtree(run)
    with pytest.raises(UserError, match="there is no model"):
        engine.make(Ask(name, NAMES[0]))
    assert engine.make(Ask(SPRINT, CUBE)).pictures.shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask("../../etc", CUBE), "there is no model"),
        (Ask(SPRINT, ""), "prompt: it is empty"),
        (Ask(SPRINT, CUBE, steps=5), "steps: this student makes 1 to 4 steps, not 5"),
        (Ask("embedded:solids", CUBE, steps=51), "this teacher makes 1 to 50 steps"),
        (Ask(CLASSES, "dragon", steps=1), "'dragon' is none: T-shirt, trouser"),
    ],
)
def test_what_a_model_does_not_take_is_a_line(engine: Engine, ask: Ask, message: str):
    with pytest.raises(UserError, match=message):
        engine.make(ask)


def test_unknown_words_are_named_and_lines_change_the_picture(engine: Engine):
    assert engine.make(Ask(SPRINT, "a photo of a red dragon")).unknown == ("dragon",)
    lines = torch.full((1, 1, 64, 64), -1.0)
    lines[..., 20:44, [20, 43]] = lines[..., [20, 43], 20:44] = 1
    empty, box = (engine.make(Ask(CONTROL, CUBE), lines=given).pictures for given in (None, lines))
    loose = engine.make(Ask(CONTROL, CUBE), lines=lines, strength=0.0).pictures
    assert not torch.equal(empty, box) and not torch.equal(loose, box)
    with pytest.raises(UserError, match="follows no lines"):
        engine.make(Ask(SPRINT, CUBE), lines=lines)


# ---------------------------------------------------------------------------------------------------------- API


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    page = studio.build_app(engine)
    yield studio.launch(page, queue_size=64)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


def refused(client: Client, message: str, *values: Any, api_name: str, **named: Any) -> None:
    """The call fails with ``message`` in one line, and not with a traceback."""
    with pytest.raises(Exception, match=message) as raised:
        client.predict(*values, api_name=api_name, **named)
    assert "Traceback" not in str(raised.value) and 'File "' not in str(raised.value)


def test_every_function_is_a_documented_endpoint(client: Client):
    described = client.view_api(return_format="dict", print_info=False)
    assert isinstance(described, dict)
    named = described["named_endpoints"]
    wanted = {"/generate", "/settings", "/models", "/compare", "/draw", "/edges", "/students", "/scenes", "/scene"}
    assert set(named) == wanted | {"/runs", "/run", "/sample", "/report"}
    assert all(endpoint["description"] for endpoint in named.values())


def test_generate_answers_with_the_engines_pixels_and_its_settings(client: Client, engine: Engine):
    path, figures = client.predict(SPRINT, CUBE, 11, 2, 4, api_name="/generate")
    made = engine.make(Ask(SPRINT, CUBE, 11, 2, 4))
    assert np.array_equal(np.array(Image.open(path)), np.array(files.mosaic(made.pictures)))
    assert figures["seeds"] == [11, 12, 13, 14] and figures["columns"] == 2 and figures["unknown_words"] == []
    assert client.predict(handle_file(path), api_name="/settings") == figures["settings"]
    jpeg, _ = client.predict(SPRINT, CUBE, 11, format="jpeg", api_name="/generate")
    assert Image.open(jpeg).format == "JPEG" and client.predict(handle_file(jpeg), api_name="/settings")["seed"] == 11


def test_compare_draw_students_scenes_and_runs(client: Client, tmp_path: Path):
    left, right, one, other = client.predict("embedded:solids", SPRINT, CUBE, 2, 1, 5, api_name="/compare")
    assert Image.open(left).size == Image.open(right).size and one["settings"]["steps"] == 2
    assert other["settings"]["seed"] == 5
    photograph = tmp_path / "photo.jpg"
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((100, 150))).astype(np.uint8)).save(photograph)
    edges = client.predict(handle_file(photograph), api_name="/edges")
    drawn, _ = client.predict(CONTROL, CUBE, handle_file(edges), 3, api_name="/draw")
    assert Image.open(drawn).size == (64, 64) and np.array(Image.open(edges)).min() == 0
    several = next(name for name in client.predict(api_name="/models") if name.endswith("several"))
    _, routed = client.predict(several, None, api_name="/students")
    assert routed["students"] == [0, 0, 1, 1] and routed["partition"][1]["classes"] == NAMES[2:4]
    _, alone = client.predict(several, [NAMES[3]], 0, 0, api_name="/students")
    assert alone["students"] == [0]
    (scene,) = client.predict(api_name="/scenes")
    mesh, turntable = client.predict(scene, api_name="/scene")
    assert Path(mesh).read_bytes()[:4] == b"glTF" and turntable is None
    run = next(name for name in client.predict(api_name="/runs") if name.endswith("several"))
    told = client.predict(run, api_name="/run")
    assert told["series"]["matching"][1] == [2, 0.5] and told["samples"] == [0, 3] and told["reports"] == ["report"]
    assert Image.open(client.predict(run, 3, api_name="/sample")).getpixel((0, 0)) == (3, 0, 0)
    assert "A report" in Path(client.predict(run, api_name="/report")).read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((SPRINT, "a" * 10**6), "1,000,000 characters are too many"),
        ((SPRINT, "a\x07b"), "control character U\\+0007"),
        ((SPRINT, {"a": 1}), "prompt: a text is needed"),
        ((SPRINT, CUBE, -1), "seed: -1 is not from"),
        ((SPRINT, CUBE, 10**30), "seed: 10*\\.* is not from|seed: .* is not"),
        ((SPRINT, CUBE, 0, 5), "1 to 4 steps, not 5"),
        ((SPRINT, CUBE, 0, 1, 10**9), "count: 1000000000 is not from 1 to 16"),
        ((SPRINT, CUBE, 0, 1, 1, "lots"), "guidance: lots is not a number"),
        (("../../../etc/passwd", CUBE), "there is no model '../../../etc/passwd'"),
        ((["x"], CUBE), "model: a text is needed"),
        ((SPRINT, CUBE, 0, 1, 1, None, 0, 0, "../x"), "format: ../x is not png, jpeg or auto"),
    ],
)
def test_hostile_settings_are_refused(client: Client, values: tuple[Any, ...], message: str):
    refused(client, message, *values, api_name="/generate")


def test_hostile_names_are_refused(client: Client):
    for name in ("../../etc", "/etc", "runs/several/../../..", "", ["x"], {"a": 1}, "x" * 10**6):
        for endpoint in ("/run", "/report"):
            refused(client, "there is no run", name, api_name=endpoint)
        refused(client, "there is no scene", name, api_name="/scene")
    run = next(name for name in client.predict(api_name="/runs") if name.endswith("several"))
    refused(client, "has no report '../config'", run, "../config", api_name="/report")
    refused(client, "no samples at 1", run, 1, api_name="/sample")
    refused(client, "step: ../0 is not a whole number", run, "../0", api_name="/sample")
    refused(client, "there is no scene", run, api_name="/scene")


def test_hostile_uploads_are_refused(client: Client, tmp_path: Path):
    for name, (path, message) in hostile_uploads(tmp_path).items():
        endpoint = "/settings" if name == "texts" else "/edges"
        refused(client, message, handle_file(path), api_name=endpoint)
        if name not in ("texts", "cut"):
            refused(client, message, CONTROL, CUBE, handle_file(path), api_name="/draw")


def raw(address: str, function: str, data: list[Any]) -> dict[str, Any]:
    """The last message of a call by hand, past every client's checks; NaN goes through as it is."""
    with httpx.Client(base_url=address, timeout=60) as http:
        body = json.dumps({"data": data})
        joined = http.post(f"gradio_api/call/{function}", content=body, headers={"Content-Type": "application/json"})
        if joined.status_code != 200:
            return {"status": joined.status_code, "text": joined.text}
        with http.stream("GET", f"gradio_api/call/{function}/{joined.json()['event_id']}") as answer:
            text = "".join(answer.iter_text())
    return {"status": 200, "text": text}


def test_calls_by_hand_are_refused_in_one_line(address: str, tmp_path: Path):
    nan = raw(address, "generate", [SPRINT, CUBE, math.nan, 1, 1, math.nan, 0, math.nan, "png"])
    assert "seed: nan is not a whole number" in nan["text"]
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in (str(tmp_path / "secret.png"), "/etc/passwd", "../../etc/passwd", "file:///etc/passwd"):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
            said = raw(address, "settings", [{"path": path} | meta])["text"]
            assert "error" in said and "secret" not in said.replace("secret.png", "") and "root:" not in said
            assert "Traceback" not in said
    for data in ([], [None], [{}], [[[]]], ["x" * 10**6]):
        said = raw(address, "settings", data)
        assert "Traceback" not in said["text"] and ("error" in said["text"] or said["status"] != 200)


def test_the_pages_own_calls_stand_hostile_values(address: str, engine: Engine):
    """Those that no client is shown, by their numbers."""
    values: list[Any] = [None, math.nan, -1, "../../etc/passwd", {"path": "/etc/passwd"}, ["x"], "x" * 10**5]
    values += [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
    with httpx.Client(base_url=address, timeout=60, headers={"Content-Type": "application/json"}) as http:
        calls = [call for call in http.get("config").json()["dependencies"] if call["backend_fn"]]
        assert len(calls) > 20
        answered = 0
        for call in calls:
            for number, value in enumerate(values):
                session = f"hostile-{call['id']}-{number}"
                body = {"data": [value] * len(call["inputs"]), "fn_index": call["id"], "session_hash": session}
                joined = http.post("gradio_api/queue/join", content=json.dumps(body | {"event_data": value}))
                said = joined.text
                if joined.status_code == 200:
                    with http.stream("GET", f"gradio_api/queue/data?session_hash={session}") as answer:
                        said += next(line for line in answer.iter_lines() if "process_completed" in line)
                    answered += 1
                assert "Traceback" not in said and "root:" not in said and 'File \\"' not in said
        assert answered > len(calls)
    assert engine.make(Ask(SPRINT, CUBE)).pictures.shape == (1, 3, SIDE, SIDE)


def test_no_file_but_the_apps_own_is_served(address: str, engine: Engine, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    run = engine.library.roots[0][1] / "several"
    wanted = [tmp_path / "secret.txt", Path("/etc/passwd"), run / "config.yaml", ROOT / "pyproject.toml"]
    wanted += [
        ROOT / "models/pretrained/solids/model_index.json",
        Path.home() / ".bashrc",
        files.cache_folder() / ".." / "x",
    ]
    with httpx.Client(base_url=address) as http:
        for path in wanted:
            for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/proxy="):
                for spelt in (str(path), f"{files.cache_folder()}/../../{path}", str(path).replace("/", "%2f")):
                    answer = http.get(f"{route}{spelt}")
                    assert answer.status_code >= 400, (route, spelt)
                    assert "secret" not in answer.text.replace("secret.txt", "") and "root:" not in answer.text
        picture = files.serve(b"mine", "a.png")
        assert http.get(f"gradio_api/file={picture}").content == b"mine"


def test_a_run_that_goes_does_not_stop_the_app(client: Client, engine: Engine):
    root = engine.library.roots[0][1]
    run = save_run(root / "gone")
    name = f"{root.name}/gone"
    assert name in client.predict(api_name="/runs") and client.predict(name, api_name="/run")["samples"] == [0, 3]
    (run / "metrics.jsonl").write_bytes(
        b'\xff\xfe{"step": \n{"step": 1, "matching": NaN}\n{"step": 2, "matching": 0.5}\n'
    )
    (run / "config.yaml").write_bytes(b"\xff\xfe: [")
    (run / "samples" / "step-000003.png").write_bytes(b"no picture")
    told = client.predict(name, api_name="/run")
    assert told["series"] == {"matching": [[2, 0.5]]}
    shutil.rmtree(run)
    refused(client, "there is no run .* it was removed", name, api_name="/run")
    refused(client, "there is no model", name, NAMES[0], api_name="/generate")
    assert Image.open(client.predict(SPRINT, CUBE, api_name="/generate")[0]).size == (SIDE, SIDE)


def test_every_one_of_many_clients_gets_its_own_answer(address: str, engine: Engine):
    made: dict[int, np.ndarray] = {
        seed: np.array(files.mosaic(engine.make(Ask(SPRINT, CUBE, seed)).pictures)) for seed in range(16)
    }
    start = threading.Barrier(8)

    def ask(first: int) -> None:
        own = Client(address, verbose=False)
        start.wait(60)
        for seed in (first, first + 8):
            path, figures = own.predict(SPRINT, CUBE, seed, api_name="/generate")
            assert figures["settings"]["seed"] == seed and files.read_settings(str(path)).seed == seed
            assert np.array_equal(np.array(Image.open(path)), made[seed])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def test_a_full_queue_is_said_politely(engine: Engine):
    page = studio.build_app(engine)
    where = studio.launch(page, queue_size=1)
    client = Client(where, verbose=False)
    with engine._lock:  # no model answers now, so one call runs, one waits, and there is no room for a third
        jobs = [client.submit(SPRINT, CUBE, seed, api_name="/generate") for seed in range(3)]
        wait(jobs, 60, FIRST_COMPLETED)
    said = {seed: str(error) for seed, job in enumerate(jobs) if (error := job.exception(60))}
    answers = {seed: job.result()[1]["settings"]["seed"] for seed, job in enumerate(jobs) if seed not in said}
    page.close(verbose=False)
    assert said and set(said.values()) == {"Queue is full! Please try again."}
    assert answers and all(asked == answered for asked, answered in answers.items())


def test_a_student_of_one_step_alone_opens_the_page_and_has_no_choice_of_steps(tmp_path: Path):
    page = studio.build_app(Engine(Library([]), [str(save_network(tmp_path / "one", 2.5, 0))]))
    steps = {block.elem_id: block for block in page.blocks.values() if isinstance(block, gradio.Slider)}
    assert [steps[name].visible for name in ("steps", "left-steps", "right-steps")] == [False, True, False]


# ----------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "missing"], "--run: there is no folder missing"),
        (["--run", "EMPTY"], "holds no run"),
        (["--student", "missing"], "--student: missing is no run"),
        (["--student", "embedded:missing"], "no embedded teacher 'missing'"),
        (["--port", "99999"], "--port: 99999 is not from 0 to 65535"),
        (["--queue-size", "0"], "--queue-size: 0 is not from 1 to 100000"),
        (["--max-models", "0"], "--max-models: 0 is not from 1 to 100"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: list[str], message: str):
    given = [str(tmp_path) if word == "EMPTY" else word for word in arguments]
    with pytest.raises(UserError, match=message):
        command.main(tyro.cli(command.Options, args=given))


def test_the_command_says_a_mistake_in_one_line():
    line = [sys.executable, "-m", "app", "--run", "missing"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --run: there is no folder missing\n")


def test_it_listens_on_loopback_and_is_not_shared_by_default():
    options = command.Options()
    assert options.host == "127.0.0.1" and options.share is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
