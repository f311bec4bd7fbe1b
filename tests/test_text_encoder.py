"""The text encoder that is taught to read before it is asked to paint."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import text_encoder
from distill.text_encoder import LINKS, PARTS, Options, Reader, answers, caption
from models.errors import UserError
from models.scene.captions import COLOURS, SEEN, SHAPES, VOCABULARY, Metadata, draw, parse, seen
from models.teachers import sana
from tests.tiny import save_sana


def spelled(metadata: Metadata) -> str:
    """The caption that the answers stand for."""
    shape, colour, other, other_colour, link, count, view = answers(metadata)
    number = ("", "two ", "three ", "four ")[count if not link else 0]
    first = f"{number}{COLOURS[colour - 1] + ' ' if colour else ''}{SHAPES[shape]}"
    second = (
        f" {LINKS[link]} {COLOURS[other_colour - 1] + ' ' if other_colour else ''}{SHAPES[other - 1]}" if link else ""
    )
    return first + second + (f", {SEEN[view - 1]}" if view else "")


def test_answers_say_all_that_a_caption_says():
    assert spelled(parse("a photo of a red cube left of a sphere")) == "red cube left of sphere"
    assert spelled(parse("a photo of a cone and a blue torus")) == "cone and blue torus"
    assert spelled(seen(parse("a photo of a red cube"), "back view")) == "red cube, back view"
    rng = random.Random(0)
    assert sum("view" in caption(rng) for _ in range(400)) == pytest.approx(100, abs=30)
    for _ in range(300):
        metadata = draw(rng)
        words = metadata["prompt"].removeprefix("a photo of ").replace("tori", "torus")
        plain = " ".join(word.removesuffix("s") for word in words.split() if word not in ("a", "an"))
        assert " ".join(word.removesuffix("s") for word in spelled(metadata).split()) == plain


def test_it_learns_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = sana.new_tokenizer(VOCABULARY, 16)
    asked = [draw(random.Random(i)) for i in range(64)]
    torch.manual_seed(0)
    untrained, _ = Reader(sana.new_text_encoder(len(tokenizer), 32, 1, 16), 32, tokenizer).losses(asked)
    guessing = sum(float(torch.tensor(float(n)).log()) for n in (*PARTS.values(), 1 + len(COLOURS)))
    assert untrained.item() == pytest.approx(guessing, rel=0.2)
    text_encoder.main(Options(tmp_path / "made", width=32, depth=2, steps=60, batch_size=64, lr=5e-3))
    assert "held-out captions without a mistake" in capsys.readouterr().out
    encoder = sana.new_text_encoder(len(tokenizer), 32, 2, 16)
    encoder.load_state_dict(load_file(tmp_path / "made" / "text_encoder" / "model.safetensors"))
    assert (tmp_path / "made" / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="for classes"):
        text_encoder.main(Options(tmp_path / "made", start="embedded:fashion_mnist"))


def test_a_vocabulary_that_has_grown_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = save_sana(tmp_path / "teacher")
    monkeypatch.setattr(text_encoder, "VOCABULARY", (*VOCABULARY, "turquoise"))
    text_encoder.main(Options(tmp_path / "made", start=str(teacher), steps=1, lr=1e-9))
    before = load_file(teacher / "text_encoder/model.safetensors")["embed_tokens.weight"]
    after = load_file(tmp_path / "made/text_encoder/model.safetensors")["embed_tokens.weight"]
    assert len(after) == len(before) + 1 and torch.allclose(after[:-1], before, atol=1e-6)
