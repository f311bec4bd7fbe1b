"""What a user gets for a mistake: one line that says what to do, exit status 2, nothing lost. And what --help shows."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from distill import train as entry
from distill.run import check_scores
from distill.settings import (
    Config,
    Evaluation,
    Pretrain,
    SceneDistillation,
    ScoreMatching,
    parse,
    read_config,
    write_config,
)
from models.autoencoder import PictureSpec
from models.errors import UserError
from models.teachers.embedded import Spec
from tests.tiny import ROOT, settings, train, write_settings

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    write_settings(folder)
    return folder


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The one line that the entry point prints for these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    assert entry.main() == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and not line.startswith("steps:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    return lines[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student__learning_rate": 1}, "student.learning_rate: unknown key"),
        ({"train__stepz": 1}, "train.stepz: unknown key; did you mean 'train.steps'?"),
        ({"method__divergance": "jeffreys"}, "did you mean 'method.divergence'?"),
        ({"method__gan__weigth": 1}, "did you mean 'method.gan.weight'?"),
        ({"student__lr": "fast"}, "student.lr: Input should be a valid number"),
        ({"student__lr": -1}, "student.lr: Input should be greater than 0"),
        ({"method__kind": "fdistill"}, "method.kind: must be one of 'autoencoder', 'pretrain'"),
        ({"method__divergence": "kl"}, "method.divergence: Input should be 'reverse_kl'"),
        ({"data__kind": "conditions_only", "method__kind": "diff_instruct"}, "data.path: unknown key"),
        ({"train": 3}, "train: Input should be"),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
):
    assert message in fail(capsys, monkeypatch, "--config", write_settings(tmp_path, **changes))


def test_all_problems_are_named_at_once(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        read_config(write_settings(tmp_path, student__lr="x", train__stepz=1))
    assert "student.lr" in str(caught.value) and "train.stepz" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train.stepz", "3"], "did you mean 'train.steps'?"),
        (["--student.lr=fast"], "valid number"),
        (["--train.steps"], "--train.steps has no value"),
        (["steps", "3"], "expected --key value, found 'steps'"),
        (
            ["--train.batch_size", "7", "--train.gradient-accumulation-steps", "2"],
            "train.batch_size: 7 is not a multiple",
        ),
        (["--teacher.path", "nowhere"], "nowhere has no model_index.json"),
        (["--teacher.path", "embedded:nothing"], "no embedded teacher 'nothing'"),
        (["--teacher", "null"], "teacher: missing; f_distill distils one"),
        (["--method", "{kind: pretrain, channels: [8, 32]}"], "`pretrain` trains a teacher and takes none"),
        (
            ["--method", "{kind: uni_instruct, gan: null}"],
            "method.gan: a divergence other than reverse_kl needs the discriminator's density ratio",
        ),
        (["--data", "{kind: conditions_only}", "--method.kind", "sida"], "sida has a discriminator and needs pictures"),
        (["--method", "{kind: pretrain}", "--lora", "{}"], "lora: `pretrain` trains no adapters"),
        (["--method", "{kind: score_matching}", "--lora", "{}"], "lora: `score_matching` trains no adapters"),
        (["--method", "{kind: autoencoder}", "--lora", "{}"], "lora: `autoencoder` trains no adapters"),
        (
            ["--method", "{kind: consistency}", "--teacher.guidance", "2"],
            "teacher.guidance: `consistency` takes its scales from method.guidance",
        ),
        (["--evaluation", "{num_images: 12}"], "evaluation.num_images: only students of classes are scored at the end"),
        (["--classes", "[0, 7]"], "classes: [0, 7] are not among the teacher's 0 to 1"),
        (["--method.noise_levels", "{kind: loguniform, low: 2, high: 1}"], "low 2 is not below high 1"),
        (["--method.noise_levels", "{kind: grid, low: 0.5, high: 0.5}"], "low 0.5 is not below high 0.5"),
        (["--method.ratio_clip", "[20, 0.1]"], "20 and 0.1 are no range of positive numbers"),
        (["--method.start", "nowhere"], "nowhere"),
        (["--data", "{kind: conditions_only}"], "f_distill has a discriminator and needs pictures"),
        (["--data.size", "8"], "pictures of shape (1, 8, 8), but the teacher"),
        (["--method.gan.taps", "[unet.middle]"], "method.gan.taps: no block named ['unet.middle']"),
        (["--method.regression", "{path: nowhere.safetensors}"], "nowhere.safetensors is not a file of pairs"),
        (["--data", "{kind: fashion_mnist, path: nowhere}"], "run `make data`"),
    ],
)
def test_mistakes_on_the_command_line_and_misfits(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    assert message in fail(capsys, monkeypatch, "--config", base / "run.yaml", *arguments)
    assert not (base / "run").exists()


def test_a_tracker_that_is_not_there(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.run.get_available_trackers", list)
    message = fail(capsys, monkeypatch, "--config", base / "run.yaml", "--train.trackers", "[wandb]")
    assert "train.trackers: wandb is not installed: pip install wandb" in message


def test_what_is_scored_at_the_end(base: Path):
    """Students of classes with the pictures that the judge takes, and enough of them."""
    config = read_config(base / "run.yaml")
    spec = Spec(2, 2, 1, 32, 0.5, None, ["a", "b"])

    def refused(spec: Any, n: int = 12, **changes: Any) -> bool:
        try:
            check_scores(config.model_copy(update={"evaluation": Evaluation(num_images=n)} | changes), spec)
        except UserError:
            return True
        return False

    assert not refused(spec) and not refused(PictureSpec((3, 32, 32)), 0)
    assert refused(replace(spec, size=16)) and refused(spec, 9) and refused(PictureSpec((1, 32, 32)))
    assert refused(spec, method=Pretrain()) and refused(spec, method=ScoreMatching())


def test_output_that_cannot_be_written(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Before anything is loaded."""
    line = ["--config", base / "run.yaml", "--teacher.path", "nowhere", "--output"]
    for output in (base / "run.yaml", base / "run.yaml" / "run", Path("/proc/none/run")):
        assert f"output: {output} cannot be written" in fail(capsys, monkeypatch, *line, output)
    (base / "cut").mkdir()
    (base / "cut" / "config.yaml").touch()
    assert "config.yaml: expected keys and values" in fail(capsys, monkeypatch, *line, base / "cut")


