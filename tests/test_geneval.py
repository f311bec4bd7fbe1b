"""The judge against the published one's own answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eval.geneval import Detection, Options, judge, summarize
from eval.geneval.judge import COLOURS, cutout, iou, kept, relations

GOLDEN = json.loads((Path(__file__).parent / "golden" / "geneval_golden.json").read_text())


def picture(spec: dict[str, Any]) -> Image.Image:
    image = Image.new("RGB", tuple(spec["size"]), tuple(spec["fill"]))
    canvas = ImageDraw.Draw(image)
    for x1, y1, x2, y2, colour in spec.get("rects", []):
        canvas.rectangle((x1, y1, x2 - 1, y2 - 1), tuple(colour))
    return image


def mask(rectangles: list[list[int]] | None, size: list[int]) -> np.ndarray | None:
    if rectangles is None:
        return None
    found = np.zeros((size[1], size[0]), dtype=bool)
    for x1, y1, x2, y2 in rectangles:
        found[y1:y2, x1:x2] = True
    return found


def detections(case: dict[str, Any]) -> list[Detection]:
    size = case["image"]["size"]
    masks = [None if case.get("boxes_only") else mask(d.get("mask"), size) for d in case["detections"]]
    return [
        Detection(d["label"], tuple(d["box"]), d["score"], m) for d, m in zip(case["detections"], masks, strict=True)
    ]


def nearest_colour(crop: Image.Image) -> str:
    rgb = np.asarray(crop, dtype=np.float64).reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: float(((rgb - GOLDEN["palette"][name]) ** 2).sum()))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_judge(case: dict[str, Any]):
    options, found, image = Options(**case["options"]), detections(case), picture(case["image"])
    colour_of = lambda detection: nearest_colour(cutout(image, detection, options))
    correct, reason = judge(found, case["metadata"], options, colour_of)
    assert (correct, reason) == (case["expected"]["correct"], case["expected"]["reason"])
    objects = kept(found, options, case["metadata"]["tag"] == "counting")
    rows = {
        label: [[*map(float, o.box), pytest.approx(o.score)] for o in several] for label, several in objects.items()
    }
    assert case["expected"]["kept"] == rows


@pytest.mark.parametrize("case", GOLDEN["crops"], ids=lambda case: case["rgb_sha256"][:8])
def test_what_the_colour_classifier_sees(case: dict[str, Any]):
    detection = Detection("", tuple(case["box"]), 1.0, mask(case.get("mask"), case["image"]["size"]))
    crop = cutout(picture(case["image"]), detection, Options(**case["options"]))
    assert list(crop.size) == case["size"]
    assert hashlib.sha256(crop.tobytes()).hexdigest() == case["rgb_sha256"]


def test_relations_and_overlaps():
    for case in GOLDEN["relative_position"]:
        assert relations(case["a"], case["b"], case["position_threshold"]) == sorted(case["relations"]), case
    for case in GOLDEN["iou"]:
        assert iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-6), case


@pytest.mark.parametrize("case", GOLDEN["summary"])
def test_summary(case: dict[str, Any]):
    found, expected = summarize(case["results"]), case["expected"]
    assert round(100 * found["images"], 2) == expected["percent_correct_images"]
    assert round(100 * found["prompts"], 2) == expected["percent_correct_prompts"]
    assert round(found["score"], 5) == expected["overall"]
    assert {task: round(100 * share, 2) for task, share in found["tasks"].items()} == {
        task: values["percent"] for task, values in expected["tasks"].items()
    }


def test_a_colour_needs_someone_to_name_it():
    metadata = {"tag": "colors", "include": [{"class": "cube", "count": 1, "color": "red"}]}
    with pytest.raises(ValueError, match="needs colour_of"):
        judge([Detection("cube", (0, 0, 9, 9), 0.95)], metadata)
