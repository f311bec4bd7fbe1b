"""Conditions alone: classes or prompts, drawn at random."""

from collections.abc import Callable, Sequence

import torch

from models.condition import Condition
from models.seeds import Draws
from models.teachers.base import TextSpec


class Classes:
    """Conditions alone: classes drawn uniformly, of all ``count`` or of ``only``."""

    def __init__(self, count: int, only: list[int] | None = None):
        self.ids = torch.tensor(range(count) if only is None else only)

    def sample(self, draws: Draws) -> Condition:
        """One condition for each row of ``draws``."""
        index = (draws.uniform() * len(self.ids)).long().clamp(max=len(self.ids) - 1)
        return Condition(class_ids=self.ids.to(index.device)[index])


class Captions:
    """Conditions alone: of ``count`` prompts, drawn uniformly; ``embed`` has them by their numbers."""

    def __init__(self, count: int, embed: Callable[[list[int]], Condition]):
        self.count, self.embed = count, embed

    @classmethod
    def of(cls, prompts: Sequence[str], spec: TextSpec) -> "Captions":
        """Of a list of prompts."""
        return cls(len(prompts), lambda indices: spec.text([prompts[i] for i in indices]))

    def sample(self, draws: Draws) -> Condition:
        """One condition for each row of ``draws``."""
        index = (draws.uniform() * self.count).long().clamp(max=self.count - 1)
        return self.embed(index.tolist()).to(draws.device)
