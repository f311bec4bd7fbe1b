"""What a person asks for, checked: the settings of a picture, which travel in its file."""

import json
import math
import unicodedata
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.errors import UserError

MAX_PROMPT = 1000
"""Characters of a prompt."""
MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_COUNT = 16
"""Pictures of one answer."""
MAX_GUIDANCE = 30.0


def shown(value: object) -> str:
    """A value for a message: short, and on one line."""
    text = " ".join(str(value)[:200].split())
    return f"{text[:60]}..." if len(text) > 60 else text


def whole(name: str, value: object, low: int, high: int) -> int:
    """``value`` as a whole number from ``low`` to ``high``; UserError if it is none."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name}: {shown(value)} is not a whole number from {low} to {high}")
    if not low <= value <= high:
        raise UserError(f"{name}: {shown(value)} is not from {low} to {high}")
    return value


def real(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a number from ``low`` to ``high``; UserError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}: {shown(value)} is not a number from {low:g} to {high:g}")
    return float(value)


def text(name: str, value: object, longest: int = MAX_PROMPT) -> str:
    """``value`` as one line of text; UserError if it is none, too long, or holds control characters."""
    if not isinstance(value, str):
        raise UserError(f"{name}: a text is needed, not {shown(type(value).__name__)}")
    if len(value) > longest:
        raise UserError(f"{name}: {len(value):,} characters are too many; {longest:,} are the most")
    line = " ".join(value.split())
    for character in line:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise UserError(f"{name}: it holds the control character U+{ord(character):04X}: leave it out")
    return line


@dataclass(frozen=True)
class Ask:
    """The settings of one answer: ``count`` pictures with the noise of ``seed``, ``seed + 1``, ...

    prompt:      a prompt, or the name of a class
    guidance:    None is the model's own
    other_seed:  with ``walk`` in (0, 1] the noise goes that far from ``seed`` to ``other_seed``
    """

    model: str
    prompt: str
    seed: int = 0
    steps: int = 1
    count: int = 1
    guidance: float | None = None
    other_seed: int = 0
    walk: float = 0.0

    @classmethod
    def checked(
        cls,
        model: object,
        prompt: object,
        seed: object = 0,
        steps: object = 1,
        count: object = 1,
        guidance: object = None,
        other_seed: object = 0,
        walk: object = 0.0,
    ) -> "Ask":
        """From anything that a page, a client or a file may send; UserError names the setting that is wrong."""
        return cls(
            model=text("model", model),
            prompt=text("prompt", prompt),
            seed=whole("seed", seed, 0, MAX_SEED),
            steps=whole("steps", steps, 1, MAX_STEPS),
            count=whole("count", count, 1, MAX_COUNT),
            guidance=None if guidance is None else real("guidance", guidance, 0.0, MAX_GUIDANCE),
            other_seed=whole("other_seed", other_seed, 0, MAX_SEED),
            walk=real("walk", walk, 0.0, 1.0),
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, written: str) -> "Ask":
        """UserError if it is not what :meth:`as_json` wrote."""
        try:
            values: Any = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise UserError("the settings in this file cannot be read") from error
        if not isinstance(values, dict) or not {"model", "prompt"} <= set(values):
            raise UserError("the settings in this file are not those of a picture of this studio")
        known = {f.name for f in fields(cls)}
        return cls.checked(**{name: value for name, value in values.items() if name in known})
