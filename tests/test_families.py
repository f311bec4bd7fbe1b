"""Every family of text-to-image teachers: load, train three steps, export, reload with stock diffusers, same pixels."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from PIL import Image
from torch import Tensor

from distill import parallel
from distill.run import build, train
from distill.settings import check
from eval import fid
from eval.text_to_image import painter
from models.condition import Condition
from models.errors import UserError
from models.seeds import Draws, mix
from models.teachers import load, load_class_conditional
from models.teachers.ddpm import DDPM
from models.teachers.dit import DiT
from models.teachers.pipeline import PipelineSpec
from models.teachers.sana import SanaNetwork, SanaSpec
from tests import families
from tests.tiny import environment, save_sana

PROMPT = "a red cube"
TAPS = {
    "unet": ["unet.mid_block"],
    "pixart_sigma": ["transformer.transformer_blocks.0"],
    "stable_diffusion_3": ["transformer.transformer_blocks.0"],
    "flux": ["transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"],
    "qwen_image": ["transformer.transformer_blocks.0"],
    "z_image": ["transformer.noise_refiner.0"],
}


def pictures(base: Path) -> Path:
    """Eight coloured pictures with captions, as an image folder with its metadata."""
    folder = base / "pictures"
    if folder.is_dir():
        return folder
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 100)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{PROMPT if i % 2 else 'a sphere'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def values(
    base: Path, teacher: Path, output: str, method: dict[str, Any], lora: bool, guidance: float = 1.0
) -> dict[str, Any]:
    return {
        "output": str(base / output),
        "data": {"kind": "hf_dataset", "path": str(pictures(base)), "caption_column": "text", "size": 16},
        "teacher": {"path": str(teacher), "size": 16, "tokens": 32, "guidance": guidance},
        "method": method,
        "lora": {"rank": 2} if lora else None,
        "student": {"lr": 1e-3},
        "train": {
            "steps": 3, "batch_size": 2, "mixed_precision": "no", "cpu_threads": 1, "log_every": 1,
            "sample_every": 100, "checkpoint_every": 3,
        },
    }  # fmt: skip


def f_distill(family: str) -> dict[str, Any]:
    taps = TAPS.get(family, TAPS["unet"])
    return {"kind": "f_distill", "critic_turns": 1, "bins": 2, "gan": {"taps": taps, "width": 8}}


def consistency(family: str, guidance: float) -> dict[str, Any]:
    ladd = {"weight": 0.1, "taps": TAPS[family], "width": 8}
    return {"kind": "consistency", "warmup_steps": 2, "guidance": [guidance], "ladd": ladd}


def class_values(base: Path, teacher: Path, output: str, lora: bool, guidance: float) -> dict[str, Any]:
    """As :func:`values`, with pictures in folders of three classes, or of one."""
    folder = base / "classes"
    for i in range(6):
        path = folder / ("all" if guidance == 1 else f"class{i % 3}") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 255 - 40 * i, 100)).save(path)
    taps = ["unet.mid_block"] if guidance == 1 else ["transformer.transformer_blocks.1"]
    method = {"kind": "f_distill", "critic_turns": 1, "bins": 2, "gan": {"taps": taps, "width": 8}}
    changed = values(base, teacher, output, method, lora, guidance)
    return changed | {"data": {"kind": "image_folder", "path": str(folder), "size": 16}}


STOCK = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
for folder, lora, arguments in json.load(open(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(lora or folder, torch_dtype=torch.float32)
    if lora:
        pipe.scheduler = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).scheduler
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.load(folder + "/z.pt", weights_only=True)
    pictures = pipe(latents=latents, output_type="np", **arguments).images
    numpy.save(folder + ("/lora.npy" if lora else "/whole.npy"), pictures)
assert not {"models", "distill", "eval"} & set(sys.modules)
"""


