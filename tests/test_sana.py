"""Sana checkpoints: folders that stock pipelines read and write, text, and the solids world's runs end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SanaPipeline, SanaSprintPipeline

from models.denoiser import Denoiser
from models.errors import UserError
from models.student import OneStepStudent
from models.teachers import load, load_class_conditional, sana
from models.teachers.sana import SanaNetwork, SanaSpec
from models.trigflow import TrigFlowView
from tests.tiny import save_sana, train

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


def test_a_students_pixels_are_the_stock_pipelines(teacher: Path, tmp_path: Path):
    denoiser, spec, network = loaded(teacher)
    view = TrigFlowView(denoiser, 0.5, 0.5)
    own = replace(spec, times=(view.process.t_max,), guidance=4.5)
    own.save(tmp_path / "student", SanaNetwork(sana.with_guidance(network.transformer)), "card")
    student, again, _ = loaded(tmp_path / "student")
    assert again.times == own.times and again.student and not spec.student
    z, cond = torch.randn(2, *spec.shape), again.text(PROMPTS, 4.5)
    with torch.no_grad():
        one_step = OneStepStudent(TrigFlowView(student, 0.5, 0.5), view.process.t_max)  # type: ignore[arg-type]
        mine = again.decode(one_step(z, cond))
    pipe: Any = SanaSprintPipeline.from_pretrained(tmp_path / "student")
    theirs = pipe(
        PROMPTS,
        num_inference_steps=1,
        max_timesteps=view.process.t_max,
        intermediate_timesteps=None,
        latents=z,
        height=spec.picture[1],
        width=spec.picture[2],
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=spec.max_length,
        output_type="pt",
    ).images
    assert torch.allclose((mine / 2 + 0.5).clamp(0, 1), theirs, atol=1e-5)


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
        "train": {"steps": 2, "batch_size": 4, "cpu_threads": 1, "log_every": 1, "sample_every": 100},
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
