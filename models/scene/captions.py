"""Captions of the solids world: GenEval's six task forms, their metadata, and the way back from words to metadata.

Metadata are what GenEval (arXiv 2310.11513) has in one line of ``evaluation_metadata.jsonl``:
``{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"? (counting only), "prompt"}``, with
``"position": [relation, index of the include it refers to]``, always 0: the reference comes first.
"""

import functools
import random
import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

from models.errors import UserError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PAIRS = ("two_object", "position", "color_attr")
"""The tasks whose captions name two solids apart."""
SHAPES = ("cube", "sphere", "cylinder", "cone", "torus", "pyramid")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""GenEval's colours, in the order in which its judge lists them."""
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
VIEWS = ("front", "side", "back")
TURN = 15
"""Degrees between the azimuths that have words."""
AZIMUTHS = tuple(str(angle) for angle in range(0, 360, TURN))
SEEN = (*(f"{view} view" for view in VIEWS), *(f"seen from {angle} degrees" for angle in AZIMUTHS))
"""Where the camera of a turntable's picture stands, added to a caption after a comma: coarse, or to 15 degrees."""

T = TypeVar("T")

PLURALS = {shape: "tori" if shape == "torus" else shape + "s" for shape in SHAPES}
VOCABULARY = (
    *("a", "an", "photo", "of", "and", "left", "right", "above", "below", ",", "view"),
    *NUMBERS.values(),
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    *VIEWS,
    *("seen", "from", "degrees"),
    *AZIMUTHS,
)
"""Every word of every caption; a comma is a word."""


class Thing(NamedTuple):
    """One solid of a caption; ``colour`` None where the caption names none."""

    shape: str
    colour: str | None = None


Include = TypedDict(
    "Include",
    {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[list[Any]]},
)


class Metadata(TypedDict):
    """A prompt and what its picture must and must not contain; the order of keys is GenEval's.

    ``view`` is ours: one of :data:`SEEN`.
    """

    tag: str
    include: list[Include]
    exclude: NotRequired[list[Include]]
    view: NotRequired[str]
    prompt: str


# ------------------------------------------------------------------------------------------ things to metadata


def _named(thing: Thing) -> str:
    words = thing.shape if thing.colour is None else f"{thing.colour} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _include(thing: Thing, position: list[Any] | None = None) -> Include:
    include: Include = {"class": thing.shape, "count": 1}
    if thing.colour is not None:
        include["color"] = thing.colour
    if position is not None:
        include["position"] = position
    return include


def describe(things: Sequence[Thing], relation: str | None = None) -> Metadata:
    """Metadata of one thing, of two of different shapes, or of two to four of one shape (then without colours).

    With ``relation``, which of :data:`RELATIONS`, the first thing stands in it to the second.
    """
    first, count = things[0], len(things)
    if count == 1:
        tag = "single_object" if first.colour is None else "colors"
        return {"tag": tag, "include": [_include(first)], "prompt": f"a photo of {_named(first)}"}
    if all(thing.shape == first.shape for thing in things):
        return {
            "tag": "counting",
            "include": [{"class": first.shape, "count": count}],
            "exclude": [{"class": first.shape, "count": count + 1}],
            "prompt": f"a photo of {NUMBERS[count]} {PLURALS[first.shape]}",
        }
    second = things[1]
    if relation is not None:
        include = [_include(second), _include(first, [relation, 0])]
        prompt = f"a photo of {_named(first)} {relation} {_named(second)}"
        return {"tag": "position", "include": include, "prompt": prompt}
    tag = "two_object" if first.colour is None and second.colour is None else "color_attr"
    include = [_include(first), _include(second)]
    return {"tag": tag, "include": include, "prompt": f"a photo of {_named(first)} and {_named(second)}"}


def seen(metadata: Metadata, view: str) -> Metadata:
    """The same with one of :data:`SEEN` in its prompt."""
    return {**metadata, "view": view, "prompt": f"{metadata['prompt']}, {view}"}


def things_of(metadata: Metadata) -> list[Thing]:
    """What a picture contains, in the order of ``include``: one thing for every solid."""
    return [Thing(i["class"], i.get("color")) for i in metadata["include"] for _ in range(i["count"])]


# ----------------------------------------------------------------------------------------------------- drawing


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of ``options``. Of Python's generator only ``random()`` is promised to stay the same in later versions."""
    return options[int(rng.random() * len(options))]