def stock_pixels(base: Path, folders: list[Path], spec: PipelineSpec, z: Tensor, teacher: Path | None) -> list[Tensor]:
    """Pictures (B, 3, H, W) in [0, 1] of stock diffusers in a process of its own, in one step from noise ``z``.

    With the ``teacher``'s folder those of the teacher with the students' LoRA files come behind them.
    """
    packed = z
    if isinstance(spec.pipe, FluxPipeline | QwenImagePipeline):
        packed = torch.nn.functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)
    _, height, width = spec.picture
    arguments = spec.family.call | {"num_inference_steps": 1, "height": height, "width": width}
    if spec.family.length != 77:
        arguments["max_sequence_length"] = spec.tokens
    arguments["prompt"] = [PROMPT] * len(z)
    jobs = [(str(folder), "", arguments) for folder in folders]
    if teacher:
        jobs += [(str(folder), str(teacher), arguments) for folder in folders]
    for folder in folders:
        torch.save(packed, folder / "z.pt")
    (base / "jobs.json").write_text(json.dumps(jobs))
    line = [sys.executable, "-c", STOCK, str(base / "jobs.json")]
    result = subprocess.run(line, cwd=base, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    files = [folder / name for name in ("whole.npy", "lora.npy") for folder in folders]
    return [torch.from_numpy(np.load(path)).permute(0, 3, 1, 2) for path in files[: len(jobs)]]


def samples(folder: Path, z: Tensor) -> tuple[Tensor, Tensor, PipelineSpec]:
    """A student's own x0 and pictures in [0, 1]."""
    denoiser, spec = load(folder)
    assert isinstance(spec, PipelineSpec) and spec.student
    with torch.no_grad():
        x0 = spec.one_step(denoiser)(z, spec.text([PROMPT] * len(z)))
        return x0, (spec.decode(x0) / 2 + 0.5).clamp(0, 1), spec


CLASS_STOCK = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
folder, arguments = json.loads(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(folder)
seeds = [torch.Generator().manual_seed(i) for i in range(3)]
numpy.save(folder + "/whole.npy", pipe(generator=seeds, num_inference_steps=1, output_type="np", **arguments).images)
assert not {"models", "distill", "eval"} & set(sys.modules)
"""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", families.CLASSES)
def test_students_of_classes_train_and_stock_diffusers_gives_their_pixels(
    family: str, lora: bool, tmp_path: Path
) -> None:
    teacher = families.save(tmp_path / "teacher", family)
    assert train(check(class_values(tmp_path, teacher, "run", lora, 2.0 if family == "dit" else 1.0), "test")) == 0
    folder, classes = tmp_path / "run" / "student", [0, 2, 1] if family == "dit" else [0, 0, 0]
    before, its = load_class_conditional(teacher)
    denoiser, spec = load_class_conditional(folder)
    assert spec.student and not its.student and spec.class_names == its.class_names
    assert spec.class_names == (["cube", "sphere", "cone"] if family == "dit" else ["all"])
    z = torch.cat([torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    cond = Condition(class_ids=torch.tensor(classes))
    with torch.no_grad():
        x0, untrained = spec.one_step(denoiser)(z, cond), spec.one_step(before)(z, cond)
        mine = (spec.decode(x0) / 2 + 0.5).clamp(0, 1)
    assert float((x0 - untrained).abs().max()) > 1e-4
    if family == "dit":
        with torch.no_grad():
            assert float((spec.one_step(denoiser)(z, cond.null()) - x0).abs().max()) > 1e-5
    arguments = DiT.call(classes) if family == "dit" else DDPM.call(classes)
    line = [sys.executable, "-c", CLASS_STOCK, json.dumps([str(folder), arguments])]
    result = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    stock = torch.from_numpy(np.load(folder / "whole.npy")).permute(0, 3, 1, 2)
    assert float((stock - mine).abs().max()) < 1e-5


def test_dit_answers_the_class_it_is_asked_for_in_training_mode(tmp_path: Path) -> None:
    """Its own dropout of classes would answer a tenth of them unconditionally."""
    denoiser, spec = load_class_conditional(families.save(tmp_path / "teacher", "dit"))
    cond, t = Condition(class_ids=torch.arange(64) % 3), torch.full((64,), 500.0)
    z = Draws(list(range(64))).normal(*spec.shape)
    with torch.no_grad():
        expected = denoiser.denoise(z, t, cond)
        assert torch.equal(denoiser.train().denoise(z, t, cond), expected)


def test_students_of_classes_in_latents_are_scored(tmp_path: Path) -> None:
    """By the command, against its teacher, with a grid and a look for copies: pictures, not latents."""
    teacher = families.save(tmp_path / "teacher", "dit")
    assert train(check(class_values(tmp_path, teacher, "run", False, 2.0), "test")) == 0
    real = tmp_path / "real"
    real.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 100, 255 - 20 * i)).save(real / f"{i}.png")
    scored = {"num_images": 12, "teacher_steps": 2, "batch": 5, "device": "cpu"}
    fid.main(fid.Options(tmp_path / "run", protocol="fd_effnet_lite0_64", reference=real, training=real, **scored))
    result = json.loads((tmp_path / "run/report/report.json").read_text())
    names = ["student, 1 step", "teacher, 2 Heun steps", "teacher, 1 step"]
    assert [row["sampler"] for row in result["scores"]] == names
    assert all(np.isfinite(row["fd"]) for row in result["scores"]) and result["nearest"]["among"] == 12


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_students_train_and_stock_diffusers_gives_their_pixels(family: str, lora: bool, tmp_path: Path) -> None:
    """f-distill, and for flows sCM + LADD, three steps each; the LoRA file on the teacher's folder does it too."""
    teacher = families.save(tmp_path / "teacher", family)
    guidance = 1.0 if family == "flux" else 2.0
    methods = [f_distill(family)] + ([consistency(family, guidance)] if family in families.FLOWS else [])
    for number, method in enumerate(methods):
        scale = guidance if number == 0 else 1.0
        assert train(check(values(tmp_path, teacher, f"run{number}", method, lora, scale), "test")) == 0
    folders = [tmp_path / f"run{number}" / "student" for number in range(len(methods))]
    before, its = load(teacher, 16, 32)
    assert isinstance(its, PipelineSpec)
    z = Draws([0, 1]).normal(*its.shape)
    mine = [samples(folder, z) for folder in folders]
    loadable = lora and family != "pixart_sigma"  # whose pipelines of diffusers read no LoRA
    stock = stock_pixels(tmp_path, folders, mine[0][2], z, teacher if loadable else None)
    assert len(stock) == len(folders) * (2 if loadable else 1)
    for index, pictures in enumerate(stock):
        assert float((pictures - mine[index % len(folders)][1]).abs().max()) < 1e-5
    for x0, _, own in mine:
        with torch.no_grad():
            untrained = own.one_step(before)(z, own.text([PROMPT] * 2))
        assert float((x0 - untrained).abs().max()) > 1e-4  # three steps have moved it


SPRINT_STOCK = """
import json, sys
from functools import partial
import numpy, torch
from diffusers import SanaSprintPipeline
for folder, times, guidance, arguments in json.load(open(sys.argv[1])):
    pipe = SanaSprintPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, 1)
    z = torch.load(folder + "/z.pt", weights_only=True)
    pictures = pipe(latents=z, output_type="np", num_inference_steps=1, timesteps=[times[0], 0.0], max_timesteps=None,
                    intermediate_timesteps=None, guidance_scale=guidance, **arguments).images
    numpy.save(folder + "/whole.npy", pictures)
assert not {"models", "distill", "eval"} & set(sys.modules)
"""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_students_of_sana_train_and_stock_sprint_gives_their_pixels(lora: bool, tmp_path: Path) -> None:
    """f-distill and sCM + LADD; a student that is told no guidance scale is one that no scale changes."""
    teacher = save_sana(tmp_path / "teacher")
    taps = ["transformer.transformer_blocks.0"]
    f = {"kind": "f_distill", "critic_turns": 1, "bins": 2, "gan": {"taps": taps, "width": 8}}
    sprint = {"kind": "consistency", "warmup_steps": 2, "guidance": [4.0] if lora else [4.0, 5.0],
              "ladd": {"weight": 0.1, "taps": taps, "width": 8}}  # fmt: skip
    jobs, mine = [], []
    before, _ = load(teacher)
    for number, method in enumerate((f, sprint)):
        settings = values(tmp_path, teacher, f"run{number}", method, lora, 2.0 if number == 0 else 1.0)
        settings["data"]["size"] = 32
        assert train(check(settings, "test")) == 0
        folder = tmp_path / f"run{number}" / "student"
        assert (folder / "pytorch_lora_weights.safetensors").is_file() == lora
        denoiser, spec = load(folder)
        assert isinstance(spec, SanaSpec) and spec.times is not None and isinstance(denoiser.network, SanaNetwork)
        assert denoiser.network.transformer.config["guidance_embeds"] == (number == 1 and not lora)
        z = Draws([0, 1]).normal(*spec.shape)
        with torch.no_grad():
            x0 = spec.one_step(denoiser)(z, spec.text([PROMPT] * 2, spec.guidance))
            untrained = spec.one_step(before)(z, spec.text([PROMPT] * 2))
        assert float((x0 - untrained).abs().max()) > 1e-4
        mine.append((spec.decode(x0) / 2 + 0.5).clamp(0, 1))
        torch.save(z, folder / "z.pt")
        _, height, width = spec.picture
        arguments = {"prompt": [PROMPT] * 2, "height": height, "width": width, "use_resolution_binning": False,
                     "complex_human_instruction": None, "max_sequence_length": spec.max_length}  # fmt: skip
        jobs.append((str(folder), spec.times, spec.guidance, arguments))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    line = [sys.executable, "-c", SPRINT_STOCK, str(tmp_path / "jobs.json")]
    result = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    for (folder, *_), pictures in zip(jobs, mine, strict=True):
        stock = torch.from_numpy(np.load(Path(folder) / "whole.npy")).permute(0, 3, 1, 2)
        assert float((stock - pictures).abs().max()) < 1e-5


def test_lora_teacher_is_the_base_and_each_turn_moves_its_own_matrices(tmp_path: Path) -> None:
    teacher = families.save(tmp_path / "teacher", "stable_diffusion")
    trainer = build(check(values(tmp_path, teacher, "run", f_distill("stable_diffusion"), True, 2.0), "test"))
    method: Any = trainer.method
    base, spec = load(teacher, 16, 32)
    assert isinstance(spec, PipelineSpec)
    z, t, cond = Draws([0, 1]).normal(*spec.shape), torch.tensor([300.0, 700.0]), spec.text([PROMPT, "a sphere"])
    answers = lambda: [
        method.teacher.denoiser.denoise(z, t, cond),
        method.student.denoiser.denoise(z, t, cond),
        method.networks["critic"].denoise(z, t, cond),
    ]
    with torch.no_grad():
        expected = base.denoise(z, t, cond)
        assert all(torch.equal(answer, expected) for answer in answers())
    for turn, own, other in (("student", "student", "critic"), ("critic", "critic", "student")):
        copies = {name: copy.deepcopy(trainer.bare[name].state_dict()) for name in (own, other)}
        for _ in range(2):  # lora_A has a gradient once lora_B is not zero
            trainer.turn(turn, 0)
        now = {name: trainer.bare[name].state_dict() for name in (own, other)}
        assert len(now[own]) >= 16 and all(not torch.equal(now[own][k], copies[own][k]) for k in now[own])
        assert all(torch.equal(now[other][k], copies[other][k]) for k in now[other])
    with torch.no_grad():
        taught, student, critic = answers()
        assert torch.equal(taught, expected)
        assert not torch.equal(student, expected) and not torch.equal(critic, expected)
        assert not torch.equal(student, critic)


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's loss calls teacher and critic behind the student: its blocks must not be recomputed with theirs."""
    teacher = families.save(tmp_path / "teacher", "stable_diffusion_3")
    gradients: list[Tensor] = []

    def keep(parameters: Any, _limit: float) -> Tensor:
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return torch.ones(())

    monkeypatch.setattr(parallel, "clip_grad_norm", keep)
    for checkpointing in (False, True):
        settings = values(tmp_path, teacher, "run", f_distill("stable_diffusion_3"), True, 2.0)
        settings["train"]["gradient_checkpointing"] = checkpointing
        trainer = build(check(settings, "test"))
        for name in ("student", "critic"):
            generator = torch.Generator().manual_seed(len(name))
            for parameter in trainer.bare[name].parameters():  # as if trained: both adapters far from the teacher
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        trainer.turn("student", 0)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"guidance": 3.0}}, "distilled teacher"),
        ({"lora": {"rank": 2, "targets": ["nothing"]}}, "lora.targets"),
        ({"teacher": {"size": 17}}, "teacher.size"),
        ({"method": {"student_steps": 9}}, "student_steps"),
        ({"method": {"gan": {"taps": ["transformer.nothing"]}}}, "gan.taps"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher = families.save(tmp_path / "teacher", "stable_diffusion_3")
    (teacher / "README.md").write_text("# Fast\n\nFast is a distilled version of Slow.\n")
    settings = values(tmp_path, teacher, "run", f_distill("stable_diffusion_3"), False)
    for key, inner in change.items():
        settings[key] = (settings[key] or {}) | inner
    with pytest.raises(UserError, match=message):
        build(check(settings, "test"))


def test_a_student_of_four_steps_trains_on_its_own_samples(tmp_path: Path) -> None:
    """Backward simulation: the input of step k is the student's own answer of step k - 1, noised afresh."""
    teacher = families.save(tmp_path / "teacher", "stable_diffusion_3")
    settings = values(tmp_path, teacher, "run", f_distill("stable_diffusion_3") | {"student_steps": 4}, False, 2.0)
    trainer = build(check(settings, "test"))
    method: Any = trainer.method
    assert method.later == pytest.approx([0.5 ** (k / 3) for k in (1, 2, 3)])  # down to 3 u / (1 + 2 u) at 1/4: shift 3
    seeds = [mix(0, i) for i in range(8)]
    draws = Draws(seeds)
    cond, z = method.conditions.sample(draws), draws.normal(*method.shape)
    x_t, _, t = method._simulated(z, cond, draws)
    assert set(t.tolist()) <= {1.0, *(float(torch.tensor(v)) for v in method.later)} and len(set(t.tolist())) > 2
    first = t == 1
    assert torch.equal(x_t[first], z[first]) and not torch.equal(x_t[~first], z[~first])
    again = Draws(seeds)
    method.conditions.sample(again), again.normal(*method.shape)
    again.uniform()
    with torch.no_grad():
        x0 = method.student(z, cond)
    second = method.process.add_noise(x0, again.normal(*method.shape), torch.full((8,), method.later[0]))
    torch.testing.assert_close(x_t[t == t[~first].max()], second[t == t[~first].max()])
    assert train(check(settings, "test")) == 0
    grid = painter(tmp_path / "run", 4)([PROMPT], [0])
    assert grid.shape == (1, 3, 16, 16)
