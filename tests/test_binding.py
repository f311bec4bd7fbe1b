"""Loss rises under false captions: nothing for a network that reads no words, something for one that does."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eval import binding
from eval.binding import KINDS, RATIOS, Binding
from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError
from models.process import RectifiedFlow
from models.scene.captions import things_of
from models.teachers import load
from models.teachers.sana import SanaSpec
from tests.tiny import save_network, save_sana


class Oracle(nn.Module):
    """Knows the true x0 of every caption by its text, and answers 1 beside it, under false ones ``wrong`` beside it."""

    def __init__(self, pairs: binding.Pairs, wrong: float):
        super().__init__()
        assert pairs.true.text is not None and pairs.false.text is not None
        self.x0, self.known, self.wrong = pairs.x0, torch.cat([pairs.true.text, pairs.false.text]), wrong

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.text is not None
        found = (cond.text[:, None] == self.known).flatten(2).all(2).float().argmax(1)
        error = torch.where(found < len(self.x0), 1.0, self.wrong)
        return self.x0[found % len(self.x0)] + error[:, None, None, None]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SanaSpec:
    found = load(save_sana(tmp_path_factory.mktemp("binding") / "teacher"))[1]
    assert isinstance(found, SanaSpec)
    return found


def test_the_rise_is_that_of_the_loss(spec: SanaSpec):
    """Off by 1 under true captions and by 3 under false ones: the squared error is nine times as large."""
    measured = Binding(spec, count=5, batch=2)
    pairs = measured.pairs()["colours"]
    denoiser = Denoiser(Oracle(pairs, 3.0), RectifiedFlow(), "x0")
    assert measured.rises(denoiser)["colours"].tolist() == pytest.approx([8.0] * len(RATIOS), rel=1e-3)
    blind = Denoiser(Oracle(pairs, 1.0), RectifiedFlow(), "x0")
    assert measured.rises(blind)["colours"].abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_false_captions_have_the_same_words_but_for_what_is_exchanged(kind: str):
    rng = random.Random(0)
    for _ in range(50):
        true, false = KINDS[kind](rng)
        assert true["prompt"] != false["prompt"] and true["tag"] == false["tag"]
        mine, other = things_of(true), things_of(false)
        match kind:
            case "colours":
                assert [thing.colour for thing in mine] == [thing.colour for thing in reversed(other)]
                assert [thing.shape for thing in mine] == [thing.shape for thing in other]
            case "relation":
                assert mine == other
            case "count":
                assert len(mine) != len(other) and {t.shape for t in mine} == {t.shape for t in other}


def test_the_command_prints_a_line_for_each_kind(tmp_path: Path, spec: SanaSpec, capsys: pytest.CaptureFixture[str]):
    assert spec.source is not None
    binding.main(binding.Options(str(spec.source), count=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == list(KINDS) and all("%" in line for line in lines[-3:])
    with pytest.raises(UserError, match="no teacher that is asked for prompts"):
        binding.main(binding.Options(str(save_network(tmp_path / "classes", None, 0)), count=2))
