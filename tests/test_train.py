"""The loop: kill and resume, processes, skipped steps, signals, the moving average, and what a step costs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from distill import checkpoint
from distill import train as entry
from distill.methods.distribution_matching import DistributionMatching
from distill.metrics import Metrics
from distill.run import build
from distill.run import train as run_training
from distill.settings import Config
from distill.trainer import Trainer
from models.errors import UserError
from models.multi_student import assemble
from tests.tiny import command, environment, save_network, settings, train, write_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, pictures and one finished run of six steps."""
    folder = tmp_path_factory.mktemp("train")
    done = train("--config", write_settings(folder, "whole"))
    assert done.returncode == 0, done.stderr
    return folder


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    folder, tensors = run / "checkpoints" / f"step-{step}", {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {f"{path.relative_to(folder)}:{name}": value for name, value in load_file(path).items()}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}.{key}", inner)

    for path in sorted(folder.rglob("*.pt")):
        collect(str(path.relative_to(folder)), torch.load(path, weights_only=True))
    return tensors


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 100
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, differing[:5]


def test_a_run_leaves_what_the_design_promises(base: Path):
    run = base / "whole"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    wanted = {"matching", "critic_loss", "d_real", "d_fake", "ratio", "teacher_critic_distance", "grad_norm/student"}
    assert wanted <= lines[0].keys() and len(lines[0]["ratio"]) == 4 and lines[0]["skipped_steps"] == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert {p.name for p in (run / "checkpoints/step-6").iterdir()} == {
        "student",
        "critic",
        "discriminator",
        "state.pt",
    }
    assert {p.name for p in (run / "student").iterdir()} == {"unet", "pipeline.py", "model_index.json", "README.md"}
    assert (run / "samples/step-000006.png").is_file() and (run / "config.yaml").is_file()


def test_kill_and_repeat_is_bit_identical(base: Path):
    """SIGKILL somewhere behind the first checkpoint; the same command ends as the uninterrupted run did."""
    config, run = write_settings(base, "killed"), base / "killed"
    process = subprocess.Popen(command("--config", config), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "student").exists(), "the run ended before it could be killed"
    (run / "metrics.jsonl").open("a").write('{"step": 4, "torn')
    again = train("--config", config)
    assert again.returncode == 0, again.stderr
    assert (run / "metrics.jsonl").read_text() == (base / "whole" / "metrics.jsonl").read_text()
    assert_same(state(run, 6), state(base / "whole", 6))


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A minute apart where a step takes 25 seconds: after the third step and the sixth. A run that was resumed from the
    third ends as the uninterrupted one did."""
    clock = {"seconds": 0.0}
    monkeypatch.setattr("distill.trainer.monotonic", lambda: clock["seconds"])
    run_step = Trainer.run_step

    def timed(trainer: Trainer) -> None:
        run_step(trainer)
        clock["seconds"] += 25

    monkeypatch.setattr(Trainer, "run_step", timed)
    more = {"train__steps": 7, "train__checkpoint_every": 100, "train__checkpoints_total_limit": 9}
    values = settings(tmp_path, "whole", **more, train__checkpoint_minutes=1)
    assert run_training(Config.model_validate(values)) == 0
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert checkpoint.list_steps(whole / "checkpoints") == [3, 6, 7]
    shutil.copytree(whole / "checkpoints/step-3", half / "checkpoints/step-3")
    shutil.copy(whole / "metrics.jsonl", half)
    assert run_training(Config.model_validate(settings(tmp_path, "half", **more))) == 0
    assert checkpoint.list_steps(half / "checkpoints") == [3, 7]
    assert_same(state(whole, 7), state(half, 7))
    assert (half / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither by a checkpoint that the disk had no room for, nor by runs that were killed."""
    trainer = build(Config.model_validate(settings(tmp_path)))
    folder = tmp_path / "run" / "checkpoints"
    for name in (".step-1.tmp", ".step-1.old"):
        (folder / name / "student").mkdir(parents=True)
    save_tensors = torch.save

    def full(content: Any, path: Path) -> None:
        if path.name == "state.pt":
            raise OSError(28, "No space left on device")
        save_tensors(content, path)

    trainer.run_step()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        trainer.save()
    assert list(folder.iterdir()) == []
    trainer.save()
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(base: Path):
    shutil.copytree(base / "whole", base / "older")
    path = base / "older" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["train"]["gradient_checkpointing"], values["data"]["workers"]
    path.write_text(yaml.safe_dump(values))
    assert train("--config", write_settings(base, "older")).returncode == 0
    values["train"]["seed"] = 1
    path.write_text(yaml.safe_dump(values))
    assert "train.seed 1 -> 0" in train("--config", write_settings(base, "older")).stderr


