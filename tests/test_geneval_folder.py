"""GenEval on photographs: the published prompts, and folders of pictures through real classes with random weights."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import clip as clip_command
from eval import paint
from eval.clip import CLIP
from eval.geneval import coco, folder
from eval.geneval.__main__ import Options, main
from eval.geneval.coco_judge import ColourClassifier, colour_prompts
from eval.geneval.judge import Options as JudgeOptions
from eval.geneval.prompts import HELD_OUT, true_renders
from eval.geneval.solids import SolidsDetector
from eval.pictures import picture_files, read_picture
from eval.text_to_image import painter
from models.errors import UserError
from models.scene.captions import COLOURS, Metadata, prompts
from tests.test_geneval import GOLDEN
from tests.test_mask2former import mmdet_state
from tests.tiny import ROOT, save_sana


def test_the_prompts_are_the_published_ones():
    text = coco.as_lines(coco.metadata())
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN["suite"]["evaluation_metadata_sha256"]
    assert list(coco.CLASSES) == GOLDEN["classes"]
    tags = [json.loads(line)["tag"] for line in text.splitlines()]
    assert {tag: tags.count(tag) for tag in tags} == GOLDEN["suite"]["by_tag"]


def test_colours_are_asked_in_the_published_words():
    for name, templates in GOLDEN["color_prompt_templates"].items():
        assert colour_prompts(name) == [[template.format(c=colour) for template in templates] for colour in COLOURS]


# -------------------------------------------------------------------------------------------- a tiny CLIP, saved


def save_clip(path: Path, quick_gelu: bool = True) -> Path:
    """Random weights in open_clip's folder layout."""
    import open_clip

    model: dict[str, Any] = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path.mkdir(parents=True)
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    network: Any = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_colours_are_the_nearest_mean_of_three_sentences(clip: Path):
    model = CLIP(str(clip), quick_gelu=True)
    classifier = ColourClassifier(model)
    picture = Image.fromarray((torch.rand(50, 20, 3, generator=torch.Generator().manual_seed(2)) * 255).byte().numpy())
    similarity = []
    for texts in colour_prompts("skis"):
        mean = torch.stack([model.texts([text])[0] for text in texts]).mean(0)
        similarity.append(float(mean @ model.pictures([picture])[0] / mean.norm()))
    assert classifier(picture, "skis") == COLOURS[similarity.index(max(similarity))]
    assert float(model.texts(["a cat"]).norm()) == pytest.approx(1, abs=1e-5)


def test_another_activation_than_the_weights_is_an_error(tmp_path: Path):
    plain = save_clip(tmp_path / "plain", quick_gelu=False)
    with pytest.raises(UserError, match="must have QuickGELU"):
        CLIP(str(plain), quick_gelu=True)
    with pytest.raises(UserError, match=r"these weights need QuickGELU: take ViT-L-14-quickgelu"):
        CLIP("ViT-L-14:openai", quick_gelu=True)
    with pytest.raises(UserError, match="neither a folder nor"):
        CLIP("nothing")
    with pytest.raises(UserError, match="cannot be read"):
        CLIP(str(tmp_path))