def draw(rng: random.Random, task: str | None = None) -> Metadata:
    """Random metadata of one of :data:`TASKS`, each as likely when ``task`` is None.

    Position captions name each colour half of the time; the two colours of ``color_attr`` differ.
    """
    task = task or pick(rng, TASKS)
    first = pick(rng, SHAPES)
    second = pick(rng, [shape for shape in SHAPES if shape != first])
    colour = pick(rng, COLOURS)
    match task:
        case "single_object":
            return describe([Thing(first)])
        case "two_object":
            return describe([Thing(first), Thing(second)])
        case "counting":
            return describe([Thing(first)] * pick(rng, list(NUMBERS)))
        case "colors":
            return describe([Thing(first, colour)])
        case "color_attr":
            other = pick(rng, [c for c in COLOURS if c != colour])
            return describe([Thing(first, colour), Thing(second, other)])
        case "position":
            colours = [pick(rng, COLOURS) if rng.random() < 0.5 else None for _ in range(2)]
            return describe([Thing(first, colours[0]), Thing(second, colours[1])], pick(rng, RELATIONS))
    raise ValueError(f"no task '{task}'; there are {TASKS}")


def prompts(seed: int, count: int, exclude: Container[str] = ()) -> list[Metadata]:
    """``count`` metadata for an evaluation, the six tasks in turn, without the captions in ``exclude``.

    Those of one task differ from each other until it has no more captions (single_object has six), then they repeat.
    ``json.dumps`` of one is a line of GenEval's file. Raises UserError if ``exclude`` leaves a task without a caption.
    """
    rng = random.Random(seed)
    lists: list[list[Metadata]] = []
    for index, task in enumerate(TASKS):
        wanted = len(range(index, count, len(TASKS)))
        found: dict[str, Metadata] = {}
        misses = 0
        # 3,000 misses in a row: nothing new is left, for the small tasks have at most 60 captions of equal probability.
        while len(found) < wanted and misses < 3000:
            metadata = draw(rng, task)
            new = metadata["prompt"] not in found and metadata["prompt"] not in exclude
            misses = 0 if new else misses + 1
            if new:
                found[metadata["prompt"]] = metadata
        if wanted and not found:
            raise UserError(f"prompts: every caption of the task {task} is excluded")
        lists.append(list(found.values()))
    return [lists[i % len(TASKS)][i // len(TASKS) % len(lists[i % len(TASKS)])] for i in range(count)]


EVALUATION = 2026
"""Seed of the prompts that students are judged by."""


@functools.cache
def held_out() -> frozenset[str]:
    """Captions that no training picture has: of the prompts for evaluation those that join two solids.

    The other tasks have too few captions to keep some back.
    """
    return frozenset(m["prompt"] for m in prompts(EVALUATION, 600) if m["tag"] in ("position", "color_attr"))


# ----------------------------------------------------------------------------------------------------- parsing


def words(prompt: str) -> list[str]:
    """Lower-case words of a prompt; every punctuation mark but a final full stop is a word of its own."""
    return re.findall(r"[\w'-]+|[^\w\s]", prompt.lower().strip().removesuffix("."))


def unknown_words(prompt: str) -> list[str]:
    """Words that no caption uses, in order, each once."""
    return list(dict.fromkeys(word for word in words(prompt) if word not in VOCABULARY))


_THING = rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_ONE_OR_TWO = re.compile(rf"a photo of {_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")
_MANY = re.compile(rf"a photo of ({'|'.join(NUMBERS.values())}) ({'|'.join(PLURALS.values())})")


def parse(prompt: str) -> Metadata:
    """Metadata of a caption in any of the six forms; capitals, spaces, ``a``/``an`` and a final full stop are forgiven.

    Raises UserError that lists the unknown words, or says which sentences are understood.
    """
    if unknown := unknown_words(prompt):
        raise UserError(f"prompt: unknown words: {', '.join(unknown)}; known are: {' '.join(VOCABULARY)}")
    text = " ".join(words(prompt))
    if many := _MANY.fullmatch(text):
        count = next(n for n, word in NUMBERS.items() if word == many[1])
        shape = next(s for s, plural in PLURALS.items() if plural == many[2])
        return describe([Thing(shape)] * count)
    found = _ONE_OR_TWO.fullmatch(text)
    if not found:
        raise UserError(
            f"prompt: '{prompt}' is not of a known form; write 'a photo of' and then, for example, 'a cube', "
            "'a red cube', 'three cubes', 'a red cube and a cone' or 'a cube left of a blue cone'"
        )
    colour, shape, link, other_colour, other_shape = found.groups()
    if link is None:
        return describe([Thing(shape, colour)])
    if shape == other_shape:
        raise UserError(f"prompt: '{prompt}' names {shape} twice; take two shapes, or 'two {PLURALS[shape]}'")
    return describe([Thing(shape, colour), Thing(other_shape, other_colour)], None if link == "and" else link)
