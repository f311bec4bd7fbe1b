"""The text encoder that is taught to read before it is asked to paint."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from distill.workshop import text_encoder
from distill.workshop.text_encoder import LINKS, OWN, SHARPNESS, Heads, Options, Reader, answers, caption, own_answers
from models.errors import UserError
from models.scene.captions import COLOURS, SEEN, SHAPES, VOCABULARY, Metadata, draw, parse, seen
from models.teachers import miniature
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


def told(prompt: str, second: bool) -> dict[str, str | int]:
    """What the word of the first or second solid of a caption is asked for, in words."""
    found = own_answers(torch.tensor([answers(parse(prompt))]), torch.tensor([second]))[0].tolist()
    shape, colour, role, other, other_colour, count, view = found
    colours, shapes = ("", *COLOURS), ("", *SHAPES)
    words = (SHAPES[shape], colours[colour], LINKS[role], shapes[other], colours[other_colour], count + 1, view)
    return dict(zip(OWN, words, strict=True))


def test_each_solids_word_is_asked_for_what_belongs_to_it():
    prompt = "a photo of a red cube left of a blue sphere"
    first, second = told(prompt, False), told(prompt, True)
    assert list(first.values()) == ["cube", "red", "left of", "sphere", "blue", 2, 0]
    assert list(second.values()) == ["sphere", "blue", "right of", "cube", "red", 2, 0]
    assert list(told("a photo of a cone and a torus", True).values()) == ["torus", "", "and", "cone", "", 2, 0]
    assert list(told("a photo of three cubes", False).values()) == ["cube", "", "", "", "", 3, 0]


def test_a_head_cannot_shout():
    heads = Heads(8, {"a": 2, "b": 3})
    loss, right = (x.detach() for x in heads(1000 * torch.eye(8)[:2], torch.zeros(2, 2).long()))
    assert right.shape == (2,) and 0 < float(loss) < 2 * 2 * SHARPNESS
    assert float(loss) == pytest.approx(float(heads(torch.eye(8)[:2], torch.zeros(2, 2).long())[0].detach()), rel=1e-5)


def test_it_learns_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A few small steps: a solid's word changes when colours are exchanged, or the relation, also the first's."""
    text_encoder.main(Options(tmp_path / "made", width=64, depth=2, steps=300, batch_size=32, lr=4e-3))
    said = capsys.readouterr().out
    assert "held-out captions without a mistake" in said and "opposite relation" in said
    tokenizer = miniature.new_tokenizer(VOCABULARY, 16)
    untrained = Reader(miniature.new_text_encoder(len(tokenizer), 64, 2, 16), 64, tokenizer)
    encoder = miniature.new_text_encoder(len(tokenizer), 64, 2, 16)
    encoder.load_state_dict(load_file(tmp_path / "made" / "text_encoder" / "model.safetensors"))
    taught = Reader(encoder, 64, tokenizer)
    colours = [("a photo of a red cube and a blue cone", "a photo of a blue cube and a red cone")]
    relation = [("a photo of a cube left of a cone", "a photo of a cube right of a cone")]
    for pairs in (colours, relation):
        assert min(taught.changes(pairs)) > max(0.4, 1.3 * min(untrained.changes(pairs)))
    assert (tmp_path / "made" / "tokenizer" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "made" / "text_encoder" / "config.json").read_text())
    assert config["is_causal"] is False
    with pytest.raises(UserError, match="for classes"):
        text_encoder.main(Options(tmp_path / "made", start="embedded:fashion_mnist"))


def test_a_stock_library_reads_both_ways(tmp_path: Path):
    """The saved encoder, loaded as pipelines load it: a later word changes an earlier one, padding none."""
    miniature.new_text_encoder(20, 32, 1, 8).save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    ids, mask = torch.tensor([[1, 5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    other, padded = ids.clone(), ids.clone()
    other[0, 3], padded[0, 4] = 9, 9
    with torch.no_grad():
        plain, changed, same = (encoder(x, attention_mask=mask)[0][0] for x in (ids, other, padded))
    assert (plain - changed)[1].abs().max() > 1e-3 and torch.equal(plain[:4], same[:4])


def test_a_vocabulary_that_has_grown_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = save_sana(tmp_path / "teacher")
    monkeypatch.setattr(text_encoder, "VOCABULARY", (*VOCABULARY, "turquoise"))
    text_encoder.main(Options(tmp_path / "made", start=str(teacher), steps=1, lr=1e-9))
    before = load_file(teacher / "text_encoder/model.safetensors")["embed_tokens.weight"]
    after = load_file(tmp_path / "made/text_encoder/model.safetensors")["embed_tokens.weight"]
    assert len(after) == len(before) + 1 and torch.allclose(after[:-1], before, atol=1e-6)
