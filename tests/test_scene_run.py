"""Text to 3D from the command line: all stages, killed and resumed, from folders of diffusers, and mistakes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.utils import save_image

from distill.build import scene as build_scene
from distill.methods.scene_distillation import SceneDistillation
from distill.preview import Preview
from distill.run import build, check_same_run, dry_run
from distill.run import train as train_here
from distill.settings import Config, check, parse, write_config
from distill.settings import SceneDistillation as Settings
from distill.trainer import Trainer
from eval.scene import Options
from models.condition import Condition
from models.errors import UserError
from models.scene.captions import VOCABULARY
from models.scene.memory import SHARE, rendering_bytes
from models.scene.particles import Fields
from models.scene.saved import SceneSpec
from models.teachers.sana import SanaSpec
from tests import families
from tests.tiny import ROOT, environment, save_sana, train

STAGES: list[dict[str, Any]] = [
    {"name": "volume", "kind": "volume", "share": 0.5, "samples": 8, "resolutions": [[0.0, 8], [0.5, 16]]},
    {"name": "geometry", "kind": "geometry", "share": 0.25, "fake": "noise", "picture": "normals", "tetrahedra": 8},
    {"name": "texture", "kind": "texture", "share": 0.25, "picture": "shaded"},
]


def values(base: Path, teacher: Path, output: str, **method: Any) -> dict[str, Any]:
    """A short run of three stages."""
    stages = [
        stage | {"matching": {"kind": "diff_instruct", "noise_levels": {"kind": "grid"}, "critic_turns": 1}}
        for stage in STAGES
    ]
    whole = {
        "kind": "scene_distillation",
        "prompt": "a red cube",
        "field": {"side": 8, "channels": 4, "width": 8},
        "blob_strength": 40.0,
        "cameras": {"elevation": [0, 20], "radius": [3.5, 4.5]},
        "stages": stages,
        "export": {"faces": 200, "texture": 64, "frames": 2, "size": 32},
    }
    return {
        "output": str(base / output),
        "data": {"kind": "conditions_only"},
        "teacher": {"path": str(teacher), "guidance": 2.0},
        "method": whole | method,
        "student": {"lr": 1e-3, "beta1": 0.9, "eps": 1e-6},
        "critic": {"lr": 1e-3},
        "train": {
            "steps": 40,
            "batch_size": 2,
            "mixed_precision": "no",
            "cpu_threads": 1,
            "log_every": 2,
            "sample_every": 100,
            "checkpoint_every": 2,
            "ema_decay": 0.5,
        },
    }


def write(base: Path, teacher: Path, output: str, **method: Any) -> Path:
    path = base / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values(base, teacher, output, **method)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    save_sana(folder / "teacher")
    done = train("--config", write(folder, folder / "teacher", "whole"), "--prompt", "a red cube")
    assert done.returncode == 0, done.stderr
    return folder


def trainer_of(config: Config, stage: int = 0) -> Trainer:
    """Of one stage, with nothing on disk but the folder."""
    assert isinstance(config.method, Settings)
    run = build_scene.runs(config, config.method)[stage]
    run.output.mkdir(parents=True, exist_ok=True)
    return build(run)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's networks."""
    last = max(run.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    found = {}
    for path in sorted(last.glob("*/*.safetensors")):
        found |= {f"{path.parent.name}/{path.stem}/{key}": value for key, value in load_file(path).items()}
    return found


def test_one_command_makes_all_files(base: Path):
    scene = base / "whole/a-red-cube"
    names = {path.name for path in (scene / "student").rglob("*") if path.is_file()}
    assert {"model.glb", "model.obj", "model.ply", "turntable.mp4", "sheet.png"} <= names
    for stage, steps in (("volume", 20), ("geometry", 10), ("texture", 10)):
        lines = [json.loads(line) for line in (scene / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == steps and lines[-1]["skipped_steps"] == 0
        assert ("critic_loss" in lines[-1]) == (stage != "geometry")
    before = tensors(scene / "volume")
    assert int(before["student/model/occupancy.0.updates"]) == 1  # after 16 steps
    assert sum(".adapter." in key for key in before) == 32


def test_the_card_says_what_a_scene_is(base: Path):
    card = (base / "whole/a-red-cube/texture/student/README.md").read_text()
    assert "# Scene distilled from" in card and "one-step" not in card and "diffusers" not in card.partition("\n---")[0]
    assert "```bash\npython -m models.scene.export PATH OUT\n```" in card and "- text-to-3d" in card.replace("[", "- ")


def test_a_run_is_judged_from_its_folder(base: Path):
    """Its critics against the exact scores, its file against its particle, a page."""
    folder = base / "whole/a-red-cube"
    Options((folder,), output=base / "report").run()
    (found,) = json.loads((base / "report/report.json").read_text())["scenes"]
    assert list(found["fake_score"]) == ["volume", "texture"]  # the geometry stage has no critic
    for bins in found["fake_score"].values():
        assert all(0 < row["relative"] < 2 and row["relative"] != 1 for row in bins)
    assert found["glb_psnr"] > 20 and found["prompt"] == "a red cube" and (base / "report/report.html").is_file()


def test_the_files_are_uploaded_once_and_no_stage(base: Path, monkeypatch: pytest.MonkeyPatch):
    made = yaml.safe_load((base / "whole.yaml").read_text()) | {"push_to_hub": "somebody/scene"}
    config = check(made, "test")
    assert isinstance(config.method, Settings)
    assert {run.push_to_hub for run in build_scene.runs(config, config.method)} == {None}
    uploaded: list[tuple[Path, str]] = []
    monkeypatch.setattr("distill.run.check_token", lambda repo: None)
    monkeypatch.setattr("distill.run.upload", lambda folder, repo: uploaded.append((folder, repo)))
    assert train_here(config) == 0
    assert uploaded == [(base / "whole/a-red-cube/student", "somebody/scene")]
    assert "license:" in (base / "whole/a-red-cube/student/README.md").read_text()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.kind", {"data": {"kind": "precomputed", "path": "anywhere"}}),
        ("teacher.cache", {"teacher": {"path": "anything", "cache": "anywhere"}}),
        ("lora", {"lora": {"rank": 8}}),
        ("evaluation.num_images", {"evaluation": {"num_images": 100}}),
    ],
)
def test_settings_that_scenes_have_no_use_for_are_named(key: str, change: dict[str, Any], tmp_path: Path):
    config = check(values(tmp_path, tmp_path / "teacher", "run") | change, "test")
    with pytest.raises(UserError, match=f"^{key}: "):
        train_here(config)


def test_a_sample_grid_is_seen_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By whoever looks while it is written."""
    seen: list[list[str]] = []

    def save(grid: torch.Tensor, path: Path, format: str) -> None:
        save_image(grid, path, format=format)
        seen.append([file.name for file in tmp_path.glob("step-*.png")])

    monkeypatch.setattr("distill.preview.save_image", save)
    spec: Any = SimpleNamespace(shape=(3, 8, 8), preview=lambda count: Condition(), decode=lambda x0: x0)
    method: Any = SimpleNamespace(reference=lambda z, cond, steps: None, sample=lambda z, cond: z)
    Preview(tmp_path, spec, 1, torch.device("cpu")).draw(method, 3)
    assert seen == [[]] and [file.name for file in tmp_path.iterdir()] == ["step-000003.png"]


KILLED = """
import os, signal, sys
from distill.train import main
from distill.trainer import Trainer

stage, step, whole = sys.argv.pop(1), int(sys.argv.pop(1)), Trainer.turn

def turn(trainer, kind, index):
    if trainer.config.output.name == stage and trainer.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(trainer, kind, index)

Trainer.turn = turn
sys.exit(main())
"""
"""``distill/train.py`` that does not survive a step of a stage."""


def test_killed_and_resumed_it_ends_the_same(base: Path):
    """SIGKILL in every stage, between two checkpoints, in the volume stage after it has marked empty cells; the same
    command goes on, bit for bit, to the same files."""
    config, run = write(base, base / "teacher", "killed"), base / "killed/a-red-cube"
    for stage, step in (("volume", 19), ("geometry", 3), ("texture", 5)):
        line = [sys.executable, "-c", KILLED, stage, str(step), "--config", str(config)]
        done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (run / stage / f"checkpoints/step-{step - 1}").is_dir() and not (run / stage / "student").exists()
    again = train("--config", config)
    assert again.returncode == 0, again.stderr
    for stage in ("volume", "geometry", "texture"):
        first, second = tensors(run / stage), tensors(base / "whole/a-red-cube" / stage)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items()), stage
        name = "metrics.jsonl"
        assert (run / stage / name).read_text() == (base / "whole/a-red-cube" / stage / name).read_text()
    model = "student/model.glb"
    assert (run / model).read_bytes() == (base / "whole/a-red-cube" / model).read_bytes()


def test_the_same_path_from_a_stable_diffusion_folder(base: Path, tmp_path: Path):
    """Another class of network and autoencoder: noise prediction in a discrete process, through the VAE's encoder."""
    teacher = families.save(tmp_path / "sd", "stable_diffusion")
    done = train("--config", write(tmp_path, teacher, "run"), "--method.only", "volume")
    assert done.returncode == 0, done.stderr
    scene = tmp_path / "run/a-red-cube"
    assert (scene / "student/model.glb").is_file()
    moved = tensors(scene / "volume")
    ups = [value for key, value in moved.items() if "lora_B" in key]
    assert ups and all(bool(value.abs().sum() > 0) for value in ups)


def test_a_dry_run_rehearses_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each at its largest size, with as many samples a ray as fit; nothing is left on disk."""
    teacher = families.save(tmp_path / "sd", "stable_diffusion")
    stages = [STAGES[0] | {"samples": 40, "resolutions": [[0.0, 8], [0.1, 16], [0.9, 8]]}, *STAGES[1:]]
    made = values(tmp_path, teacher, "dry", stages=stages)
    made["train"]["batch_size"] = 1
    config = check(made, "test")
    assert isinstance(config.method, Settings)
    field = build_scene.scene_of(config.method).field
    free = rendering_bytes(field, 1, 16, 21) / SHARE  # of 40 samples that 21 do
    monkeypatch.setattr(build_scene, "free_bytes", lambda device: int(free) + 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = {path for path in tmp_path.rglob("*")}
    assert dry_run(config) == 0
    assert {path for path in tmp_path.rglob("*")} == before
    printed = capsys.readouterr().out
    assert "21 samples a ray in the place of 40" in printed
    found = json.loads(printed[printed.index("\n{") :])
    assert {name: stage["size"] for name, stage in found["stages"].items()} == {
        "volume": 16, "geometry": 64, "texture": 64
    }  # fmt: skip
    assert found["samples_per_ray"] == found["stages"]["volume"]["samples_per_ray"] == 21
    assert found["peak_gib"] == max(stage["measured_peak_gib"] for stage in found["stages"].values()) > 0
    for stage in found["stages"].values():  # views of one alone are tried, and foretell what they take
        assert stage["seconds_per_student_turn"] > 0 and stage["largest_micro_batch"] > 1
        assert stage["memory_gib"]["total"] == pytest.approx(stage["measured_peak_gib"], rel=0.15)
    assert ("critic" in found["stages"]["texture"]["parameters"]) and "critic" not in found["stages"]["geometry"][
        "parameters"
    ]
    assert found["hours"] == pytest.approx(sum(stage["hours"] for stage in found["stages"].values()), abs=1e-3)


@pytest.mark.parametrize("kind", ["f_distill", "sim", "uni_instruct"])
def test_other_rows_of_the_table_make_scenes_too(base: Path, kind: str):
    """The discriminator's reals are the teacher's samples; it and the critic are trained."""
    matching: dict[str, Any] = {"kind": kind, "noise_levels": {"kind": "grid"}, "critic_turns": 1}
    if kind != "sim":
        matching["gan"] = {"taps": ["transformer.transformer_blocks.1"], "width": 8, "weight": 0.0}
    config = Config.model_validate(values(base, base / "teacher", kind))
    assert isinstance(config.method, Settings)
    stage = config.method.stages[0].model_copy(update={"share": 1.0})
    stage = type(stage).model_validate(stage.model_dump() | {"matching": matching})
    method = config.method.model_copy(update={"stages": [stage], "stage": "volume"})
    config = config.model_copy(update={"method": method, "output": base / kind})
    trainer = build(config)
    trainer.config.output.mkdir()
    before = {key: value.clone() for key, value in trainer.bare["student"].state_dict().items()}
    trainer.run_step()
    after = trainer.bare["student"].state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    assert ("discriminator" in trainer.bare) == (kind != "sim") and int(trainer.bad_steps[2]) == 0


def test_a_second_volume_stage_goes_on_with_its_own_samples(base: Path):
    """What fits at its size is what its rays have, whatever the stage before had."""
    config, _ = parse(["--config", str(write(base, base / "teacher", "whole"))])
    assert isinstance(config.method, Settings)
    volume, *_ = config.method.stages
    refine = volume.model_copy(update={"name": "refine", "samples": volume.samples + 3})
    plan = build_scene.runs(config, config.method.model_copy(update={"stages": [volume, refine]}))
    assert isinstance(plan[1].method, Settings) and plan[1].method.start == base / "whole/a-red-cube/volume"
    method, spec = build_scene.build_stage(plan[1], plan[1].method)
    assert isinstance(method, SceneDistillation) and isinstance(method.generator, Fields)
    assert isinstance(spec, SceneSpec) and spec.scene.samples == method.generator.samples == volume.samples + 3


def test_prompt_is_short_for_its_key_and_folders_are_short(base: Path):
    path = write(base, base / "teacher", "named")
    config, _ = parse(["--config", str(path), "--prompt", "A very, very  Blue Torus!"])
    assert isinstance(config.method, Settings) and config.method.prompt == "A very, very  Blue Torus!"
    assert build_scene.folder(config).name == "a-very-very-blue-torus"
    assert len(build_scene.slug("x" * 500)) <= 48
    plan = build_scene.runs(config, config.method)
    assert [run.train.steps for run in plan] == [20, 10, 10]
    assert [run.output.name for run in plan] == ["volume", "geometry", "texture"]
    *kept, last = config.method.stages
    later = config.method.model_copy(update={"stages": [*kept, last.model_copy(update={"guidance": 3.0})]})
    assert build_scene.runs(config, later)[:2] == plan[:2]  # what comes later changes nothing for the stages before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": STAGES[1:]}, "first those of kind volume, one or more"),
        ({"stages": [STAGES[0], STAGES[2] | {"share": 0.25}, STAGES[1]]}, "at most one of kind geometry"),
        ({"stages": [STAGES[0] | {"share": 1.0, "latents": 0.0}]}, "one of them must be above 0"),
        ({"only": "mesh"}, "there is no stage mesh"),
        ({"template": "a photo"}, "write {} once"),
        ({"cameras": {"elevation": [20, 10]}}, "elevation: 20 to 10 is no range"),
        (
            {"stages": [STAGES[0] | {"share": 1.0, "fake": "exact", "matching": {"kind": "sid"}}]},
            "a trained critic",
        ),
        ({"stages": [STAGES[0]]}, "do not make 1"),
        (
            {"stages": [STAGES[0] | {"share": 1.0, "weights": {"creases": 1.0}}]},
            "weights.creases: a stage of kind volume",
        ),
        (
            {"stages": [STAGES[0], STAGES[1] | {"weights": {"entropy": 1.0}}]},
            "weights.entropy: a stage of kind geometry",
        ),
        ({"stages": [*STAGES[:2], STAGES[2] | {"weights": {"normals": 1.0}}]}, "weights.normals: .* kind texture"),
        ({"stages": [*STAGES[:2], STAGES[2] | {"picture": "normals"}]}, "picture: normals show no texture"),
    ],
)
def test_settings_that_contradict_are_named(base: Path, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        parse(["--config", str(write(base, base / "teacher", "wrong", **change))])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("start", "anywhere"),
        ("sigma_init", 1.0),
        ("clip_samples", True),
        ("student_steps", 2),
        ("reuse_samples", False),
        ("regression", {"path": "pairs.pt"}),
    ],
)
def test_what_a_matching_has_no_use_for_in_scenes_is_named(key: str, value: Any, tmp_path: Path):
    made = values(tmp_path, tmp_path / "teacher", "run")
    made["method"]["stages"][0]["matching"][key] = value
    with pytest.raises(UserError, match=rf"matching\.{key}: .* remove the key"):
        check(made, "test")


def test_what_a_run_is_does_not_depend_on_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Named by a relative path, by an absolute one, or moved; its files may be wanted of another size."""

    def geometry(output: Path | str, **export: float) -> Config:
        config = check(values(Path(output), tmp_path / "teacher", "run", export=export), "test")
        assert isinstance(config.method, Settings)
        return build_scene.runs(config, config.method)[1]

    monkeypatch.chdir(tmp_path)
    first = geometry("here")
    first.output.mkdir(parents=True)
    write_config(first, first.output / "config.yaml")
    check_same_run(geometry(tmp_path / "here", faces=300, texture=128, frames=3, size=64))
    (tmp_path / "here").rename(tmp_path / "there")
    check_same_run(geometry("there"))
    with pytest.raises(UserError, match=r"method\.export\.threshold"):
        check_same_run(geometry("there", threshold=3.0))
    moved = geometry("there")
    other = moved.model_copy(update={"method": moved.method.model_copy(update={"start": tmp_path / "elsewhere"})})
    with pytest.raises(UserError, match=r"method\.start"):
        check_same_run(other)


def test_unknown_words_are_named(base: Path):
    done = train("--config", write(base, base / "teacher", "words"), "--prompt", "a crimson cube")
    assert done.returncode == 2 and "crimson" in done.stderr and "Traceback" not in done.stderr


def test_unknown_words_for_views_are_named(base: Path):
    known = [word for word in VOCABULARY if word not in ("seen", "from", "0", "degrees")]
    teacher = save_sana(base / "knows-no-views", vocabulary=known)
    method = {"cameras": {"elevation": [0, 20], "view_words": "degrees"}, "stage": "volume"}
    config = Config.model_validate(values(base, teacher, "views", **method))
    with pytest.raises(UserError, match=r"method\.cameras\.view_words: .* words: seen, from, 0, degrees"):
        build_scene.build_stage(config, config.method)  # type: ignore[arg-type]


def test_a_critic_of_other_latents_is_refused(base: Path, tmp_path: Path):
    """Whose shape is the same; a network of another size in the same ones may be adapted."""
    for name, seed, depth in (("deeper", 0, 3), ("other", 1, 2)):
        save_sana(tmp_path / name, depth=depth, seed=seed)
        config = check(values(tmp_path, base / "teacher", name, critic={"path": str(tmp_path / name)}), "test")
        assert isinstance(config.method, Settings)
        run = build_scene.runs(config, config.method)[0]
        if name == "other":
            with pytest.raises(UserError, match=r"method\.critic\.path: .*other latents"):
                build_scene.build_stage(run, run.method)  # type: ignore[arg-type]
        else:
            build_scene.build_stage(run, run.method)  # type: ignore[arg-type]


def test_a_stage_cannot_guide_a_distilled_teacher(base: Path, monkeypatch: pytest.MonkeyPatch):
    made = values(base, base / "teacher", "guided")
    made["teacher"]["guidance"], made["method"]["stages"][0]["guidance"] = 1.0, 3.0
    monkeypatch.setattr(SanaSpec, "guidable", False)
    with pytest.raises(UserError, match=r"^method\.stages\.volume\.guidance: .*give 1$"):
        trainer_of(check(made, "test"))


def test_what_the_files_need_is_said_before_training(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    config, _ = parse(["--config", str(write(base, base / "teacher", "unready"))])
    with pytest.raises(UserError, match=r"imageio_ffmpeg: pip install -e '\.\[scene\]'"):
        train_here(config)
    assert not (base / "unready").exists()


def test_a_later_stage_alone_says_what_is_missing(base: Path):
    done = train("--config", write(base, base / "teacher", "alone"), "--method.only", "geometry")
    assert done.returncode == 2 and "holds no scene" in done.stderr
