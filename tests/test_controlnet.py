"""Sketches: edges of known shapes, the branch that follows them, and its two stages of training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SanaPipeline
from torch import Tensor

from distill.build import build_method
from distill.settings import DiffInstruct, Teacher, read_config
from distill.total_derivative import total_derivative
from eval.control import frame_time, overlap
from eval.features import quantize
from eval.geneval.prompts import HELD_OUT
from eval.geneval.solids import SolidsDetector
from eval.text_to_image import painter
from models.condition import Condition
from models.controlnet import NOTHING, SanaControlBranch, edges, roughened
from models.errors import UserError
from models.scene.captions import prompts
from models.scene.solids import render, sample_scene
from models.seeds import Draws
from models.teachers import load, sana
from models.teachers.sana import SanaNetwork, SanaSpec
from models.trigflow import TrigFlowView
from tests.tiny import save_sana, train

PROMPTS = ["a photo of a red cube", "a photo of a torus left of a blue sphere"]


def disc(radius: float = 18.0, size: int = 64, contrast: float = 1.0) -> Tensor:
    """(1, 3, size, size): a smooth-edged disc in the middle of an even background."""
    y, x = torch.meshgrid(torch.arange(size) - size / 2 + 0.5, torch.arange(size) - size / 2 + 0.5, indexing="ij")
    inside = (radius + 0.5 - (x.square() + y.square()).sqrt()).clamp(0, 1)
    return contrast * (inside.expand(1, 3, size, size) - 0.5)


@pytest.mark.parametrize("contrast", [0.3, 1.0, 1.8])
def test_the_edge_of_a_disc_is_a_closed_thin_circle(contrast: float):
    line = edges(disc(contrast=contrast))[0, 0] > 0
    y, x = line.nonzero().T.float() - 31.5
    radii = (x.square() + y.square()).sqrt()
    assert (radii - 18).abs().max() < 1.5
    angles = torch.atan2(y, x).sort().values
    assert angles.diff().max() < 0.15  # nowhere a gap of two pixels and a half
    assert line.sum() < 1.6 * 2 * torch.pi * 18


def test_edges_do_not_depend_on_brightness_and_flat_pictures_have_none():
    assert torch.equal(edges(disc(contrast=0.8)), edges(disc(contrast=0.8) + 0.3))
    assert (edges(torch.full((2, 3, 32, 32), 0.4)) == NOTHING).all()
    noisy = 0.002 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (edges(noisy) == NOTHING).all()


def test_edges_of_a_colour_change_without_a_change_of_brightness():
    picture = torch.full((1, 3, 32, 32), -1.0)
    picture[:, 0, :, :16], picture[:, 1, :, 16:] = 1.0, 1.0
    columns = (edges(picture)[0, 0] > 0).nonzero()[:, 1]
    assert len(columns) and set(columns.tolist()) <= {15, 16}


def test_rough_lines_thicken_break_and_vanish_and_repeat():
    lines = edges(disc()).repeat(200, 1, 1, 1)
    rough = roughened(lines, Draws(range(200)))
    assert torch.equal(rough, roughened(lines, Draws(range(200))))
    counts, before = (rough > 0).sum((1, 2, 3)), int((lines[0] > 0).sum())
    assert 5 <= (counts == 0).sum() <= 40
    assert (counts > 1.5 * before).float().mean() > 0.3 and ((counts < before) & (counts > 0)).any()


# ---------------------------------------------------------------------------------------------------- the branch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sana(tmp_path_factory.mktemp("control") / "teacher", side=16)


def controlled(folder: Path, scale: float = 0.0) -> tuple[SanaNetwork, SanaSpec, Condition]:
    """A network with a branch whose projections are random of size ``scale``, its spec, and a condition."""
    denoiser, spec = load(folder)
    assert isinstance(spec, SanaSpec) and isinstance(denoiser.network, SanaNetwork)
    torch.manual_seed(0)
    branch = SanaControlBranch.of(denoiser.network.transformer, 1, spec.vae.spatial_compression_ratio)
    for linear in (branch.enter, *branch.leave):
        torch.nn.init.normal_(linear.weight, std=scale)
    lines = edges(torch.randn(2, *spec.picture, generator=torch.Generator().manual_seed(1)))
    return SanaNetwork(denoiser.network.transformer, control=branch), spec, replace(spec.text(PROMPTS), control=lines)


def test_a_new_branch_changes_nothing_and_a_strength_of_nothing_neither(folder: Path):
    network, spec, cond = controlled(folder)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    plain = SanaNetwork(network.transformer)
    with torch.no_grad():
        assert torch.equal(network(x, t, cond), plain(x, t, cond))
        network, spec, cond = controlled(folder, 0.3)
        plain = SanaNetwork(network.transformer)
        assert not torch.allclose(network(x, t, cond), plain(x, t, cond), atol=1e-3)
        network.control_strength = 0.0
        assert torch.equal(network(x, t, cond), plain(x, t, cond))


def test_lines_move_what_is_near_them(folder: Path):
    """The same text and noise with other lines: another answer."""
    network, spec, cond = controlled(folder, 0.3)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    assert cond.control is not None
    other = replace(cond, control=cond.control.flip(-1))
    with torch.no_grad():
        assert (network(x, t, cond) - network(x, t, other)).abs().mean() > 1e-3


def test_wrong_and_missing_lines_are_named(folder: Path):
    network, spec, cond = controlled(folder)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    with pytest.raises(ValueError, match="the condition has no control"):
        network(x, t, replace(cond, control=None))
    with pytest.raises(ValueError, match="control of"):
        network(x, t, replace(cond, control=torch.zeros(2, 1, 8, 8)))
    with pytest.raises(ValueError, match="needs a transformer of more"):
        SanaControlBranch.of(network.transformer, 2, 4)


def test_the_tangent_through_the_branch_agrees_with_central_differences(folder: Path):
    network, spec, cond = controlled(folder, 0.2)
    view = TrigFlowView(sana.denoiser(network.double(), 3.0), 0.5, 0.5)
    draw = torch.Generator().manual_seed(2)
    x = 0.5 * torch.randn(2, *spec.shape, generator=draw, dtype=torch.float64)
    direction = torch.randn(2, *spec.shape, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.5, 1.1], dtype=torch.float64)
    assert cond.text is not None
    cond = replace(cond, text=cond.text.double())
    field = lambda x, t: view.velocity(x, t, cond)
    with torch.no_grad():
        _, exact = total_derivative(field, x, t, direction, "jvp", 0.02, view.process.t_max)
        _, near = total_derivative(field, x, t, direction, "central", 1e-3, view.process.t_max)
    assert (exact - near).norm() / exact.norm() < 5e-4  # ReLU has kinks, the time embedding is float32


def test_a_branch_is_saved_beside_a_stock_pipeline(folder: Path, tmp_path: Path):
    network, spec, cond = controlled(folder, 0.2)
    replace(spec, control=cond.control, examples=tuple(PROMPTS)).save(tmp_path / "teacher", network, "card")
    denoiser, again = load(tmp_path / "teacher")
    assert isinstance(again, SanaSpec) and again.control is not None and cond.control is not None
    assert torch.equal(again.control, cond.control)
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        assert torch.equal(denoiser.network(x, t, cond), network(x, t, cond))
    assert again.preview(3).control is not None
    SanaPipeline.from_pretrained(tmp_path / "teacher")


# -------------------------------------------------------------------------------------------------------- training


def run(base: Path, name: str, method: dict, teacher: Path, **rest: object) -> Path:
    values = {
        "output": str(base / name),
        "data": {"kind": "solids", "size": 64},
        "teacher": {"path": str(teacher)},
        "method": method,
        "student": {"lr": 1e-2, "beta2": 0.9},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "mixed_precision": "no",
            "log_every": 1,
            "sample_every": 3,
            "checkpoint_every": 3,
        },
    } | rest
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    done = train("--config", path)
    assert done.returncode == 0, done.stderr
    return base / name / "student"


def test_both_stages_train_what_they_should(folder: Path, tmp_path: Path):
    """First the branch alone, then a one-step student with a branch of its own, from the teacher's."""
    teacher = run(tmp_path, "branch", {"kind": "pretrain", "sigma_data": 1.0, "control": 1}, folder)
    before, after = load(folder)[0].network, load(teacher)[0].network
    assert isinstance(before, SanaNetwork) and isinstance(after, SanaNetwork) and after.control is not None
    for name, value in before.transformer.state_dict().items():
        assert torch.equal(value, after.transformer.state_dict()[name]), name
    assert after.control.leave[0].weight.abs().max() > 0
    assert (tmp_path / "branch/samples/step-000003.png").is_file()

    other = {"method": DiffInstruct(), "teacher": Teacher(path=str(teacher))}
    with pytest.raises(UserError, match="prompts have no lines"):
        build_method(read_config(tmp_path / "branch.yaml").model_copy(update=other), None, [])

    method = {"kind": "consistency", "warmup_steps": 2, "guidance": [2.0]}
    student = load(run(tmp_path, "student", method | {"start": str(teacher)}, teacher))[0].network
    assert isinstance(student, SanaNetwork) and student.control is not None
    changed = (student.control.leave[0].weight - after.control.leave[0].weight).abs().max()
    assert changed > 0 and student.transformer.config["guidance_embeds"]
    name = "transformer_blocks.0.ff.conv_point.weight"
    assert not torch.equal(student.transformer.state_dict()[name], after.transformer.state_dict()[name])


