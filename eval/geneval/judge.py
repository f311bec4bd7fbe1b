"""GenEval's judge: detections and a prompt's metadata to right or wrong, with the reason.

Agrees with the published evaluate_images.py on the goldens of tests/golden, its own wording of reasons included. One
thing there is undefined and settled here: objects of equal score keep the detector's order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.scene.captions import COLOURS, TASKS


@dataclass(frozen=True)
class Detection:
    """One object: ``box`` is x1, y1, x2, y2 in pixels, y down; ``mask`` (H, W) bool or None if there is only a box."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Options:
    """The original's options with its values."""

    threshold: float = 0.3
    """Objects count whose score is above it."""
    counting_threshold: float = 0.9
    """The same for prompts that count."""
    max_objects: int = 16
    """Objects of a class, the best ones."""
    max_overlap: float = 1.0
    """Objects that overlap a better one by this IoU or more are dropped; 1: none is."""
    position_threshold: float = 0.1
    """Share of both sizes that an offset must exceed before it is a relation."""
    bgcolor: str = "#999"
    """What lies around an object whose colour is asked; "original": the picture."""
    crop: bool = True
    """Cut the object out before its colour is asked."""


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Overlap of two boxes whose last pixels belong to them; 0 for boxes without an inside."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - both
    return both / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> list[str]:
    """Where box ``a`` stands as seen from ``b``: none, one or two of left of, right of, above, below, by name."""
    corners = np.array([a[:4], b[:4]], dtype=np.float32).reshape(2, 2, 2)
    offset = corners[0].mean(0) - corners[1].mean(0)
    margin = threshold * np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return []
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"above": dy < -0.5, "below": dy > 0.5, "left of": dx < -0.5, "right of": dx > 0.5}
    return [name for name, true in holds.items() if true]


def kept(
    detections: Iterable[Detection], options: Options = Options(), counting: bool = False
) -> dict[str, list[Detection]]:
    """The objects that count, by class, best first."""
    threshold = np.float32(options.counting_threshold if counting else options.threshold)
    classes: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -np.float32(d.score)):
        if np.float32(detection.score) > threshold and len(classes[detection.label]) < options.max_objects:
            classes[detection.label].append(detection)
    for label, objects in classes.items():
        best: list[Detection] = []
        for candidate in objects:
            if options.max_overlap == 1 or all(iou(o.box, candidate.box) < options.max_overlap for o in best):
                best.append(candidate)
        classes[label] = best
    return {label: objects for label, objects in classes.items() if objects}


def cutout(image: Image.Image, detection: Detection, options: Options = Options()) -> Image.Image:
    """What the colour classifier is shown of an object."""
    if options.bgcolor != "original" and detection.mask is not None:
        blank = Image.new("RGB", image.size, options.bgcolor)
        image = Image.composite(image, blank, Image.fromarray(detection.mask))
    return image.crop(detection.box) if options.crop else image  # type: ignore[arg-type]


def judge(
    detections: Iterable[Detection],
    metadata: Mapping[str, Any],
    options: Options = Options(),
    colour_of: Callable[[Detection], str] | None = None,
) -> tuple[bool, str]:
    """Whether a picture is right, and what is wrong with it, a line each.

    ``metadata`` is a line of GenEval's file: everything in ``include`` must be there, nothing in ``exclude``.
    ``colour_of`` names an object's colour, one of ``captions.COLOURS``; needed where the metadata name one.
    """
    objects = kept(detections, options, metadata["tag"] == "counting")
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for wanted in metadata.get("include", ()):
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        reason = _missing(wanted, found, groups, options, colour_of)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    for unwanted in metadata.get("exclude", ()):
        number = len(objects.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    return not reasons, "\n".join(reasons)


def _missing(
    wanted: Mapping[str, Any],
    found: list[Detection],
    groups: list[list[Detection] | None],
    options: Options,
    colour_of: Callable[[Detection], str] | None,
) -> str:
    """What is wrong with the objects of one entry of ``include``; empty if nothing is."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if colour := wanted.get("color"):
        if colour_of is None:
            raise ValueError(f"the prompt asks for a {colour} {name}: judging it needs colour_of")
        colours = [colour_of(detection) for detection in found]
        if colours.count(colour) < count:
            seen = ", ".join(f"{colours.count(c)} {c}" for c in COLOURS if c in colours)
            return f"expected {colour} {name}>={count}, found {colours.count(colour)} {colour}; and {seen}"
    if "position" in wanted:
        relation, target = wanted["position"]
        group = groups[target]
        if group is None:
            return f"no target for {name} to be {relation}"
        for a in found:
            for b in group:
                true = relations(a.box, b.box, options.position_threshold)
                if relation not in true:
                    return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return ""


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of right pictures: of each task, of all, of prompts with a right one; ``score`` is the tasks' mean.

    ``results`` are dictionaries with ``tag``, ``prompt`` and ``correct``, one of each picture.
    """
    tasks: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[str, bool] = defaultdict(bool)
    for result in results:
        tasks[result["tag"]].append(result["correct"])
        prompts[result["prompt"]] |= result["correct"]
    shares = {
        task: mean(map(float, tasks[task])) for task in [*TASKS, *sorted(set(tasks) - set(TASKS))] if task in tasks
    }
    return {
        "tasks": shares,
        "score": mean(shares.values()),
        "images": mean(float(result["correct"]) for result in results),
        "prompts": mean(map(float, prompts.values())),
    }
