"""GenEval's 553 prompts (arXiv 2310.11513): its vocabulary, and the rules by which its prompt file was drawn.

    python -m eval.geneval.coco evaluation_metadata.jsonl

writes the published file byte for byte: the draws and their order are those of the published generator with seed 43.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from models.errors import UserError, run_command
from models.scene.captions import COLOURS, NUMBERS, RELATIONS, Include, Metadata

CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
"""COCO's 80 classes in its order, three of them renamed by GenEval: detectors are mapped by index, not by name."""
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the published evaluation_metadata.jsonl."""
SEED, EACH = 43, 100


def _an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return name + ("es" if name[-1] == "s" else "s")


def _coloured(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """``count`` different classes with as many different colours; persons have none."""
    if count == 1:
        indices, colours = [int(rng.choice(len(CLASSES) - 1))], [int(rng.choice(len(COLOURS)))]
    else:
        indices = rng.choice(len(CLASSES) - 1, size=count, replace=False).tolist()
        colours = rng.choice(len(COLOURS), size=count, replace=False).tolist()
    return [(CLASSES[1 + i], COLOURS[c]) for i, c in zip(indices, colours, strict=True)]


def _two(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(len(CLASSES), size=2, replace=False).tolist()
    return CLASSES[first], CLASSES[second]


def _two_object(rng: np.random.Generator) -> Metadata:
    first, second = _two(rng)
    include: list[Include] = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {_an(first)} and {_an(second)}"}


def _counting(rng: np.random.Generator) -> Metadata:
    name, count = CLASSES[int(rng.choice(len(CLASSES)))], int(rng.integers(2, 4, endpoint=True))
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {_plural(name)}",
    }


def _colors(rng: np.random.Generator) -> Metadata:
    ((name, colour),) = _coloured(rng, 1)
    include: list[Include] = [{"class": name, "count": 1, "color": colour}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_an(colour)} {name}"}


def _position(rng: np.random.Generator) -> Metadata:
    first, second = _two(rng)
    relation = RELATIONS[int(rng.choice(len(RELATIONS)))]
    include: list[Include] = [
        {"class": second, "count": 1},
        {"class": first, "count": 1, "position": [relation, 0]},
    ]
    return {"tag": "position", "include": include, "prompt": f"a photo of {_an(first)} {relation} {_an(second)}"}


def _color_attr(rng: np.random.Generator) -> Metadata:
    pairs = _coloured(rng, 2)
    include: list[Include] = [{"class": name, "count": 1, "color": colour} for name, colour in pairs]
    first, second = (f"{_an(colour)} {name}" for name, colour in pairs)
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {first} and {second}"}


def metadata() -> list[Metadata]:
    """The 553 prompts in the published order; RuntimeError if numpy no longer draws what it drew."""
    rng = np.random.default_rng(SEED)
    drawn: list[Metadata] = [
        {
            "tag": "single_object",
            "include": [{"class": CLASSES[i], "count": 1}],
            "prompt": f"a photo of {_an(CLASSES[i])}",
        }
        for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False).tolist()
    ]
    for task in (_two_object, _counting, _colors, _position, _color_attr):
        drawn += [task(rng) for _ in range(EACH)]
    unique = list({json.dumps(line): line for line in drawn}.values())
    if hashlib.sha256(as_lines(unique).encode()).hexdigest() != SHA256:
        raise RuntimeError("the prompts are not the published ones: this numpy draws other numbers from a seed")
    return unique


def as_lines(prompts: list[Metadata]) -> str:
    """The text of evaluation_metadata.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in prompts)


def main(path: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write the prompt file of GenEval."""
    try:
        path.write_text(as_lines(metadata()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    print(f"{path}: {len(metadata())} prompts")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
