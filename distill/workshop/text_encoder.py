"""Train a text encoder to read captions of the solids world.

python -m distill.workshop.text_encoder runs/solids/text_encoder

Real Sana's text encoder is a language model that was trained before. Trained with the pictures alone, a small one
learns what words mean, and hardly which colour belongs to which solid or which solid stands left. Here it is taught to
say so in every word: linear heads on the first token must name everything in the caption, and heads on the word of each
solid and colour what belongs to it: shape, colour, place, the other solid, the count. Then the heads are dropped.

Cross-attention reads single words, so what counts is how much a solid's word differs when another word does:
``python -m distill.workshop.text_encoder`` prints that change for exchanged colours and relations, beside the share of
held-out captions that are read without a mistake.
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

from eval.binding import exchanged_colours, opposite_relation
from models.errors import UserError, run_command
from models.folders import replace_folder
from models.scene.captions import (
    COLOURS,
    OPPOSITE,
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
from models.teachers import load, miniature
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
"""What the first token is asked for, with the number of answers."""
OWN = {
    "shape": len(SHAPES),
    "colour": 1 + len(COLOURS),
    "role": len(LINKS),
    "other shape": 1 + len(SHAPES),
    "other colour": 1 + len(COLOURS),
    "count": 4,
    "view": 1 + len(SEEN),
}
"""What the word of a solid or of its colour is asked for. Its role is where it stands to the other one."""
SHARPNESS = 16.0
"""Greatest logit. It is bounded so that each answer must take its share of an embedding's length: unbounded heads would
read the answers from traces that the transformer does not see."""


@dataclass(frozen=True)
class Options:
    """Write a text encoder and its tokenizer in transformers' layout."""

    output: tyro.conf.Positional[Path]
    """Folder to write."""
    start: str | None = None
    """Teacher whose text encoder to go on from, a folder or embedded:NAME; default: a new one."""
    width: int = 96
    depth: int = 3
    max_length: int = 16
    steps: int = 4000
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


def own_answers(wanted: Tensor, second: Tensor) -> Tensor:
    """Indices (N, len(OWN)) of words from the :func:`answers` (N, len(PARTS)) of their captions.

    ``second`` (N,) bool: whether the word belongs to the second solid.
    """
    shape, colour, other, other_colour, link, count, view = wanted.unbind(1)
    inverse = torch.tensor([LINKS.index(OPPOSITE.get(role, role)) for role in LINKS])
    turned = torch.stack([(other - 1).clamp(min=0), other_colour, inverse[link], 1 + shape, colour, count, view], 1)
    straight = torch.stack([shape, colour, link, other, other_colour, count, view], 1)
    return torch.where(second[:, None], turned, straight)


class Heads(nn.Module):
    """Answers of bounded logits, each a cosine of the embedding with the answer's own direction."""

    def __init__(self, width: int, parts: dict[str, int]):
        super().__init__()
        self.sizes = list(parts.values())
        self.weight = nn.Parameter(torch.randn(sum(self.sizes), width))

    def forward(self, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over parts, and which rows have every answer right; states (N, D), wanted (N, parts)."""
        logits = SHARPNESS * F.normalize(states, dim=1) @ F.normalize(self.weight, dim=1).T
        parts = logits.split(self.sizes, 1)
        losses = [F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(parts)]
        right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(parts)]).all(0)
        return torch.stack(losses).sum(), right


class Reader(nn.Module):
    """The encoder with heads."""

    def __init__(self, encoder: nn.Module, width: int, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.whole, self.own = Heads(width, PARTS), Heads(width, OWN)
        ids = lambda words: torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
        self.register_buffer("nouns", ids([*SHAPES, *PLURALS.values()]))
        self.register_buffer("colours", ids(COLOURS))
        self.nouns: Tensor
        self.colours: Tensor

    def states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and token ids (B, L)."""
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt")
        return self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.input_ids

    def losses(self, asked: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of captions in which every word has everything right."""
        states, ids = self.states([m["prompt"] for m in asked])
        wanted = torch.tensor([answers(m) for m in asked])
        loss, right = self.whole(states[:, 0], wanted)
        noun = torch.isin(ids, self.nouns)
        rows, places = (noun | torch.isin(ids, self.colours)).nonzero(as_tuple=True)
        second = (noun.long().cumsum(1) - noun.long())[rows, places] > 0  # a solid was named before
        own_loss, own_right = self.own(states[rows, places], own_answers(wanted[rows], second))
        right = right & ~torch.zeros_like(right).index_put((rows[~own_right],), torch.tensor(True))
        return loss + own_loss, right.float().mean()

    @torch.no_grad()
    def changes(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """By how much of its length the word of the first solid and of the second changes from caption to caption."""
        moved: list[list[Tensor]] = [[], []]
        for pair in pairs:
            (first, second), ids = self.states(pair)
            for which, place in enumerate(torch.isin(ids[0], self.nouns).nonzero()[:2, 0]):
                moved[which].append((first[place] - second[place]).norm() / first[place].norm())
        return [float(torch.stack(part).mean()) for part in moved]


def main(options: Options) -> None:
    """Train, say what share of held-out captions is read without a mistake, write."""
    torch.manual_seed(options.seed)
    tokenizer = miniature.new_tokenizer(VOCABULARY, options.max_length)
    tokenizer.padding_side = "right"
    if options.start is None:
        encoder: nn.Module = miniature.new_text_encoder(
            len(tokenizer), options.width, options.depth, options.max_length
        )
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
    for name, make in {"colours exchanged": exchanged_colours, "opposite relation": opposite_relation}.items():
        pairs = [(true["prompt"], false["prompt"]) for true, false in (make(rng) for _ in range(50))]
        first, second = (f"{100 * change:.0f} %" for change in reader.changes(pairs))
        print(f"{name}: the word of the first solid changes by {first}, of the second by {second}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
