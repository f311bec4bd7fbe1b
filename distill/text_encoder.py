"""Train a text encoder to read captions of the solids world: python -m distill.text_encoder runs/solids/text_encoder

Real Sana's text encoder is a language model that was trained before. Trained with the pictures alone, a small one
learns what words mean, and hardly which colour belongs to which solid or which solid stands left. Here linear heads on
its last token must name everything in the caption, and heads on each shape's word its colour; then they are dropped.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import PreTrainedTokenizerBase

from models.errors import UserError, run_command
from models.folders import replace_folder
from models.scene.captions import (
    COLOURS,
    PLURALS,
    RELATIONS,
    SEEN,
    SHAPES,
    VOCABULARY,
    Metadata,
    draw,
    held_out,
    things_of,
)
from models.scene.solids import sample_turntable
from models.teachers import load, sana
from models.teachers.sana import SanaSpec

LINKS = ("", "and", *RELATIONS)
PARTS = {
    "shape": len(SHAPES),
    "colour": 1 + len(COLOURS),
    "other shape": 1 + len(SHAPES),
    "other colour": 1 + len(COLOURS),
    "link": len(LINKS),
    "count": 4,
    "view": 1 + len(SEEN),
}
"""What the last token is asked for, with the number of answers."""


@dataclass(frozen=True)
class Options:
    """Write a text encoder and its tokenizer in transformers' layout."""

    output: tyro.conf.Positional[Path]
    """Folder to write."""
    start: str | None = None
    """Teacher whose text encoder to go on from, a folder or embedded:NAME; default: a new one."""
    width: int = 96
    depth: int = 2
    max_length: int = 16
    steps: int = 3000
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0


def caption(rng: random.Random) -> Metadata:
    """One of any task, or, a quarter of them, of a turntable."""
    return sample_turntable(int(rng.random() * 2**53)).metadata if rng.random() < 0.25 else draw(rng)


def answers(metadata: Metadata) -> list[int]:
    """Indices for each of :data:`PARTS`, in the order of the caption's words."""
    things, tag = things_of(metadata), metadata["tag"]
    colour = lambda thing: 0 if thing.colour is None else 1 + COLOURS.index(thing.colour)
    if tag == "counting" or len(things) == 1:
        view = 1 + SEEN.index(metadata["view"]) if "view" in metadata else 0
        return [SHAPES.index(things[0].shape), colour(things[0]), 0, 0, 0, len(things) - 1, view]
    second, link = things[1], "and"
    first = things[0]
    if tag == "position":  # the reference comes first in the metadata, last in the words
        first, second, link = second, first, metadata["include"][1].get("position", ["and"])[0]
    other = 1 + SHAPES.index(second.shape)
    return [SHAPES.index(first.shape), colour(first), other, colour(second), LINKS.index(link), 1, 0]


class Reader(nn.Module):
    """The encoder with heads."""

    def __init__(self, encoder: nn.Module, width: int, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.last = nn.Linear(width, sum(PARTS.values()))
        self.own_colour = nn.Linear(width, 1 + len(COLOURS))
        words = [*SHAPES, *PLURALS.values()]
        self.register_buffer("shape_words", torch.tensor(tokenizer.convert_tokens_to_ids(words)))
        self.shape_words: Tensor

    def losses(self, asked: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and the share of captions whose last token has everything right."""
        tokens = self.tokenizer([m["prompt"] for m in asked], padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = self.encoder(ids, attention_mask=mask)[0]
        wanted = torch.tensor([answers(m) for m in asked])
        logits = self.last(states[torch.arange(len(ids)), mask.sum(1) - 1]).split(list(PARTS.values()), 1)
        loss = sum((F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(logits)), ids.new_zeros(()))
        right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(logits)]).all(0)
        rows, places = torch.isin(ids, self.shape_words).nonzero(as_tuple=True)
        second = torch.cat([rows.new_zeros(1), (rows[1:] == rows[:-1]).long()])
        colours = torch.where(second == 1, wanted[rows, 3], wanted[rows, 1])
        loss = loss + F.cross_entropy(self.own_colour(states[rows, places]), colours)
        return loss, right.float().mean()


def main(options: Options) -> None:
    """Train, say what share of held-out captions is read without a mistake, write."""
    torch.manual_seed(options.seed)
    tokenizer = sana.new_tokenizer(VOCABULARY, options.max_length)
    tokenizer.padding_side = "right"
    if options.start is None:
        encoder: nn.Module = sana.new_text_encoder(len(tokenizer), options.width, options.depth, options.max_length)
    else:
        spec = load(options.start)[1]
        if not isinstance(spec, SanaSpec):
            raise UserError(f"--start: {options.start} is asked for classes, not for prompts")
        encoder = spec.text_encoder.requires_grad_(True).train()
        cast(Any, encoder).resize_token_embeddings(len(tokenizer), mean_resizing=False)
    width: int = cast(Any, encoder).config.hidden_size
    reader, rng, unseen = Reader(encoder, width, tokenizer), random.Random(options.seed), held_out()
    optimizer = torch.optim.AdamW(reader.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.05)
    for _ in (bar := trange(options.steps, desc="text encoder")):
        asked = [m for m in (caption(rng) for _ in range(options.batch_size)) if m["prompt"] not in unseen]
        loss, right = reader.losses(asked)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right.item():.2f}")
    with torch.no_grad():
        kept = [m for m in (draw(rng) for _ in range(20000)) if m["prompt"] in unseen]
        _, right = reader.losses(kept)
    with replace_folder(options.output) as temporary:
        encoder.save_pretrained(temporary / "text_encoder")  # type: ignore[operator]
        tokenizer.save_pretrained(temporary / "tokenizer")
    print(f"{options.output}: reads {100 * float(right):.1f} % of {len(kept)} held-out captions without a mistake")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