def test_resume_between_log_lines_keeps_the_means(base: Path):
    """A checkpoint that falls between two lines carries the sums of the first half."""
    changes = {"train__log_every": 3, "train__checkpoint_every": 2}
    whole, halves = write_settings(base, "means", **changes), settings(base, "means2", **changes)
    assert train("--config", whole).returncode == 0
    config = Config.model_validate(halves)
    trainer = build(config)
    config.output.mkdir()
    for _ in range(2):
        trainer.run_step()
    trainer.save()
    again = train("--config", write_settings(base, "means2", **changes))
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in (base / "means2/metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (base / "means/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line, other in zip(lines, expected, strict=True):
        assert line["critic_loss"] == pytest.approx(other["critic_loss"], rel=1e-5)


def test_two_processes_agree_with_one(base: Path):
    """torchrun with gloo at the same global batch: losses and every network to 1e-5. Resumed between two log lines it
    writes the same line again."""
    config = write_settings(base, "two", train__checkpoint_every=100, train__checkpoint_minutes=1e-9)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    written = []
    for _ in range(2):
        shutil.rmtree(base / "two" / "checkpoints" / "step-6", ignore_errors=True)
        done = train("--config", config, launcher=launcher)
        assert done.returncode == 0, done.stderr
        written.append((base / "two" / "metrics.jsonl").read_text())
    assert written[0] == written[1]
    kept = checkpoint.list_steps(base / "two" / "checkpoints")  # any time is more than a billionth of a minute
    assert kept == [5, 6]
    one, two = state(base / "whole", 6), state(base / "two", 6)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    lines = [json.loads((base / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("whole", "two")]
    assert lines[0]["critic_loss"] == pytest.approx(lines[1]["critic_loss"], rel=1e-5)
    assert lines[0]["ratio"] == pytest.approx(lines[1]["ratio"], rel=1e-4)


def test_sums_of_several_processes_are_taken_over_by_any_number(tmp_path: Path):
    saved = [{"loss": torch.tensor([float(i), 1.0])} for i in range(3)]
    for state, world, expected in [
        (saved, 3, [[0, 1], [1, 1], [2, 1]]),
        (saved, 2, [[2, 2], [1, 1]]),
        (saved[:1], 2, [[0, 1], [0, 0]]),
        (saved[1], 2, [[1, 1], [0, 0]]),
    ]:
        metrics = [Metrics(tmp_path) for _ in range(world)]
        for rank, one in enumerate(metrics):
            one.load(state, rank, world, torch.device("cpu"))  # type: ignore[arg-type]
        assert [one.sums["loss"].tolist() for one in metrics] == expected


@pytest.mark.parametrize("reuse", [False, True])
def test_gradient_accumulation_is_one_batch(tmp_path: Path, reuse: bool):
    """Two micro-batches of a run without batch statistics give the gradient of one batch."""
    method = {"kind": "diff_instruct", "critic_turns": 1, "reuse_samples": reuse}
    runs = {}
    for parts in (1, 2):
        values = settings(tmp_path, f"acc{parts}", method=method, train__gradient_accumulation_steps=parts)
        trainer = build(Config.model_validate(values))
        for _ in range(2):
            trainer.run_step()
        runs[parts] = [p.detach().clone() for p in trainer.bare["student"].parameters()]
    for one, two in zip(runs[1], runs[2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_no_process_waits_for_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only for the export, which a next stage reads: barriers give up after ten minutes."""
    done: list[str] = []
    exported = lambda: ["export"] if (tmp_path / "run/student/model_index.json").is_file() else []
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda _self: done.extend(["wait", *exported()]))
    monkeypatch.setattr("distill.run.publish", lambda *_: done.append("publish"))
    assert run_training(Config.model_validate(settings(tmp_path, train__steps=1))) == 0
    assert done[-3:] == ["wait", "export", "publish"]


def test_sigterm_saves_and_exits(base: Path):
    config, run = write_settings(base, "term", train__steps=10000, train__checkpoint_every=10000), base / "term"
    process = subprocess.Popen(
        command("--config", config), env=environment(), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command resumes" in errors
    assert len(checkpoint.list_steps(run / "checkpoints")) == 1


def test_nonfinite_steps_are_skipped_counted_and_end_the_run(tmp_path: Path):
    values = settings(tmp_path, train__steps=40, train__checkpoint_every=3, train__log_every=1)
    trainer = build(Config.model_validate(values))
    trainer.config.output.mkdir()
    original = trainer.method.student_loss

    def poisoned(turn: Any) -> Any:
        loss, logs = original(turn)
        return loss * (float("nan") if trainer.step in poison else 1.0), logs

    trainer.method.student_loss = poisoned  # type: ignore[method-assign]
    poison = {1}
    trainer.run_step()
    before = [p.detach().clone() for p in trainer.bare["student"].parameters()]
    trainer.run_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.bare["student"].parameters(), strict=True))
    trainer.run_step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.bare["student"].parameters(), strict=True))
    trainer.save()
    assert trainer.bad_steps.tolist() == [0, 1, 1]
    poison = set(range(5, 100))
    with pytest.raises(UserError, match=r"not finite for 10 steps in a row.*checkpoint step-"):
        trainer.run()
    assert trainer.step < 30
    kept = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    weights = load_file(tmp_path / "run" / "checkpoints" / f"step-{kept[-1]}" / "student" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize(("skipped", "status"), [(6, 2), (4, 2), (3, 0)])
def test_a_run_that_skipped_most_of_its_steps_makes_no_student(
    skipped: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of six steps; the same command says it again. A run that skipped half of them is exported."""
    loss = DistributionMatching.student_loss

    def poisoned(self: DistributionMatching, turn: Any) -> Any:
        value, logs = loss(self, turn)
        calls.append(turn)
        return value * (float("nan") if len(calls) <= skipped else 1.0), logs

    calls: list[Any] = []
    monkeypatch.setattr(DistributionMatching, "student_loss", poisoned)
    path = write_settings(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    assert entry.main() == status
    assert (tmp_path / "run" / "student").exists() == (status == 0)
    said = capsys.readouterr().err.splitlines()[-1]
    if status:
        assert said.startswith(f"error: {skipped} of 6 steps were skipped") and "no student is exported" in said
        assert entry.main() == 2 and len(calls) == 6 and not (tmp_path / "run" / "student").exists()


def test_optimizers_that_read_no_flag_skip_a_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As bitsandbytes' does not."""
    plain = lambda network, settings: torch.optim.AdamW(network.parameters(), settings.lr, fused=False)
    monkeypatch.setattr("distill.trainer.new_optimizer", plain)
    trainer = build(Config.model_validate(settings(tmp_path, student__eight_bit=True)))
    before = [p.detach().clone() for p in trainer.bare["student"].parameters()]
    original, factor = trainer.method.student_loss, float("nan")

    def poisoned(turn: Any) -> Any:
        loss, logs = original(turn)
        return loss * factor, logs

    trainer.method.student_loss = poisoned  # type: ignore[method-assign]
    assert float(trainer.turn("student", 0)) == 1
    after = list(trainer.bare["student"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.grad is not None and bool(p.grad.abs().sum()) for p in after)
    factor = 1.0
    assert float(trainer.turn("student", 0)) == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_average_moves_once_per_student_step(tmp_path: Path):
    trainer = build(Config.model_validate(settings(tmp_path)))
    parameters = lambda: [p.detach().clone() for p in trainer.bare["student"].parameters()]
    expected = parameters()
    for step in range(1, 4):
        trainer.run_step()
        decay = min(0.9, 1 - step**-0.75)  # n = step - 1 updates before this one
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, parameters(), strict=True)]
    assert trainer.ema.optimization_step == 3
    for average, value in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-4, atol=1e-6)


def test_each_turn_moves_its_own_networks_only(tmp_path: Path):
    trainer = build(Config.model_validate(settings(tmp_path)))
    snapshot = lambda: {name: [p.detach().clone() for p in net.parameters()] for name, net in trainer.bare.items()}
    moved = lambda a, b: {
        name for name in a if any(not torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True))
    }
    start = snapshot()
    trainer.turn("student", 0)
    middle = snapshot()
    trainer.turn("critic", 1)
    assert moved(start, middle) == {"student"} and moved(middle, snapshot()) == {"critic", "discriminator"}
    frozen = [p for module in trainer.method.frozen for p in module.parameters()]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize("reuse, student_calls", [(True, 0), (False, 1)])
def test_a_step_costs_what_the_table_says(tmp_path: Path, reuse: bool, student_calls: int):
    """Forward passes of each network, and whether its decoder records gradients, against the docstring of
    distill/methods/distribution_matching.py."""
    values = settings(tmp_path, method__reuse_samples=reuse, method__gan={"width": 8})
    trainer = build(Config.model_validate(values))
    method: Any = trainer.method
    networks = {
        "student": trainer.bare["student"].denoiser.network.unet,
        "critic": trainer.bare["critic"].network.unet,
        "teacher": method.teacher.denoiser.network.unet,
    }
    calls: list[tuple[str, str, bool]] = []
    for name, network in networks.items():
        for part in ("conv_in", "conv_out"):
            hook = lambda _m, _i, out, name=name, part=part: calls.append((name, part, out.requires_grad))
            network.get_submodule(part).register_forward_hook(hook)
    trainer.turn("student", 0)
    assert sorted(calls) == [
        ("critic", "conv_in", False),
        ("critic", "conv_out", False),
        ("student", "conv_in", True),
        ("student", "conv_out", True),
        ("teacher", "conv_in", True),
        ("teacher", "conv_out", False),
    ]
    calls.clear()
    trainer.turn("critic", 1)
    assert calls.count(("student", "conv_in", False)) == student_calls
    assert [call for call in calls if call[0] != "student"] == [
        ("critic", "conv_in", True),
        ("critic", "conv_out", True),
        ("teacher", "conv_in", False),
    ]


DATA_FREE: list[dict[str, Any]] = [
    {"kind": "sds"},
    {"kind": "diff_instruct"},
    {"kind": "sim"},
    {"kind": "sim", "huber": 0.5},
    {"kind": "sid"},
    {"kind": "uni_instruct", "divergence": "reverse_kl", "gan": None},
]
WITH_PICTURES: list[dict[str, Any]] = [{"kind": kind} for kind in ("dmd2", "f_distill", "sida", "uni_instruct")]


def name_of(method: dict[str, Any]) -> str:
    return "_".join([method["kind"], *("huber" for _ in method if "huber" in _)])


@pytest.mark.parametrize("method", DATA_FREE, ids=name_of)
def test_rows_without_discriminator_need_no_pictures_and_record_only_what_they_use(
    tmp_path: Path, method: dict[str, Any]
):
    """Gradients flow through the frozen networks for rows with k1 or k2 only; SDS has no critic."""
    trainer = build(Config.model_validate(settings(tmp_path, method=method, data={"kind": "conditions_only"})))
    inner: Any = trainer.method
    teacher, recorded = inner.teacher.denoiser.network.unet.conv_out, []
    teacher.register_forward_hook(lambda _m, _i, out: recorded.append(out.requires_grad))
    if inner.row.critic:
        critic = trainer.bare["critic"].network.unet.conv_out  # type: ignore[union-attr]
        critic.register_forward_hook(lambda _m, _i, out: recorded.append(out.requires_grad))
    trainer.run_step()  # at first the critic is the teacher, and there is no difference to follow
    recorded.clear()
    before = [p.detach().clone() for p in trainer.bare["student"].parameters()]
    trainer.turn("student", 0)
    assert recorded == [inner.row.second_order] * (2 if inner.row.critic else 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.bare["student"].parameters(), strict=True))
    assert set(trainer.bare) == ({"student", "critic"} if inner.row.critic else {"student"})
    assert inner.critic_turns == (3 if inner.row.critic else 0)


@pytest.mark.parametrize(
    "method", [{"kind": "pretrain"}, {"kind": "score_matching"}, *DATA_FREE, *WITH_PICTURES], ids=name_of
)
def test_every_method_trains_and_exports(tmp_path: Path, method: dict[str, Any]):
    values = settings(tmp_path, method=dict(method), train__steps=2)
    if method["kind"] in ("pretrain", "score_matching"):
        values["method"] |= {"channels": [8, 16], "patch": 4}
    if method["kind"] == "pretrain":
        del values["teacher"]
    assert run_training(Config.model_validate(values)) == 0
    assert (tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] == 0 and last["grad_norm/student"] > 0


def test_a_run_goes_on_from_another_runs_student(base: Path, tmp_path: Path):
    """The long recipe: reverse KL first, then forward KL from its student and critic."""
    method = {"kind": "uni_instruct", "start": str(base / "whole"), "gan": {"width": 8}}
    trainer = build(Config.model_validate(settings(base, "next", method=method)))
    for name, folder in (("student", "student"), ("critic", "critic")):
        step = checkpoint.list_steps(base / "whole" / "checkpoints")[-1]
        file = "ema.safetensors" if name == "student" else "model.safetensors"
        saved = load_file(base / "whole" / "checkpoints" / f"step-{step}" / folder / file)
        own = dict(trainer.bare[name].named_parameters())
        assert len(own) > 50 and all(torch.equal(saved[key], own[key]) for key in own)


def test_other_settings_do_not_continue_a_run(base: Path):
    done = train("--config", base / "whole.yaml", "--student.lr", "0.5")
    assert done.returncode == 2 and "student.lr 0.001 -> 0.5" in done.stderr and done.stderr.count("\n") == 1
    longer = train("--config", base / "whole.yaml", "--train.steps", "7")
    assert longer.returncode == 0 and checkpoint.list_steps(base / "whole" / "checkpoints")[-1] == 7


def test_a_start_that_does_not_fit_is_one_line(base: Path, tmp_path: Path):
    def error(start: Path, **changes: Any) -> str:
        method = {"kind": "dmd2", "start": str(start), "gan": {"width": 8}} | changes
        with pytest.raises(UserError) as caught:
            build(Config.model_validate(settings(base, "misfit", method=method)))
        return str(caught.value)

    assert "has sigma_init 2.5, this run 80.0" in error(base / "whole", sigma_init=80.0)
    save_network(tmp_path / "large", 2.5, 0)
    assert "makes 1 x 32 x 32 of 10 classes, the teacher 1 x 16 x 16 of 2" in error(tmp_path / "large")
    several = tmp_path / "several"
    assemble(several, [base / "whole" / "student"] * 2, [0, 1], "")
    assert "holds several students" in error(several)
    shutil.copytree(base / "whole", tmp_path / "run")
    step = checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1]
    weights = tmp_path / "run" / "checkpoints" / f"step-{step}" / "critic" / "model.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    assert "is of another teacher's architecture" in error(tmp_path / "run")
    weights.write_bytes(b"cut")
    assert f"the newest checkpoint of {tmp_path / 'run'} is damaged" in error(tmp_path / "run")


def test_a_student_is_no_teacher(base: Path, tmp_path: Path):
    values = settings(tmp_path, teacher={"path": str(base / "whole/student")})
    with pytest.raises(UserError, match=r"^teacher.path: .*is a one-step student: name the teacher"):
        build(Config.model_validate(values))


def test_pictures_of_more_classes_than_the_teacher_knows(base: Path, tmp_path: Path):
    for number in range(3):
        (tmp_path / "pictures" / f"class{number}").mkdir(parents=True)
        shutil.copy(next((base / "pictures").rglob("*.png")), tmp_path / "pictures" / f"class{number}" / "0.png")
    data = {"kind": "image_folder", "path": str(tmp_path / "pictures"), "size": 16, "channels": 1}
    with pytest.raises(UserError, match=r"data: 3 classes, but the teacher .* knows 2"):
        build(Config.model_validate(settings(base, "classes", data=data)))