def test_overlap_is_whole_for_the_drawn_scene_and_nothing_for_an_empty_one():
    asked = prompts(3, 12)
    made = render([sample_scene(HELD_OUT + 500 + i, wanted) for i, wanted in enumerate(asked)])
    detector, truth = SolidsDetector(), made.index >= 0
    own = overlap(detector, quantize(made.images), truth)
    others = overlap(detector, quantize(made.images.roll(1, 0)), truth)
    nothing = overlap(detector, quantize(torch.zeros_like(made.images)), truth)
    assert min(own) > 0.85 and sum(others) < 0.5 * sum(own) and max(nothing) == 0


def test_a_painter_draws_with_and_without_lines_and_times_a_frame(folder: Path, tmp_path: Path):
    network, spec, cond = controlled(folder, 0.3)
    replace(spec, control=cond.control, examples=tuple(PROMPTS)).save(tmp_path / "teacher", network, "card")
    made, plain = painter(tmp_path / "teacher", 2), painter(folder, 2)
    drawn = made(PROMPTS, [0, 1], cond.control)
    assert not torch.equal(drawn, made(PROMPTS, [0, 1]))
    with pytest.raises(UserError, match="follows no lines"):
        plain(PROMPTS, [0, 1], cond.control)
    frame = frame_time(made, PROMPTS[0], torch.rand(1, *spec.picture), repeats=3)
    assert 0 < frame.low <= frame.median <= frame.high
