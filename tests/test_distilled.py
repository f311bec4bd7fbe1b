"""Whether a teacher is distilled is a fact of its files or a setting; and students that are no teachers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distill import pairs
from distill.build import build_method, load_teacher
from distill.settings import check
from models.controlnet import SanaControlBranch
from models.errors import UserError
from models.teachers import distilled, load
from models.teachers.base import TextSpec
from models.teachers.sana import SanaNetwork, SanaSpec
from models.trigflow import TrigFlowView
from tests import families
from tests.test_families import f_distill, values
from tests.tiny import save_network, save_sana

PLAIN = {"_class_name": "DDIMScheduler"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# Fast\n\nFast-XL is a distilled version of [XL 1.0](https://a.b/c), trained for real-time synthesis.", True),
        (
            "X 3.5 Large is a [Multimodal](https://x.y) text-to-image model with Adversarial Diffusion Distillation.",
            True,
        ),
        ("---\ntags:\n- text-to-image\n- LCM\n---\n# m\n", True),
        ("---\ntags: turbo\n---\n", True),
        ("A timestep-distilled checkpoint of eight steps.", True),
        ("This model is not distilled; it takes guidance.", False),
        ("A non-distilled base. An undistilled one. It still has a lot to teach.", False),
        ("---\ntags: [hyperrealism]\nbase_model: org/sdxl-turbo\n---\n# Hyperrealism lightning turbo lcm\n", False),
        ("", False),
    ],
)
def test_a_card_says_so_in_words(card: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert bool(distilled.reason(PLAIN, {}, tmp_path / "README.md")) == expected
    assert distilled.reason(PLAIN, {}, None) == "" == distilled.reason(PLAIN, {}, tmp_path / "none.md")
    assert distilled.reason(PLAIN, {"is_distilled": True}, None)


def test_a_card_that_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [a]\ntags: [lcm]\n---\n")
    assert distilled.reason(PLAIN, {}, tmp_path / "README.md") == ""
    assert "README.md: its metadata are not read: line 2: the key 'tags' is given twice" in capsys.readouterr().err


def asked(base: Path, teacher: Path, guidance: float = 7.5, **more: Any) -> TextSpec:
    settings = values(base, teacher, "run", f_distill("stable_diffusion"), False, guidance)
    settings["teacher"] |= more
    _, spec = load_teacher(check(settings, "test"))
    assert isinstance(spec, TextSpec)
    return spec


def test_names_say_nothing_and_files_do(tmp_path: Path) -> None:
    teacher = families.save(tmp_path / "sdxl-turbo-lcm-hyper-lightning", "stable_diffusion")
    assert asked(tmp_path, teacher).guidable
    with pytest.raises(UserError, match=r"teacher.distilled\): give 1"):
        asked(tmp_path, teacher, distilled=True)
    assert not asked(tmp_path, teacher, 1.0, distilled=True).guidable
    pipe = families.stable_diffusion()
    pipe.register_modules(scheduler=diffusers.LCMScheduler(**families.SD_NOISE))
    snapshot = tmp_path / "snapshots" / "462165984030d82259a11f4367a4eed129e94a7b"
    pipe.save_pretrained(snapshot)
    with pytest.raises(UserError, match="its scheduler is an LCMScheduler") as caught:
        asked(tmp_path, snapshot)
    assert "teacher.distilled: false" in str(caught.value) and "\n" not in str(caught.value)
    assert asked(tmp_path, snapshot, distilled=False).guidable
    pipe = families.stable_diffusion()
    pipe.register_modules(unet=families.unet(cross_attention_dim=32, time_cond_proj_dim=16))
    pipe.save_pretrained(tmp_path / "told")
    with pytest.raises(UserError, match="told the guidance scale"):
        asked(tmp_path, tmp_path / "told")
    with pytest.raises(UserError, match=r"teacher.distilled: false, but its unet is told"):
        asked(tmp_path, tmp_path / "told", distilled=False)
    with pytest.raises(UserError, match=r"teacher.distilled: only for stock text-to-image pipelines"):
        asked(tmp_path, save_sana(tmp_path / "sana"), size=None, tokens=None, distilled=False)


def test_a_student_with_a_branch_needs_a_teacher_with_one(tmp_path: Path) -> None:
    teacher = save_sana(tmp_path / "teacher")
    denoiser, spec = load(teacher)
    assert isinstance(spec, SanaSpec) and isinstance(denoiser.network, SanaNetwork)
    denoiser.network.control = SanaControlBranch.of(denoiser.network.transformer, 1, spec.vae.spatial_compression_ratio)
    own = replace(spec, control=-torch.ones(1, 1, *spec.picture[1:]))
    own.begun_flow(TrigFlowView(denoiser, 0.5, 0.5), 4.5).save(tmp_path / "student", denoiser.network, "")
    consistency = {"kind": "consistency", "warmup_steps": 2, "guidance": [4.0], "ladd": None}
    for method in (consistency, {"kind": "diff_instruct", "critic_turns": 1}):
        settings = values(tmp_path, teacher, "run", method | {"start": str(tmp_path / "student")}, False)
        settings["data"]["size"] = 32
        settings["teacher"] = {"path": str(teacher)}
        with pytest.raises(UserError, match=r"method.start: .*follows lines by a control branch") as caught:
            build_method(check(settings, "test"), (3, 32, 32), [])
        assert "\n" not in str(caught.value)


def test_pairs_are_a_teachers(tmp_path: Path) -> None:
    student = save_network(tmp_path / "student", 2.5, 0, size=16, classes=2)
    with pytest.raises(UserError, match=r"--teacher: .* is a one-step student"):
        pairs.make(pairs.Arguments(str(student), tmp_path / "pairs.safetensors", 1))