def test_a_runs_settings_are_replaced_whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, path = read_config(base / "run.yaml"), tmp_path / "config.yaml"
    path.write_text("old")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError))
        write_config(config, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    write_config(config, path)
    assert read_config(path) == config


def test_missing_files_and_empty_folders(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "No such file" in fail(capsys, monkeypatch, "--config", base / "none.yaml")
    assert "--config is missing" in fail(capsys, monkeypatch)
    (base / "broken.yaml").write_text("a: [1,\n b")
    assert "not valid YAML" in fail(capsys, monkeypatch, "--config", base / "broken.yaml")
    (base / "empty").mkdir()
    message = fail(capsys, monkeypatch, "--config", base / "run.yaml", "--data.path", base / "empty")
    assert "no pictures (.bmp" in message
    (base / "damaged").mkdir()
    (base / "damaged" / "a.png").write_bytes(b"not a picture")
    message = fail(
        capsys, monkeypatch, "--config", base / "run.yaml", "--data.path", base / "damaged", "--output", base / "d"
    )
    assert "a.png is not a readable picture" in message


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path: Path):
    config = write_settings(tmp_path, train__steps=4)
    assert train("--config", config).returncode == 0
    weights = tmp_path / "run" / "checkpoints" / "step-4" / "critic" / "model.safetensors"
    whole = weights.read_bytes()
    files = lambda: {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for damage in (whole[: len(whole) // 2], b""):
        weights.write_bytes(damage)
        before = files()
        again = train("--config", config, "--train.steps", "6")
        assert again.returncode == 2 and again.stderr.count("error: ") == 1 and "Traceback" not in again.stderr
        assert "step-4 is damaged" in again.stderr and "delete it to resume from step-2" in again.stderr
        changed = {p for p, content in files().items() if before.get(p) != content}
        assert changed <= {tmp_path / "run" / "config.yaml"}
    for path in sorted(weights.parent.parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    weights.parent.parent.rmdir()
    assert train("--config", config).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps", "3", "--train.steps=4"], "--train.steps is given twice"),
        (["--train.batch_size", "3", "--train.batch-size", "4"], "--train.batch-size is given twice"),
        (["--data.size", "3", "--data", "{kind: solids}"], "--data would take away --data.size"),
        (["--config", "b.yaml"], "--config is given twice"),
        (["--prompt", "a", "--prompt", "b"], "--prompt is given twice"),
        (["--prompt", "a", "--method.prompt", "b"], "--method.prompt is given twice"),
    ],
)
def test_a_key_is_given_once_on_the_command_line_too(base: Path, arguments: list[str], message: str):
    with pytest.raises(UserError, match=message):
        parse(["--config", str(base / "run.yaml"), *arguments])


def test_a_section_may_stand_before_its_keys(base: Path):
    line = ["--config", str(base / "run.yaml"), "--student", "{lr: 1.0}", "--student.eps", "0.5", "--train.seed", "3"]
    config, _ = parse(line)
    assert (config.student.lr, config.student.eps, config.train.seed) == (1.0, 0.5, 3)


def test_overrides_are_read_as_yaml(base: Path):
    line = ["--config", str(base / "run.yaml"), "--student.lr", "1e-5", "--train.ema-decay=0.5", "--dry-run"]
    config, dry = parse([*line, "--method.gan.taps", "[unet.mid_block, unet.down_blocks.0]"])
    assert dry and config.student.lr == 1e-5 and config.train.ema_decay == 0.5
    assert config.method.kind == "f_distill" and len(config.method.gan.taps) == 2


@pytest.mark.parametrize(
    "prompt", ["a chair #1 of its kind", "a cat: asleep", "no", "123", '\'tis [a] "cube" 🧊', "null"]
)
def test_a_prompt_is_taken_as_it_is(prompt: str):
    config, _ = parse(["--config", str(ROOT / "configs/solids/vsd_3d.yaml"), f"--prompt={prompt}"])
    assert config.model_dump()["method"]["prompt"] == prompt


@pytest.mark.parametrize(
    ("template", "prompt", "sentence"),
    [
        ("a photo of {}", "a red cube", "a photo of a red cube"),
        ("a photo of {}", "a photo of a red cube", "a photo of a red cube"),
        ("{} in {style}", "a cube", "a cube in {style}"),
    ],
)
def test_a_prompt_is_put_into_its_template_once(template: str, prompt: str, sentence: str):
    line = ["--config", str(ROOT / "configs/solids/vsd_3d.yaml"), f"--method.template={template}"]
    config, _ = parse([*line, f"--prompt={prompt}"])
    assert isinstance(config.method, SceneDistillation) and config.method.sentence == sentence


def test_a_bare_no_is_a_precision_and_not_a_false(base: Path):
    config, _ = parse(["--config", str(base / "run.yaml"), "--train.mixed_precision", "no"])
    assert config.train.mixed_precision == "no"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_are_valid_and_say_how_they_are_run(path: Path):
    if path.parent.name == "accelerate":
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
        return
    config, text = read_config(path), path.read_text()
    assert text.startswith("# ") and f"--config {path.relative_to(ROOT)}" in text
    assert str(config.output) == f"runs/{path.parent.name}/{path.stem}"
    defaults = TypeAdapter(Config).validate_python(yaml.safe_load(text))
    assert defaults == config


def test_help_shows_the_values_of_the_file(base: Path):
    done = train("--config", base / "run.yaml", "--help")
    assert done.returncode == 0 and "--method.divergence" in done.stdout
    squeezed = " ".join(done.stdout.replace("│", " ").split())
    assert "Fraction" not in squeezed and "(default: 0.001)" in squeezed and "Peak learning rate" in squeezed
    assert "--config FILE" in train("--help").stdout


def test_dry_run_prints_configuration_and_estimate_and_writes_nothing(base: Path):
    done = train("--config", base / "run.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    text, _, estimate = done.stdout.partition("\n\n")
    assert yaml.safe_load(text) == Config.model_validate(settings(base)).model_dump(mode="json")
    numbers = yaml.safe_load(estimate)
    assert numbers["seconds_per_student_turn"] > 0 and numbers["parameters"].keys() == {
        "student",
        "critic",
        "discriminator",
    }
    assert not (base / "run").exists()
