"""Sana checkpoints: folders that stock pipelines read and write, text, and the solids world's runs end to end."""

import io
import json
import math
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, SanaPipeline, SanaSprintPipeline
from diffusers.schedulers import scheduling_scm
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.build import build_method, build_stream
from distill.methods.autoencoder import Reconstruction
from distill.settings import Config
from distill.workshop import embed
from eval import text_to_image
from eval.latency import PARTS, as_text, measure
from eval.text_to_image import painter
from eval.timesteps import SPACING, search, write_times
from models.denoiser import Denoiser
from models.errors import UserError
from models.seeds import Draws
from models.teachers import load, load_class_conditional, miniature, sana
from models.teachers.sana import SanaNetwork, SanaSpec
from models.trigflow import TrigFlowView
from tests.tiny import ROOT, save_sana, train

PROMPTS = ["a photo of a red cube", "a photo of a torus left of a blue sphere"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sana(tmp_path_factory.mktemp("sana") / "teacher")


def loaded(folder: Path) -> tuple[Denoiser, SanaSpec, SanaNetwork]:
    denoiser, spec = load(folder)
    assert isinstance(spec, SanaSpec) and isinstance(denoiser.network, SanaNetwork)
    return denoiser, spec, denoiser.network


def test_a_teacher_folder_is_a_stock_pipeline(teacher: Path):
    """Same text, same velocity as SanaPipeline gets from the folder."""
    denoiser, spec, _ = loaded(teacher)
    pipe: Any = SanaPipeline.from_pretrained(teacher)
    embeds, mask = pipe._get_gemma_prompt_embeds(PROMPTS, "cpu", torch.float32, max_sequence_length=spec.max_length)
    cond = spec.text(PROMPTS)
    assert cond.text is not None and cond.text_mask is not None
    assert torch.equal(cond.text, embeds) and torch.equal(cond.text_mask, mask)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        time = 1000 * t * pipe.transformer.config.timestep_scale
        velocity = pipe.transformer(x, embeds, time, encoder_attention_mask=mask, return_dict=False)[0]
        expected = x - t.view(-1, 1, 1, 1) * velocity
        assert torch.allclose(denoiser.denoise(x, t, cond), expected, atol=1e-6)
    size = {"height": spec.picture[1], "width": spec.picture[2], "use_resolution_binning": False}
    text = {"complex_human_instruction": None, "max_sequence_length": spec.max_length}
    assert pipe(PROMPTS[0], num_inference_steps=2, **size, **text).images[0].size == spec.picture[:0:-1]


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's network as a student of up to four steps."""
    denoiser, spec, network = loaded(teacher)
    view = TrigFlowView(denoiser, 0.5, 0.5)
    own = replace(spec, times=(view.process.t_max, 1.3, 1.1, 0.6), guidance=4.5)
    folder = tmp_path_factory.mktemp("sana") / "student"
    own.save(folder, SanaNetwork(sana.with_guidance(network.transformer)), own.usage)
    return folder


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_students_pixels_are_the_stock_pipelines(student: Path, steps: int):
    """By the example of its own model card, on the same noise."""
    made = painter(student, steps)
    assert made.spec.student and made.name == f"student, {steps} step{'s' if steps > 1 else ''}"
    pipe: Any = SanaSprintPipeline.from_pretrained(student)
    draws = Draws([3, 4])
    z = draws.normal(*made.spec.shape)
    fresh = [draws.normal(*made.spec.shape) for _ in range(steps - 1)]
    # at the last step the scheduler draws noise too and multiplies it with 0
    noises = iter([*fresh, torch.zeros_like(z)])
    code = made.spec.usage.replace('"PATH"', "PATH").replace("steps, times = 1,", f"steps, times = {steps},")
    code = code.replace('pipe("a cube",', "pipe(PROMPTS, latents=z, output_type='pt',").replace(".images[0]", ".images")
    names = {"PATH": student, "PROMPTS": PROMPTS, "z": z}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_scm, "randn_tensor", lambda *_args, **_rest: next(noises))
        exec(code, names)
    theirs = names["image"]
    with torch.no_grad():
        mine = made.spec.decode(made.latents(made.embed(PROMPTS), Draws([3, 4])))
    assert isinstance(theirs, torch.Tensor) and pipe.scheduler.config.sigma_data == made.spec.sigma_data
    assert torch.allclose((mine / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5)


def test_pictures_depend_on_prompt_and_seed_alone(student: Path):
    made = painter(student, 2)
    together = made([*PROMPTS, PROMPTS[0]], [0, 1, 2])
    apart = (together[1:2].int() - made(PROMPTS[1:], [1]).int()).abs()
    assert int(apart.max()) <= 1, "networks may round differently with the batch, by one level at most"
    assert float(apart.float().mean()) < 1e-2
    assert not torch.equal(together[0], together[2])


def test_more_steps_than_times_and_teachers_of_classes_are_one_line(student: Path):
    with pytest.raises(UserError, match="times for 1 to 4 steps, not 5"):
        painter(student, 5)(PROMPTS, [0, 1])
    with pytest.raises(UserError, match="asked for classes"):
        painter("embedded:fashion_mnist", 1)


def test_latency_lists_the_parts(student: Path, teacher: Path):
    found = measure([painter(teacher, 2, 3.0), painter(student, 1)], PROMPTS, repeats=2)
    assert list(found) == ["teacher, 2 steps", "student, 1 step"]
    for parts in found.values():
        assert list(parts) == [*PARTS, "whole"]
        assert all(0 < spread.low <= spread.median <= spread.high for spread in parts.values())
    calls = {"teacher, 2 steps": 3, "student, 1 step": 1}
    assert "student, 1 step: " in as_text(found, calls, "teacher, 2 steps")


def test_step_times_are_found_greedily():
    """A metric whose best times are known, each step's depending on the one before."""
    best = (1.5, 0.93, 0.52)

    def metric(times: Sequence[float]) -> float:
        return -sum((t - b) ** 2 for t, b in zip(times, best, strict=False))

    times, trials = search(metric, 3, first=[1.4, 1.5, 1.57])
    assert times[0] == 1.5 and times == sorted(times, reverse=True)
    assert all(abs(t - b) <= SPACING / 4 + 1e-9 for t, b in zip(times, best, strict=True))
    assert len({trial.times for trial in trials}) == len(trials)
    with pytest.raises(UserError, match="no room for step 2"):
        search(metric, 2, first=[0.12])


def test_found_times_are_written_where_the_student_and_its_card_have_them(student: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(student, folder)
    write_times(folder, painter(folder, 1), [1.5, 0.9])
    again = painter(folder, 2)
    assert again.spec.times == (1.5, 0.9) and again.spec.guidance == 4.5
    assert "[1.5, 0.9]" in (folder / "README.md").read_text()
    assert not list(folder.glob("*.partial"))


def test_a_guidance_embedding_changes_nothing_at_first_and_learns(teacher: Path):
    _, spec, network = loaded(teacher)
    grown = SanaNetwork(sana.with_guidance(network.transformer))
    x, t, cond = torch.randn(2, *spec.shape), torch.tensor([0.2, 0.9]), spec.text(PROMPTS)
    told = [replace(cond, guidance=torch.full((2,), scale)) for scale in (2.0, 6.0)]
    with torch.no_grad():
        assert torch.allclose(network(x, t, cond), grown(x, t, told[0]), atol=1e-6)
    with pytest.raises(ValueError, match="embeds the guidance scale"):
        grown(x, t, cond)
    optimizer = torch.optim.SGD(grown.transformer.time_embed.parameters(), lr=0.1)  # type: ignore[union-attr]
    for _ in range(2):  # the first step moves the embedder's last layer, the second all of it
        (grown(x, t, told[0]) - grown(x, t, told[1]) + grown(x, t, told[0])).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(grown(x, t, told[0]), grown(x, t, told[1]), atol=1e-6)


def test_words_it_does_not_know_are_named(teacher: Path):
    _, spec, _ = loaded(teacher)
    assert spec.unknown_words("a Photo of a mauve cube, hovering") == ["mauve", "hovering"]
    assert spec.unknown_words(PROMPTS[1]) == []


def test_null_text_is_the_empty_prompts(teacher: Path):
    _, spec, _ = loaded(teacher)
    null, empty = spec.text(PROMPTS).null(), spec.text(["", ""])
    assert null.text is not None and empty.text is not None and torch.equal(null.text, empty.text)


def test_a_teacher_of_prompts_is_no_teacher_of_classes(teacher: Path):
    with pytest.raises(UserError, match="asked for prompts, not for classes"):
        load_class_conditional(teacher)


# --------------------------------------------------------------------------------------------------------- runs


def run(base: Path, name: str, method: dict[str, Any], **changes: Any) -> Path:
    """Two steps by the command; returns the run folder."""
    values: dict[str, Any] = {
        "output": str(base / name),
        "data": {"kind": "solids", "size": 32},
        "method": method,
        "student": {"lr": 1e-3},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "mixed_precision": "no",
            "cpu_threads": 1,
            "log_every": 1,
            "sample_every": 100,
        },
    }
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    done = train("--config", path)
    assert done.returncode == 0, done.stderr[-2000:]
    return base / name


@pytest.fixture(scope="module")
def solids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoder and teacher of the solids world, tiny, by their own configurations' methods."""
    base = tmp_path_factory.mktemp("solids")
    run(base, "autoencoder", {"kind": "autoencoder", "channels": [16, 32, 32], "latent_channels": 4})
    sizes = {"autoencoder": str(base / "autoencoder"), "width": 32, "depth": 2, "text_width": 32, "text_depth": 1}
    run(base, "teacher", {"kind": "pretrain", "sigma_data": 1.0, "sana": sizes})
    return base


def test_a_pretrained_teacher_brings_its_text_encoder_and_autoencoder(solids: Path):
    denoiser, spec, network = loaded(solids / "teacher" / "student")
    assert network.text_encoder is None and spec.shape == (4, 4, 4) and spec.picture == (3, 32, 32)
    lines = [json.loads(line) for line in (solids / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    assert spec.vae.config["scaling_factor"] == pytest.approx(1 / lines[-1]["latent_std"], rel=0.2)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        first, second = (denoiser.denoise(x, t, spec.text(prompts)) for prompts in (PROMPTS, PROMPTS[::-1]))
    assert not torch.allclose(first, second)


def test_the_latents_scale_outlives_a_batch_that_is_not_finite():
    network = Reconstruction(miniature.new_autoencoder([8, 16], 4, 1))
    pictures, noise = torch.rand(2, 3, 8, 8), torch.zeros(2, 4, 2, 2)
    network(pictures * float("inf"), noise)
    assert float(network.scale) == 1
    network(pictures, noise)
    assert 0 < float(network.scale) != 1


def test_a_decoder_is_trained_alone_and_stored_latents_stay_valid(solids: Path):
    """The encoder and its scale are those of the run before; the decoder may be of another size."""
    sizes = {"kind": "autoencoder", "channels": [16, 32, 32], "latent_channels": 4}
    first = AutoencoderDC.from_pretrained(solids / "autoencoder" / "student" / "vae")
    for name, more in (("same", {}), ("wider", {"decoder_channels": [32, 32, 32], "decoder_layers": 2})):
        method = sizes | more | {"start": str(solids / "autoencoder")}
        found = AutoencoderDC.from_pretrained(run(solids, name, method) / "student" / "vae")
        assert found.config["scaling_factor"] == first.config["scaling_factor"]
        for key, value in first.encoder.state_dict().items():
            assert torch.equal(found.encoder.state_dict()[key], value)
        assert sum(p.numel() for p in found.decoder.parameters()) >= sum(p.numel() for p in first.decoder.parameters())
        moved = zip(first.decoder.parameters(), found.decoder.parameters(), strict=False)
        gaps = [float((a - b).detach().abs().max()) for a, b in moved if a.shape == b.shape]
        assert max(gaps) > 0 and (max(gaps) < 0.01) == (name == "same")
    values = yaml.safe_load((solids / "same.yaml").read_text())
    values["method"] |= {"channels": [16, 16, 32], "decoder_channels": None}
    with pytest.raises(UserError, match="has an encoder of other sizes"):
        config = Config.model_validate(values)
        stream, shape, names = build_stream(config, 0, 1)
        build_method(config, shape, names, stream)


def test_a_teacher_is_trained_further(solids: Path):
    values = yaml.safe_load((solids / "teacher.yaml").read_text())

    def built(**sizes: Any) -> SanaNetwork:
        values["method"]["sana"] |= sizes
        config = Config.model_validate(values)
        stream, shape, names = build_stream(config, 0, 1)
        network = build_method(config, shape, names, stream)[0].exported()
        assert isinstance(network, SanaNetwork)
        return network

    _, spec, before = loaded(solids / "teacher" / "student")
    after = built(start=str(solids / "teacher" / "student"))
    assert after.text_encoder is not None
    for mine, theirs in ((before.transformer, after.transformer), (spec.text_encoder, after.text_encoder)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    with pytest.raises(UserError, match="other sizes"):
        built(width=64)
    with pytest.raises(UserError, match="for classes"):
        built(start="embedded:fashion_mnist")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_sprint_trains_and_exports(solids: Path, weight: float):
    ladd = {"taps": ["transformer.transformer_blocks.0", "transformer.transformer_blocks.1"], "width": 16}
    method = {"kind": "consistency", "weight": weight, "warmup_steps": 2, "ladd": ladd}
    folder = run(solids, f"sprint-{weight:g}", method, teacher={"path": str(solids / "teacher" / "student")})
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("consistency" in line) == (weight > 0) and "adversarial" in line and line["skipped_steps"] == 0
    _, spec, network = loaded(folder / "student")
    assert spec.times is not None and spec.guidance == 4.5 and network.transformer.config["guidance_embeds"]


def test_f_distill_runs_on_prompts(solids: Path, tmp_path: Path):
    teacher = {"path": str(solids / "teacher" / "student"), "guidance": 3.0}
    gan = {"taps": ["transformer.transformer_blocks.1"], "width": 16}
    folder = run(solids, "f_distill", {"kind": "f_distill", "critic_turns": 1, "bins": 2, "gan": gan}, teacher=teacher)
    assert loaded(folder / "student")[1].student
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    data = {"kind": "conditions_only", "prompts": str(tmp_path / "prompts.txt")}
    run(solids, "diff_instruct", {"kind": "diff_instruct", "critic_turns": 1}, teacher=teacher, data=data)


def test_a_run_becomes_an_embedded_model(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half the size, the same pictures to float16's precision, and still a stock pipeline."""
    shutil.copytree(student, tmp_path / "run" / "student")
    monkeypatch.setattr(embed, "PRETRAINED", tmp_path / "pretrained")
    embed.main(embed.Options(tmp_path / "run", "small"))
    shipped = tmp_path / "pretrained" / "small"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (shipped / weights).stat().st_size < 0.6 * (student / weights).stat().st_size
    before, after = painter(student, 1)(PROMPTS, [0, 1]), painter(shipped, 1)(PROMPTS, [0, 1])
    assert (before.int() - after.int()).abs().max() <= 2
    SanaSprintPipeline.from_pretrained(shipped)
    assert not any(str(tmp_path.parent) in file.read_text() for file in shipped.rglob("*.json"))
    embed.main(embed.Options(tmp_path / "run", "twin"))
    twin = tmp_path / "pretrained" / "twin"
    assert all((twin / part).is_symlink() for part in (weights, "vae/diffusion_pytorch_model.safetensors"))
    assert torch.equal(painter(twin, 1)(PROMPTS, [0, 1]), after)
    for value in (vae := load_file(student / "vae/diffusion_pytorch_model.safetensors")).values():
        value.zero_()
    save_file(vae, tmp_path / "run/student/vae/diffusion_pytorch_model.safetensors")
    embed.main(embed.Options(tmp_path / "run", "small"))  # the twin keeps what it shared
    assert torch.equal(painter(twin, 1)(PROMPTS, [0, 1]), after)
    assert not torch.equal(painter(shipped, 1)(PROMPTS, [0, 1]), after) and (shipped / weights).is_symlink()
    with pytest.raises(UserError, match="no exported network"):
        embed.main(embed.Options(tmp_path, "small"))
    with pytest.raises(UserError, match="letters, digits"):
        embed.main(embed.Options(tmp_path / "run", "../small"))


def test_another_programs_student_is_known_by_its_scheduler(student: Path, tmp_path: Path):
    """A SANA-Sprint folder without studio.json serves the paper's step times."""
    shutil.copytree(student, tmp_path / "stock")
    (tmp_path / "stock" / "studio.json").unlink()
    spec = loaded(tmp_path / "stock")[1]
    assert spec.times == pytest.approx((math.pi / 2, 1.3, 1.1, 0.6), abs=1e-2) and spec.examples[0]
    assert painter(tmp_path / "stock", 4)(PROMPTS, [0, 1]).shape[0] == 2


def write_captioned_shard(folder: Path, rows: int = 12, size: int = 16) -> Path:
    """Random pictures with captions as a webdataset shard: NNNN.jpg and NNNN.txt."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "000.tar", "w") as tar:
        for row in range(rows):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", PROMPTS[row % 2].encode())):
                info = tarfile.TarInfo(f"{row:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def test_a_sana_folder_trains_with_the_papers_settings(tmp_path: Path):
    """The shipped configuration as it is, but for paths, picture size, and batch and steps that a CPU can pay for."""
    teacher = save_sana(tmp_path / "teacher", side=4, depth=20)
    shards = write_captioned_shard(tmp_path / "shards")
    done = train(
        *("--config", ROOT / "configs/sana/sprint_600m.yaml", "--output", tmp_path / "run"),
        *("--teacher.path", teacher, "--data.data_files", shards / "*.tar", "--data.size", 16),
        *("--train.batch_size", 4, "--train.steps", 2, "--train.log_every", 1, "--train.sample_every", 2),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["skipped_steps"] == 0 and line["adversarial"] != 0 for line in lines)
    pipe: Any = SanaSprintPipeline.from_pretrained(tmp_path / "run/student")
    assert pipe.transformer.config.guidance_embeds and pipe.transformer.config.num_layers == 20
    weights = load_file(tmp_path / "run/student/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert painter(tmp_path / "run", 4)(PROMPTS, [0, 1]).shape == (2, 3, 16, 16)


def test_pictures_by_one_command(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = partial(text_to_image.Options, str(student), output=tmp_path / "row.png", seeds=(0, 1, 2))
    text_to_image.main(options(prompt="a photo of a mauve cube"))
    assert Image.open(tmp_path / "row.png").size == (3 * 32, 32)
    assert "does not know: mauve" in capsys.readouterr().err
    with pytest.raises(UserError, match="no control branch"):
        text_to_image.main(options(prompt="a cube", lines=tmp_path / "row.png"))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        text_to_image.main(options(prompt="a cube", lines=tmp_path / "no.png"))
    with pytest.raises(UserError, match="at least one"):
        text_to_image.main(options(prompt="a cube", seeds=()))