def test_prompts_become_pictures_and_a_clip_score(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    teacher = save_sana(tmp_path / "teacher", side=4)
    (tmp_path / "prompts.txt").write_text("a photo of a red cube\n\na photo of two cones\n")
    paint.main(paint.Options(str(teacher), tmp_path / "prompts.txt", tmp_path / "pictures", steps=2, each=2))
    files = picture_files(tmp_path / "pictures")
    assert [file.parent.parent.name for file in files] == ["00000", "00000", "00001", "00001"]
    whole = painter(teacher, 2)(["a photo of two cones"], [3])[0]
    assert (read_picture(files[3]).int() - whole.int()).abs().max() <= 1
    clip_command.main(clip_command.Options(tmp_path / "pictures", str(clip), output=tmp_path / "score.json"))
    model, prompts_ = CLIP(str(clip)), ["a photo of a red cube"] * 2 + ["a photo of two cones"] * 2
    cosines = [
        float(model.texts([text])[0] @ model.pictures([Image.open(file)])[0])
        for file, text in zip(files, prompts_, strict=True)
    ]
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["clip_score"] == pytest.approx(sum(cosines) / 4, abs=1e-6) and found["pictures"] == 4
    assert "over 4 pictures" in capsys.readouterr().out
    changes = {"steps": ("steps", 1), "seed": ("seed", 5), "each": ("each", 1), "guidance": ("guidance", 3.0)}
    for named, (option, value) in (changes | {"bytes": ("quantise", "truncate")}).items():
        settings: dict[str, Any] = {"steps": 2, "each": 2} | {option: value}
        with pytest.raises(UserError, match=f"pictures of another painter: .*{named}"):
            paint.main(paint.Options(str(teacher), tmp_path / "prompts.txt", tmp_path / "pictures", **settings))
    with pytest.raises(UserError, match="another painter: weights_sha256"):
        other = save_sana(tmp_path / "other", side=4, seed=1)
        paint.main(paint.Options(str(other), tmp_path / "prompts.txt", tmp_path / "pictures", steps=2, each=2))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="at least one prompt"):
        paint.main(paint.Options(str(teacher), tmp_path / "empty.txt", tmp_path / "pictures"))


# ------------------------------------------------------------------------------------- folders, killed and resumed


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from eval.geneval import mask2former

    base = tmp_path_factory.mktemp("detector")
    state = mmdet_state()
    state["panoptic_head.cls_embed.weight"] *= 400  # sure enough to find umbrellas everywhere
    state["panoptic_head.pixel_decoder.mask_feature.weight"] *= 10
    for index in (0, 2, 4):
        state[f"panoptic_head.mask_embed.{index}.weight"] *= 3
    torch.save(state, base / "tiny.pth")
    mask2former.convert(mask2former.Options(base / "tiny.pth", base / "folder"))
    return base / "folder"


def paint_solids(path: Path, count: int) -> Path:
    """True renders of the solids world as a folder in GenEval's layout."""
    asked = prompts(0, 12)[:count]
    renders = true_renders(asked)
    paints = lambda texts, seeds: renders[list(seeds)]
    folder.paint(paints, asked, path, each=1, identity={})
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 noisy pictures, two of each of ten prompts, the first of which asks for a colour."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda texts, seeds: torch.randint(0, 256, (len(texts), 3, 48, 64), dtype=torch.uint8, generator=generator)
    path = tmp_path_factory.mktemp("photographs") / "images"
    asked = coco.metadata()
    umbrella: Metadata = {
        "tag": "colors",
        "include": [{"class": "umbrella", "count": 1, "color": "red"}],
        "prompt": "u",
    }
    folder.paint(noise, [umbrella, *(asked[27 * i] for i in range(9))], path, each=2, identity={})
    return path


