"""The judge against the published one's own answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eval.features import extract, quantize
from eval.frechet import frechet_distance
from eval.geneval import Detection, Options, judge, summarize
from eval.geneval.__main__ import judge_pictures, seen_prompts
from eval.geneval.folder import standard_error
from eval.geneval.judge import COLOURS, cutout, iou, kept, relations
from eval.geneval.prompts import HELD_OUT, true_renders
from eval.geneval.solids import OPTIONS, SolidsDetector, SolidsFeatures, colour_of, components
from eval.reference import load_reference
from models.errors import UserError
from models.scene.captions import EVALUATION, SHAPES, Thing, describe, held_out, prompts
from models.scene.solids import render, sample_scene

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


# ------------------------------------------------------------------------------------------- the solids world


@pytest.fixture(scope="module")
def detector() -> SolidsDetector:
    return SolidsDetector()


def test_single_solids_of_every_shape_and_colour_are_found_and_named(detector: SolidsDetector):
    """Scenes that it was not trained on; 99 of 100 must be right, as its weights' own record says of 1,200."""
    asked = [describe([Thing(shape, colour)]) for shape in SHAPES for colour in COLOURS] * 2
    found = detector(true_renders(asked, HELD_OUT + 7000))
    right = [judge(solids, wanted, OPTIONS, colour_of)[0] for solids, wanted in zip(found, asked, strict=True)]
    assert sum(right) >= 0.99 * len(right)


def test_boxes_and_masks_are_where_the_renderer_put_the_solids(detector: SolidsDetector):
    scenes = [sample_scene(HELD_OUT + 8000 + i, describe([Thing(shape, "red")])) for i, shape in enumerate(SHAPES)]
    made = render(scenes)
    for row, solids in enumerate(detector(quantize(made.images))):
        (solid,) = solids
        assert solid.mask is not None
        mask, truth = torch.from_numpy(solid.mask), made.masks(1)[row, 0]
        assert (mask & truth).sum() / (mask | truth).sum() > 0.9
        assert (torch.tensor(solid.box) - made.boxes(1)[row, 0]).abs().max() <= 2


def test_an_empty_or_grainy_picture_has_nothing_in_it(detector: SolidsDetector):
    grain = 110 + 8 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert detector(torch.cat([torch.full_like(grain, 110), grain]).byte()) == [[], []]


def test_connected_parts_are_told_apart():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 1:3, 1:6], mask[0, 3:6, 1], mask[0, 5:7, 4:6] = True, True, True
    parts = components(mask)
    assert len(parts.unique()) == 3 and torch.equal(parts > 0, mask)
    assert parts[0, 1, 5] == parts[0, 5, 1] != parts[0, 6, 5]


def test_scores_of_true_renders_are_the_ceiling_and_a_wrong_prompt_scores_nothing(detector: SolidsDetector):
    """Pictures of prompt i + 1 shown for prompt i: what a generator that ignores its prompt would get."""
    asked = prompts(EVALUATION, 60)
    images = true_renders(asked)
    features = SolidsFeatures()
    right = judge_pictures("right", iter([(asked, images)]), detector, features)
    wrong = judge_pictures("wrong", iter([(asked, images.roll(1, 0))]), detector, features)
    assert right.scores["score"] > 0.85 > 0.2 > wrong.scores["score"]
    assert right.scores["fd_solids"] == pytest.approx(wrong.scores["fd_solids"])
    assert all(record["reason"] for record in wrong.records if not record["correct"])


def test_seen_prompts_are_of_the_same_tasks_and_none_is_held_out():
    found = seen_prompts(50)
    assert len(found) == len({m["prompt"] for m in found}) == 50
    assert {m["tag"] for m in found} == {"position", "color_attr"}
    assert not {m["prompt"] for m in found} & held_out() and seen_prompts(0) == []


def test_larger_pictures_are_judged_at_the_detectors_size(detector: SolidsDetector):
    """True renders of 128 pixels: the same solids in the same boxes as in those of 64; other sizes are refused."""
    asked = [describe([Thing(shape, "red")]) for shape in SHAPES]
    small, large = (detector(true_renders(asked, HELD_OUT + 100, size)) for size in (64, 128))
    for mine, other in zip(small, large, strict=True):
        assert [(s.label, s.colour) for s in mine] == [(s.label, s.colour) for s in other]
        assert (torch.tensor(mine[0].box) - torch.tensor(other[0].box)).abs().max() <= 2
    with pytest.raises(UserError, match="take 64 x 64, or multiples"):
        detector(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))


def test_image_distance_orders_known_damage():
    """The floor, then noise, blur and missing prompts, each well above it."""
    asked = prompts(EVALUATION, 600)
    images = true_renders(asked, HELD_OUT + 9000)
    reference = load_reference("fd_solids")
    distance = lambda pictures: frechet_distance(extract(SolidsFeatures(), pictures.split(100)), reference.statistics)
    soft = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).to(torch.uint8)
    counting = torch.tensor([wanted["tag"] == "counting" for wanted in asked])
    noise = 30 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images.float() + noise).clamp(0, 255).to(torch.uint8)
    floor = distance(images)
    assert floor < 1.5 * reference.floor(600).value
    assert min(distance(soft), distance(noisy), distance(images[counting])) > 2 * floor


def test_standard_error_is_never_nothing():
    assert standard_error([True] * 100) == pytest.approx(0.00495, rel=0.01)
    assert standard_error([True, False] * 50) == pytest.approx(0.05, rel=0.02)
