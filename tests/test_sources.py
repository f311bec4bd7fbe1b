"""Where a teacher comes from, and where its student goes: single files, hub ids, licences, uploads."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import upload
from distill.card import front_matter, model_card
from distill.run import train
from distill.settings import check
from models import teachers
from models.errors import UserError
from models.seeds import Draws
from models.teachers import is_hub_id, load
from models.teachers.base import TextSpec
from tests import families
from tests.test_families import class_values, f_distill, values
from tests.tiny import save_sana, settings

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def original_keys(state: dict[str, Tensor], layers: int = 1, levels: int = 2) -> dict[str, Tensor]:
    """A U-Net of Stable Diffusion as its authors name its weights: input_blocks, middle_block, output_blocks."""

    def block(level: int, kind: str, index: int) -> str:
        where = level * (layers + 1) + index
        match kind:
            case "downsamplers":
                return f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
            case _:
                return f"input_blocks.{1 + where}.{0 if kind == 'resnets' else 1}"

    def upper(level: int, kind: str, index: int) -> str:
        attended = any(key.startswith(f"up_blocks.{level}.attentions") for key in state)
        if kind == "upsamplers":
            return f"output_blocks.{level * (layers + 1) + layers}.{2 if attended else 1}.conv"
        return f"output_blocks.{level * (layers + 1) + index}.{0 if kind == 'resnets' else 1}"

    renamed: dict[str, Tensor] = {}
    tops = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    }  # fmt: skip
    for key, value in state.items():
        name = key
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(conv\.)?", key):
            side, level, kind, index, _ = found.groups()
            sampler = kind.endswith("samplers")
            place = (block if side == "down" else upper)(int(level), kind, int(index))
            rest = key[found.end() :] if sampler else key[found.end(4) + 1 :]
            name = f"{place}.{rest}"
        elif found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.", key):
            number = 1 if found[1] == "attentions" else 2 * int(found[2])
            name = f"middle_block.{number}.{key[found.end() :]}"
        for old, new in tops.items():
            name = re.sub(rf"^{re.escape(old)}\.", f"{new}.", name)
        if ".resnets." in key:
            for old, new in RESNET.items():
                name = name.replace(f".{old}.", f".{new}.")
        renamed[f"model.diffusion_model.{name}"] = value.contiguous()
    assert len(renamed) == len(state)
    return renamed


def answer(path: object, config: Path | None = None) -> Tensor:
    denoiser, spec = load(str(path), config=config)
    assert isinstance(spec, TextSpec)
    z, t = Draws([0, 1]).normal(*spec.shape), torch.full((2,), 0.5 if "anaSpec" in type(spec).__name__ else 500.0)
    with torch.no_grad():
        return denoiser.denoise(z, t, spec.text(["a red cube", "a sphere"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("sources") / "teacher", "stable_diffusion")


@pytest.mark.parametrize("keys", ["diffusers", "original"])
def test_a_single_file_replaces_the_folders_network(folder: Path, keys: str, tmp_path: Path) -> None:
    """In half precision, as such files are; the folder's own network is not even read."""
    state = {k: v.half() for k, v in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items()}
    changed = {k: v + (0.1 if k == "conv_out.bias" else 0) for k, v in state.items()}
    save_file(original_keys(changed) if keys == "original" else changed, tmp_path / "tuned.safetensors")
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    save_file({k: v.float() for k, v in changed.items()}, whole / "unet/diffusion_pytorch_model.safetensors")
    rest = tmp_path / "rest"
    shutil.copytree(folder, rest)
    (rest / "unet/diffusion_pytorch_model.safetensors").unlink()
    mine = answer(tmp_path / "tuned.safetensors", rest)
    assert torch.equal(mine, answer(whole)) and not torch.allclose(mine, answer(folder), atol=1e-3)


def test_a_single_file_of_sana_and_a_run_from_one(tmp_path: Path) -> None:
    teacher = save_sana(tmp_path / "teacher")
    file = tmp_path / "tuned.safetensors"
    shutil.copy(teacher / "transformer/diffusion_pytorch_model.safetensors", file)
    assert torch.equal(answer(file, teacher), answer(teacher))
    changed = values(tmp_path, file, "run", f_distill("stable_diffusion") | {"gan": None}, True)
    changed["teacher"] = {"path": str(file), "config": str(teacher)}
    changed["method"] = {"kind": "diff_instruct", "critic_turns": 1}
    changed["data"] |= {"size": 32}
    assert train(check(changed, "test")) == 0
    card = (tmp_path / "run/student/README.md").read_text()
    assert front_matter(tmp_path / "run/student/README.md")["license"] == "other" and "licence of the teacher" in card


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("other.safetensors", True, "is no UNet2DConditionModel"),
        ("none.safetensors", True, "there is no file"),
        ("none.safetensors", False, "teacher.config: missing"),
        ("model.ckpt", True, "a pickle"),
        ("folder", True, "only for a single .safetensors file"),
    ],
)
def test_mistakes_with_files_are_named(folder: Path, name: str, config: bool, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name, config=folder if config else None)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- hub


