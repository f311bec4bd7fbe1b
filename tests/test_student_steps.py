"""An exported student of one to four steps: stock diffusers asks it at its own times, and gives its pixels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.errors import UserError
from models.seeds import Draws
from models.teachers import load
from models.teachers.base import StepTimes, later_times
from models.teachers.class_pipeline import ClassPipelineSpec
from models.teachers.pipeline import PipelineSpec
from models.teachers.sana import SanaSpec
from models.trigflow import TrigFlowView
from tests import families
from tests.tiny import save_sana

PROMPTS = ["a red cube", "a sphere"]


def student(teacher: Path) -> Path:
    """The untrained one of a teacher, exported."""
    denoiser, spec = load(teacher, 16, 32)
    assert isinstance(spec, PipelineSpec | ClassPipelineSpec)
    begun = spec.begun(denoiser.process, 1.0)
    begun.save(teacher.parent / "student", denoiser.network, begun.usage)
    return teacher.parent / "student"


def asked_times(pipe: Any, part: str, call: Callable[[], Any], unit: float) -> tuple[list[float], Any]:
    """At which times stock asks the network in a call, in the network's own unit, and what the call gives."""
    times: list[float] = []

    def keep(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        t = named["timestep"] if "timestep" in named else inputs[1]
        times.append(float(torch.as_tensor(t).flatten()[0]) / unit)

    handle = getattr(pipe, part).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        return times, call()
    finally:
        handle.remove()


def own_pixels(folder: Path, z: Tensor, cond: Condition, steps: int, noise: Callable[[], Tensor]) -> Tensor:
    """With the numbers that torch draws from the seed ``steps`` on."""
    denoiser, spec = load(folder)
    torch.manual_seed(steps)
    with torch.no_grad():
        x0 = spec.one_step(denoiser).generate(z, cond, spec.later(steps), noise)
        return (spec.decode(x0) / 2 + 0.5).clamp(0, 1)


def unpacked(z: Tensor, height: int) -> Tensor:
    return F.pixel_shuffle(z.transpose(1, 2).unflatten(2, (height // 2, -1)), 2)


def check_prompts(folder: Path, counts: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    _, spec = load(folder)
    assert isinstance(spec, PipelineSpec) and spec.times is not None
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    z, packs = Draws([0, 1]).normal(*spec.shape), spec.family.packed > 1
    latents = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2) if packs else z
    more = {"max_sequence_length": spec.tokens} if spec.family.length != 77 else {}
    scale = {"StableDiffusion3": 1000.0}.get(spec.family.__name__, 1.0)
    for count in counts:
        torch.manual_seed(count)
        options = {"height": 16, "width": 16, "num_inference_steps": count, "output_type": "np", "latents": latents}
        call = lambda: pipe(prompt=PROMPTS, **options, **more, **spec.family.call).images  # noqa: B023
        found, pictures = asked_times(pipe, spec.part, call, scale)
        found = [1 - t for t in found] if spec.family.__name__ == "ZImage" else found
        assert found == pytest.approx(spec.times[:count], rel=1e-5), count
        noise = lambda: unpacked(torch.randn(latents.shape), spec.shape[1]) if packs else torch.randn_like(z)
        mine = own_pixels(folder, z, spec.text(PROMPTS), count, noise)
        assert np.isfinite(pictures).all()
        error = float((torch.from_numpy(pictures).permute(0, 3, 1, 2) - mine).abs().max())
        assert error < 5e-5, count  # 1e-5 but for rounding that depends on the CPU and its threads


@pytest.mark.parametrize("family", families.FAMILIES)
def test_stock_asks_students_of_prompts_at_their_times(family: str, tmp_path: Path) -> None:
    folder = student(families.save(tmp_path / "teacher", family))
    check_prompts(folder)
    rows = json.loads((folder / "studio.json").read_text())["times"]
    assert [len(row) for row in rows] == [1, 2, 3, 4] and all(row[0] == rows[0][0] for row in rows)
    assert all(np.diff(row).max() < -0.03 * row[0] for row in rows[1:]), "every step has work to do"
    assert rows[-1][-1] > 0.2 * rows[0][0], "and none of it is finer than a student of four steps can use"


@pytest.mark.parametrize("family", families.CLASSES)
def test_stock_asks_students_of_classes_at_their_times(family: str, tmp_path: Path) -> None:
    folder = student(families.save(tmp_path / "teacher", family))
    _, spec = load(folder)
    assert isinstance(spec, ClassPipelineSpec) and spec.times is not None
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    for count in (1, 2, 3, 4):
        torch.manual_seed(count)
        options = {"num_inference_steps": count, "output_type": "np", "generator": seeds()}
        call = lambda: pipe(**options, **spec.family.call([0, 0])).images  # noqa: B023
        found, pictures = asked_times(pipe, spec.part, call, 1.0)
        assert found == pytest.approx(spec.times[:count])
        own = seeds()
        drawn = lambda: torch.cat([torch.randn(1, *spec.shape, generator=seed) for seed in own])  # noqa: B023
        z, fresh = drawn(), drawn if family == "ddpm" else lambda: torch.randn(2, *spec.shape)
        mine = own_pixels(folder, z, Condition(class_ids=torch.zeros(2, dtype=torch.long)), count, fresh)
        assert float((torch.from_numpy(pictures).permute(0, 3, 1, 2) - mine).abs().max()) < 5e-5


ZERO = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("scheduler", "levels"),
    [
        ("DDIMScheduler", ZERO),
        ("EulerDiscreteScheduler", ZERO),
        ("DDIMScheduler", {"trained_betas": [*np.linspace(1e-4, 0.02, 999).tolist(), 1.0]}),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),  # almost zero
    ],
)
def test_students_of_zero_terminal_snr_are_the_same_in_stock(
    scheduler: str, levels: dict[str, Any], tmp_path: Path
) -> None:
    pipe = families.stable_diffusion()
    more = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    pipe.register_modules(scheduler=getattr(diffusers, scheduler)(**families.SD_NOISE | levels | more))
    pipe.save_pretrained(tmp_path / "teacher")
    folder = student(tmp_path / "teacher")
    check_prompts(folder)
    teacher, again = load(tmp_path / "teacher")[0], load(folder)[0]
    t = torch.tensor([0.0, 500.0, 998.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(teacher.process.alpha(t), again.process.alpha(t), rtol=1e-4, atol=1e-9)


def test_tables_of_other_lengths_begin_where_stock_begins(tmp_path: Path) -> None:
    """LCM's grid ends at a multiple of 4 less 1, which is not the last time of every table."""
    pipe = families.stable_diffusion()
    levels: dict[str, Any] = families.SD_NOISE | {"num_train_timesteps": 999}
    pipe.register_modules(scheduler=diffusers.DDIMScheduler(**levels))
    pipe.save_pretrained(tmp_path / "teacher")
    check_prompts(student(tmp_path / "teacher"), (1, 4))


def test_a_student_that_is_gone_on_from_keeps_its_times_and_its_scheduler(tmp_path: Path) -> None:
    folder = student(families.save(tmp_path / "teacher", "stable_diffusion_3"))
    denoiser, spec = load(folder)
    assert isinstance(spec, PipelineSpec) and spec.times is not None
    again = spec.begun(denoiser.process, 1.0)
    again.save(tmp_path / "again", denoiser.network, "")
    files = [path / "scheduler/scheduler_config.json" for path in (folder, tmp_path / "again")]
    assert files[0].read_text() == files[1].read_text()
    _, its = load(tmp_path / "again")
    assert isinstance(its, PipelineSpec) and its.times is not None and its.times.rows == spec.times.rows


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_cards_code_asks_sanas_students_at_their_times(steps: int, tmp_path: Path) -> None:
    """SanaSprintPipeline's scheduler cannot be told so by the folder: the card's own code does it."""
    denoiser, spec = load(save_sana(tmp_path / "sana"))
    assert isinstance(spec, SanaSpec)
    spec = spec.begun_flow(TrigFlowView(denoiser, 0.5, 0.5), 4.5)
    spec.save(tmp_path / "student", denoiser.network, "")
    code = spec.usage.replace("PATH", str(tmp_path / "student")).replace(
        "steps, times = 1,", f"steps, times = {steps},"
    )
    first, last = code.rsplit("\nimage = ", 1)
    place: dict[str, Any] = {}
    exec(first, place)
    pipe = place["pipe"]
    z = Draws([0]).normal(*spec.shape)
    place["z"] = z
    line = last.replace(".images[0]", ".images").replace("**size", "latents=z, output_type='np', **size")
    torch.manual_seed(steps)
    found, pictures = asked_times(pipe, "transformer", lambda: eval(line, place), 1.0)
    _, own = load(tmp_path / "student")
    assert isinstance(own, SanaSpec) and own.times is not None and len(found) == steps
    sines = [float(np.sin(t) / (np.cos(t) + np.sin(t))) for t in own.times[:steps]]  # the flow's time at equal noise
    assert [t / found[0] * sines[0] for t in found] == pytest.approx(sines, rel=1e-3)
    cond = own.text([spec.examples[0]], own.guidance)
    mine = own_pixels(tmp_path / "student", z, cond, steps, lambda: torch.randn_like(z))
    assert float((torch.from_numpy(pictures).permute(0, 3, 1, 2) - mine).abs().max()) < 5e-5


def test_the_cards_code_runs(tmp_path: Path) -> None:
    folder = student(families.save(tmp_path / "teacher", "flux"))
    card = (folder / "README.md").read_text()
    assert "# num_inference_steps: 1 to 4" in card
    place: dict[str, Any] = {}
    exec(card.replace("PATH", str(folder)).replace("num_inference_steps=1", "num_inference_steps=3"), place)
    assert place["image"].size == (16, 16)


def test_step_times_of_each_number() -> None:
    times = StepTimes([[9], [9, 4], [9, 6, 3]])
    assert times[:2] == (9, 4) and times[:3] == times[:] == (9, 6, 3) and times[0] == 9 and len(times) == 3
    assert later_times(times, 2) == (4,) and later_times(times, 1) == ()
    assert StepTimes.read([9, 6, 3])[:2] == (9, 6) and StepTimes.read([[9], [9, 4]])[:2] == (9, 4)
    for wrong in (lambda: times[1:], lambda: times[::2], lambda: StepTimes([[9], [8]])):
        with pytest.raises(ValueError, match="times"):
            wrong()
    with pytest.raises(UserError, match="has times for 3"):
        later_times(times, 4)
