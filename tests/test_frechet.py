"""The Fréchet distance and its statistics against other implementations and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.frechet import Statistics, frechet_distance


def pair(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Two correlated sets with a large common mean and different spreads."""
    generator = torch.Generator().manual_seed(n + m + d)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    a = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + 3
    b = 1.3 * torch.randn(m, d, generator=generator, dtype=torch.float64) @ mixing + 3.2
    return a, b


SIZES = [(40, 50, 64), (40, 500, 64), (500, 400, 64), (64, 64, 64), (65, 66, 64)]


@pytest.mark.parametrize("n, m, d", SIZES)
def test_agrees_with_torch_fidelity(n: int, m: int, d: int):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = pair(n, m, d)
    stats = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
    expected = fidelity.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, m, d", SIZES)
def test_agrees_with_torchmetrics(n: int, m: int, d: int):
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = pair(n, m, d)
    expected = float(fid._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, m, d", SIZES)
def test_features_and_statistics_give_the_same(n: int, m: int, d: int):
    a, b = pair(n, m, d)
    direct = frechet_distance(a, b)
    for left, right in [(Statistics.of(a), b), (a, Statistics.of(b)), (Statistics.of(a), Statistics.of(b))]:
        assert frechet_distance(left, right) == pytest.approx(direct, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(direct, rel=1e-9)
    assert frechet_distance(a.numpy(), b.numpy()) == direct


def test_closed_form_of_diagonal_gaussians():
    signs = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]).double()
    a, b = signs * torch.tensor([1.0, 2.0]), signs * torch.tensor([3.0, 5.0]) + torch.tensor([1.0, -2.0])
    scale = (4 / 3) ** 0.5  # the divisor n - 1 of four points
    expected = 1 + 4 + (scale * 2) ** 2 + (scale * 3) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_equal_sets_are_at_zero_and_never_below():
    for n in (20, 300):
        a, _ = pair(n, 2, 64)
        value = frechet_distance(a, a.clone())
        assert 0 <= value < 1e-9 * float(a.var(0).sum())
        assert 0 <= frechet_distance(Statistics.of(a), Statistics.of(a.clone())) < 1e-5 * float(a.var(0).sum())


def test_constant_and_duplicated_features():
    constant, (a, _) = torch.ones(10, 8), pair(100, 2, 8)
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, constant + 2) == pytest.approx(8 * 4)
    expected = float((a.mean(0) - 1).square().sum() + a.var(0).sum())
    assert frechet_distance(constant, a) == pytest.approx(expected)
    twice = torch.cat([a, a])
    assert 0 < frechet_distance(twice, a) < 1e-3  # the divisor n - 1 differs, nothing else


@pytest.mark.parametrize("cuts", [[1], [7, 8, 90], [50]])
def test_streaming_and_merging_are_exact(cuts: list[int]):
    a, _ = pair(100, 2, 16)
    a = a + 1000
    streamed, merged = Statistics(), Statistics()
    for part in a.tensor_split(cuts):
        streamed.update(part)
        merged.merge(Statistics.of(part))
    for statistics in (streamed, merged):
        assert statistics.n == 100
        torch.testing.assert_close(statistics.mean, a.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(statistics.covariance, a.T.cov(), rtol=1e-10, atol=1e-11)


def test_merging_an_empty_set_changes_nothing():
    a, _ = pair(30, 2, 4)
    statistics, empty = Statistics.of(a), Statistics()
    before = statistics.covariance
    statistics.merge(empty)
    empty.merge(statistics)
    assert torch.equal(statistics.covariance, before)
    torch.testing.assert_close(empty.covariance, before)


def test_float32_features_are_summed_in_float64():
    a, b = pair(2000, 2000, 16)
    a, b = (a + 300).float(), (b + 300).float()
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(
        frechet_distance(a.double(), b.double()), rel=1e-9
    )


def test_save_and_load_without_pickle(tmp_path: Path):
    a, b = pair(100, 90, 12)
    statistics = Statistics({"data": "x", "seed": 1})
    statistics.update(a)
    statistics.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert set(stored) == {"mu", "sigma", "n", "provenance"} and stored["sigma"].dtype == np.float64
    loaded = Statistics.load(tmp_path / "a.npz")
    assert (loaded.n, loaded.provenance) == (100, {"data": "x", "seed": 1})
    assert frechet_distance(loaded, b) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    loaded.update(b)
    torch.testing.assert_close(loaded.covariance, torch.cat([a, b]).T.cov())


@pytest.mark.parametrize(
    "a, b, words",
    [
        (torch.ones(1, 4), torch.ones(9, 4), "at least 2 pictures"),
        (torch.ones(0, 4), torch.ones(9, 4), "at least 2 pictures"),
        (torch.ones(9, 4), torch.ones(9, 5), "4 and 5 dimensions"),
        (torch.ones(9), torch.ones(9, 4), "must be a matrix"),
        (torch.ones(9, 4, 1), torch.ones(9, 4), "must be a matrix"),
        (torch.full((9, 4), float("nan")), torch.ones(9, 4), "NaN or infinity"),
        (torch.ones(9, 4), torch.full((9, 4), float("inf")), "NaN or infinity"),
    ],
)
def test_errors_are_one_clear_line(a: Tensor, b: Tensor, words: str):
    with pytest.raises(ValueError, match=words) as raised:
        frechet_distance(a, b)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError):
        frechet_distance(Statistics.of(a), Statistics.of(b))


def test_statistics_refuse_other_dimensions():
    statistics = Statistics.of(torch.ones(3, 4))
    with pytest.raises(ValueError, match="5 dimensions cannot join"):
        statistics.update(torch.ones(3, 5))
    with pytest.raises(ValueError, match="5 dimensions cannot join"):
        statistics.merge(Statistics.of(torch.ones(3, 5)))