def test_a_hub_id_is_downloaded_without_pickles_or_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(teachers, "hf_hub_download", lambda *_: None)
    assert torch.equal(answer("some-org/some-model"), answer(folder))
    assert asked == {"name": "some-org/some-model", "use_safetensors": True, "trust_remote_code": False}


def test_without_the_hub_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such folder, and it cannot be had from the hub") as caught:
        load("some-org/some-model")
    assert "\n" not in str(caught.value) and "hf download some-org/some-model" in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="has no model_index"):  # a folder that is missing, not a hub id
        load("runs/missing")
    assert not is_hub_id("a/b/c") and not is_hub_id("embedded:x") and not is_hub_id(tmp_path / "a") and is_hub_id("a/b")


# ---------------------------------------------------------------------------------------------- licences and uploads


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n# x\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: research\nlicense_link: LICENSE.md\ntags: [x]\n---\n",
            {"license": "other", "license_name": "research", "license_link": "LICENSE.md"},
        ),
        ("# no metadata\n", {"license": "other"}),
        ("---\n[broken\n---\n", {"license": "other"}),
        (None, {"license": "other"}),
    ],
)
def test_a_student_inherits_its_teachers_licence(readme: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    teacher = families.save(tmp_path / "teacher", "ddpm")
    if readme is not None:
        (teacher / "README.md").write_text(readme)
    config = check(class_values(tmp_path, teacher, "run", False, 1.0), "test")
    _, spec = load(teacher)
    (tmp_path / "README.md").write_text(model_card(config, spec))
    found = front_matter(tmp_path / "README.md")
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    assert "base_model" not in found and found["tags"][-1] == "f_distill"
    stated = "licence of the teacher" in (tmp_path / "README.md").read_text()
    assert stated == (expected["license"] == "other")


def test_embedded_teachers_and_new_ones_are_apache_and_hub_ids_are_base_models(monkeypatch: pytest.MonkeyPatch) -> None:
    config = check(yaml.safe_load(Path("configs/fashion_mnist/quickstart.yaml").read_text()), "test")
    _, spec = load("embedded:fashion_mnist")
    assert "license: apache-2.0\n" in model_card(config, spec)
    monkeypatch.setattr(teachers, "downloaded", lambda _: Path("nowhere"))
    named = config.model_copy(update={"teacher": config.teacher and config.teacher.model_copy(update={"path": "a/b"})})
    card = model_card(named, spec)
    assert "base_model: a/b\n" in card and "license: other\n" in card


class Uploader:
    """Stands for HfApi."""

    calls: list[tuple[str, dict[str, Any]]]

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options | {"files": sorted(p.name for p in options["folder_path"].iterdir())}))
        if options["repo_id"].startswith("closed/"):
            raise ConnectionError("no route\nto the hub")
        return f"https://hub/{options['repo_id']}"


def test_an_upload_is_asked_for_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Uploader.calls = []
    monkeypatch.setattr(upload, "HfApi", Uploader)
    monkeypatch.setattr(upload, "get_token", lambda: None)
    short = {"train__steps": 2, "evaluation": {"num_images": 0}}
    with pytest.raises(UserError, match="needs a token"):
        train(check(settings(tmp_path, "a", **short, push_to_hub="org/name"), "test"))
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(upload, "get_token", lambda: "hf_x")
    assert train(check(settings(tmp_path, "a", **short), "test")) == 0 and not Uploader.calls
    assert train(check(settings(tmp_path, "a", **short, push_to_hub="org/name"), "test")) == 0  # the same run
    assert "uploaded: https://hub/org/name" in capsys.readouterr().out
    (name, _), (_, sent) = Uploader.calls
    assert name == "org/name" and sent["folder_path"] == tmp_path / "a" / "student"
    assert {"README.md", "model_index.json", "pipeline.py", "unet"} <= set(sent["files"])
    with pytest.raises(UserError, match="no route to the hub; the student is in") as caught:
        train(check(settings(tmp_path, "a", **short, push_to_hub="closed/name"), "test"))
    assert "hf upload closed/name" in str(caught.value) and (tmp_path / "a/student/model_index.json").is_file()
    with pytest.raises(UserError, match="push_to_hub"):
        check(settings(tmp_path, "a", push_to_hub="name"), "test")
    assert json.loads((tmp_path / "a/student/model_index.json").read_text())["sigma_init"] == 2.5