def run(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "eval.geneval", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_killed_and_resumed_the_verdicts_are_the_same(photographs: Path, detector: Path, clip: Path, tmp_path: Path):
    arguments = ["--images", photographs, "--detector", detector, "--clip", clip, "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = run(*arguments, killed)
    results = killed / "results-00000.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if results.is_file() and results.read_bytes().count(b"\n") >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.communicate()
    before = results.read_bytes()
    assert 5 <= before.count(b"\n") < 20, "it was not killed half-way"
    results.write_bytes(before + b'{"picture": "00009/000')
    for output in (killed, whole):
        process = run(*arguments, output)
        printed, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert "geneval (mmdet" in printed
    assert results.read_bytes().startswith(before)
    assert folder.read_records(killed) == folder.read_records(whole) and len(folder.read_records(whole)) == 20
    first, second = (json.loads((output / "geneval.json").read_text()) for output in (killed, whole))
    assert first == second and "counting" in first["scores"]["pictures"]["tasks"]
    records = folder.read_records(whole)
    assert all(record["found"][0]["class"] == "umbrella" for record in records.values())
    asked_for_red = records["00000/00000.png"]
    assert asked_for_red["correct"] or asked_for_red["reason"].startswith(
        "expected red umbrella>=1, found 0 red; and 1"
    )


def test_processes_share_the_pictures(tmp_path: Path):
    images, output = paint_solids(tmp_path / "images", 12), tmp_path / "geneval"
    for rank in range(2):
        process = run("--images", images, "--output", output, env={"RANK": str(rank), "WORLD_SIZE": "2"})
        printed, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert ("6 of 12 pictures are judged" in printed) == (rank == 0)
    lines = [(output / f"results-{rank:05d}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(part) for part in lines] == [6, 6]
    report = json.loads((output / "geneval.json").read_text())
    assert report["name"] == "geneval-solids" and report["scores"]["pictures"]["images"] >= 0.75


def test_processes_paint_and_judge_their_own_prompts(
    detector: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    student = tmp_path / "teacher"
    save_sana(student, side=4)
    asked = coco.metadata()[:5]
    monkeypatch.setattr(coco, "metadata", lambda: asked)
    options = Options(teacher=str(student), teacher_steps=(1,), teacher_guidance=1.0, detector=detector, clip=str(clip))
    output = tmp_path / "out"
    for rank, told in ((1, "4 of 10 pictures are judged"), (0, "by picture, with reasons")):
        monkeypatch.setattr("eval.geneval.__main__.share", lambda rank=rank: (rank, 2))
        main(replace(options, each=2, output=output))
        assert told in capsys.readouterr().out
    report = json.loads((output / "geneval.json").read_text())
    assert [painted["seed"] for painted in report["painted"].values()] == [0]
    assert report["scores"]["teacher, 1 step"]["images"] >= 0
    with pytest.raises(UserError, match="pictures of another painter: seed"):
        main(replace(options, each=2, seed=1, output=output))


def test_verdicts_of_two_judges_are_never_mixed(tmp_path: Path):
    class Stricter(SolidsDetector):
        options = JudgeOptions(threshold=0.99)

    images, output = paint_solids(tmp_path / "images", 6), tmp_path / "out"
    folder.judge_folder(images, SolidsDetector(), output)
    with pytest.raises(UserError, match=r"another protocol: options .*0\.99"):
        folder.judge_folder(images, Stricter(), output)
    paint_solids(images, 7)
    with pytest.raises(UserError, match=r"another protocol: pictures \(6 / 7\)"):
        folder.judge_folder(images, SolidsDetector(), output)


def test_pictures_that_are_there_are_not_painted_again(tmp_path: Path):
    asked, calls = prompts(0, 3), []

    def paints(texts: Any, seeds: Any) -> torch.Tensor:
        calls.append(list(seeds))
        return true_renders([asked[0]] * len(texts), HELD_OUT)

    folder.paint(paints, asked, tmp_path, each=2, seed=7, identity={})
    (tmp_path / "00001" / "samples" / "00001.png").unlink()
    folder.paint(paints, asked, tmp_path, each=2, seed=7, identity={})
    assert calls == [[7, 8], [9, 10], [11, 12], [10]]
    assert [p.name for p in folder.pictures(tmp_path)][:3] == ["00000/00000.png", "00000/00001.png", "00001/00000.png"]
    with pytest.raises(UserError, match="another prompt"):
        folder.paint(paints, asked[::-1], tmp_path, each=2, seed=7, identity={})
    (tmp_path / "paint.json").unlink()
    with pytest.raises(UserError, match=r"no paint\.json says whose"):
        folder.paint(paints, asked, tmp_path, each=2, seed=7, identity={})


def test_mistakes_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="no pictures in GenEval's layout"):
        main(Options(images=tmp_path))
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"metadata\.jsonl is no line"):
        main(Options(images=tmp_path))
    with pytest.raises(UserError, match="leave out --student"):
        main(Options(images=tmp_path, student=tmp_path))
    with pytest.raises(UserError, match="missing; name a student"):
        main(Options())
    with pytest.raises(UserError, match="--num-images: beside --detector"):
        main(Options(student=tmp_path, detector=tmp_path, num_images=20))
    with pytest.raises(UserError, match="--guidance: beside --images"):
        main(Options(images=tmp_path, guidance=2.0))
    with pytest.raises(UserError, match=r"--batch \(0\)"):
        main(Options(student=tmp_path, batch=0))
    with pytest.raises(UserError, match="device: nowhere is not available"):
        main(Options(teacher="embedded:solids", device="nowhere"))
