"""The solids world: distances, pictures against the geometry, captions against the pictures."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import UserError
from models.scene.cameras import Camera, camera_to_world, rays
from models.scene.captions import (
    COLOURS,
    PAIRS,
    SEEN,
    SHAPES,
    TASKS,
    VIEWS,
    VOCABULARY,
    Thing,
    describe,
    draw,
    parse,
    prompts,
    seen,
    things_of,
    unknown_words,
    words,
)
from models.scene.solids import (
    RGB,
    Rendered,
    Scene,
    Solid,
    Solids,
    contact_sheet,
    render,
    sample_scene,
    sample_turntable,
    unit_sdf,
)

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_task = pytest.mark.parametrize("task", TASKS)

GOLDEN_PROMPTS = [
    "a photo of a pyramid and a cube",
    "a photo of a pyramid and a cylinder",
    "a photo of a cone",
    "a photo of a pyramid and a cone",
]
GOLDEN_CENTRES = [
    *(0.31928153876719056, -0.6129445054519205, -1.103672063740331),
    *(-0.6345839089422708, -0.497697399508598, 0.4914713103160211),
]

# ------------------------------------------------------------------------------------- signed distance functions

CUBE, CYLINDER = 3**-0.5, (0.66, (1 - 0.66**2) ** 0.5)
RIM = 0.75**0.5  # of the cone, whose base is at -0.5
HALF = ((1 - 0.36**2) / 2) ** 0.5  # of the pyramid's base, which is at -0.36


def inside(shape: str, points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    r = torch.hypot(x, z)
    match shape:
        case "cube":
            return points.abs().amax(-1) < CUBE
        case "sphere":
            return points.norm(dim=-1) < 1
        case "cylinder":
            return (r < CYLINDER[0]) & (y.abs() < CYLINDER[1])
        case "torus":
            return (r - 0.7).square() + y.square() < 0.09
        case "cone":
            return (y > -0.5) & (r < RIM * (1 - y) / 1.5)
    return (y > -0.36) & (torch.maximum(x.abs(), z.abs()) < HALF * (1 - y) / 1.36)


def surface(shape: str, n: int = 120) -> Tensor:
    """Points (N, 3) all over the surface, from its own equations, at most 0.06 apart."""
    u, v = (
        grid.flatten() for grid in torch.meshgrid(*[torch.linspace(0, 1, n, dtype=torch.float64)] * 2, indexing="ij")
    )
    c, s, one = torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u), torch.ones_like(u)
    stack = lambda *parts: torch.stack(parts, -1)
    match shape:
        case "cube":
            face = stack(one, 2 * u - 1, 2 * v - 1) * CUBE
            return torch.cat([sign * face.roll(k, -1) for k in range(3) for sign in (-1, 1)])
        case "sphere":
            polar = math.pi * v
            return stack(polar.sin() * c, polar.cos(), polar.sin() * s)
        case "cylinder":
            radius, height = CYLINDER
            caps = [stack(radius * v * c, sign * height * one, radius * v * s) for sign in (-1, 1)]
            return torch.cat([stack(radius * c, height * (2 * v - 1), radius * s), *caps])
        case "torus":
            ring = 0.7 + 0.3 * torch.cos(2 * math.pi * v)
            return stack(ring * c, 0.3 * torch.sin(2 * math.pi * v), ring * s)
        case "cone":
            base = stack(RIM * v * c, -0.5 * one, RIM * v * s)
            return torch.cat([base, stack(RIM * v * c, 1 - 1.5 * v, RIM * v * s)])
    base = stack(HALF * (2 * u - 1), -0.36 * one, HALF * (2 * v - 1))
    side = stack(HALF * v, 1 - 1.36 * v, HALF * v * (2 * u - 1))
    sides = torch.cat([side, side * side.new_tensor([-1, 1, 1])])
    return torch.cat([base, sides, sides[:, [2, 1, 0]]])


def cloud(count: int, reach: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1) * reach


@every_shape
def test_distance_is_that_to_the_nearest_point_of_the_surface(shape: str) -> None:
    points, samples = cloud(300), surface(shape)
    found = unit_sdf(shape, points)
    brute = torch.cdist(points, samples).amin(1)
    assert torch.equal(found < 0, inside(shape, points)) and bool((found < 0).any())
    assert float(unit_sdf(shape, samples).abs().max()) <= 1e-9
    assert bool((brute >= found.abs() - 1e-9).all()) and bool((brute <= found.abs() + 0.03).all())


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_have_length_one(shape: str, dtype: torch.dtype) -> None:
    points = cloud(2000).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(unit_sdf(shape, points).sum(), points)
    assert gradient.dtype == dtype
    assert float((gradient.norm(dim=-1) - 1).abs().max()) <= (1e-9 if dtype == torch.float64 else 1e-3)
    axis = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    assert bool(torch.autograd.grad(unit_sdf(shape, axis).sum(), axis)[0].isfinite().all())


@every_shape
def test_shapes_touch_the_unit_sphere_from_inside(shape: str) -> None:
    assert float(surface(shape).norm(dim=-1).max()) == pytest.approx(1, abs=1e-3)


def test_solids_are_turned_tilted_scaled_and_moved() -> None:
    solid = Solid("cone", "red", (1.0, 2.0, 3.0), 0.5, yaw=90.0, tilt=90.0)
    # Tilting takes the tip from +y to +z, turning from +z to +x.
    near_tip = torch.tensor([[1.5, 2.0, 3.0], [1.6, 2.0, 3.0], [1.0, 2.6, 3.0]], dtype=torch.float64)
    distance = solid.sdf(near_tip)
    assert distance[:2].tolist() == pytest.approx([0, 0.1], abs=1e-9) and float(distance[2]) > 0.2
    other = replace(solid, centre=(-1.0, 0.0, 0.0), shape="sphere")
    scene = Scene((solid, other), Camera(), describe([Thing("cone"), Thing("sphere")]), 0.5, 0.0)
    points = cloud(50, 3.0).reshape(5, 10, 3)
    assert torch.equal(scene.sdf(points), torch.minimum(solid.sdf(points), other.sdf(points)))


# -------------------------------------------------------------------------------------------------------- cameras


def test_cameras_are_right_handed_and_look_at_the_origin() -> None:
    cameras = [Camera(), Camera(azimuth=90, elevation=0, radius=2), Camera(azimuth=-130, elevation=50, radius=3)]
    matrix = camera_to_world(cameras)
    turn, origin = matrix[:, :3, :3], matrix[:, :3, 3]
    assert torch.allclose(turn @ turn.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(turn), torch.ones(3), atol=1e-6)
    assert (
        torch.allclose(origin[1], torch.tensor([2.0, 0, 0]), atol=1e-6) and matrix[:, 3].tolist() == [[0, 0, 0, 1]] * 3
    )
    start, directions = rays(cameras, 5)
    assert torch.allclose(directions.norm(dim=1), torch.ones(3, 5, 5), atol=1e-6)
    assert torch.allclose(directions[:, :, 2, 2], -start / start.norm(dim=1, keepdim=True), atol=1e-6)
    assert bool((directions[:, 1, 0, 2] > directions[:, 1, 4, 2]).all())  # row 0 is the top
    assert float(directions[0, 0, 2, 4]) > 0  # the last column is on the right
    middle = Camera(azimuth=20).to_camera((0.3, 0.2, 0.1))
    world = camera_to_world([Camera(azimuth=20)])[0] @ torch.tensor([*middle, 1.0])
    assert world[:3].tolist() == pytest.approx([0.3, 0.2, 0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("azimuth", "view"),
    [(0, "front"), (-30, "front"), (31, "side"), (270, "side"), (180, "back"), (-150, "back"), (355, "front")],
)
def test_view_words(azimuth: float, view: str) -> None:
    assert Camera(azimuth=azimuth).view == view and view in VIEWS


# ------------------------------------------------------------------------------------- pictures and the geometry


def test_masks_and_depth_agree_with_the_distance_function_from_any_side() -> None:
    """First solid along every pixel's ray, found by dense sampling; also where one solid hides another."""
    scenes = [sample_scene(seed, draw(random.Random(seed), "counting")) for seed in range(8)]
    scenes += [sample_scene(seed, describe([Thing(shape)])) for seed, shape in enumerate(SHAPES)]
    turned = [Camera(azimuth=45.0 * i, elevation=5.0 + 4 * (i % 7), radius=4.0 + i % 2) for i in range(len(scenes))]
    size, hidden = 32, 0
    rendered = render(scenes, size, turned)
    origins, directions = rays(turned, size)
    steps = torch.linspace(1.5, 7.5, 600)
    for i, scene in enumerate(scenes):
        heading = directions[i].flatten(1).T
        distance = torch.stack([s.sdf(origins[i] + heading[:, None] * steps[:, None]) for s in scene.solids])
        hits = distance < 0
        hidden += int((hits.any(2).sum(0) > 1).sum())
        first = torch.where(hits, steps, math.inf).amin(2)
        expected = torch.where(first.amin(0).isfinite(), first.argmin(0), -1)
        pixel = 2 * turned[i].slope / size * turned[i].radius
        clear = (distance.amin(2).abs() > 0.2 * pixel).all(0)
        assert torch.equal(rendered.index[i].flatten()[clear], expected[clear])
        assert float(clear.float().mean()) > 0.9
        depth, seen = rendered.depth[i].flatten(), rendered.index[i].flatten() >= 0
        assert torch.equal(depth.isfinite(), seen)
        off = scene.sdf(origins[i] + heading[seen] * depth[seen, None]).abs()
        assert float(off.max()) < 0.15 * pixel
        sure = clear & seen
        assert float((depth[sure] - first.amin(0)[sure]).abs().quantile(0.98)) < pixel
    assert hidden > 20


def test_edges_are_smooth() -> None:
    """A white ball against grey: the border has values between, and areas are right to a tenth of a pixel row."""
    ball = Solid("sphere", "white", (0.0, 0.0, 0.0), 0.6)
    scene = Scene((ball,), Camera(elevation=0.0), describe([Thing("sphere")]), 0.3, 0.0)
    rendered = render([scene], 64)
    radius = 32 * math.tan(math.asin(0.6 / 4)) / Camera().slope
    assert int(rendered.masks(1).sum()) == pytest.approx(math.pi * radius**2, abs=0.1 * 2 * math.pi * radius)
    row = rendered.images[0, 0, 32, :]
    assert 0.05 < float(row.diff().abs().max()) < float(row.max() - row.min())


def every_scene(task: str, count: int) -> tuple[list[Scene], Rendered]:
    scenes = [sample_scene(seed, draw(random.Random(seed), task)) for seed in range(count)]
    return scenes, render(scenes)


def relations(a: list[int], b: list[int]) -> set[str]:
    """GenEval's: of box ``a`` to box ``b``, offsets reduced by a tenth of the sizes, over the whole offset's length."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    room = [0.1 * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    x, y = (math.copysign(max(abs(o) - r, 0), o) / math.hypot(*offset) for o, r in zip(offset, room, strict=True))
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


@every_task
def test_captions_are_true_of_the_picture(task: str) -> None:
    scenes, rendered = every_scene(task, 200)
    masks, boxes = rendered.masks(4), rendered.boxes(4)
    palette = torch.tensor([RGB[colour] for colour in COLOURS]) * 0.85 * 2 - 1  # as shading has them on the whole
    for i, scene in enumerate(scenes):
        metadata, things = scene.metadata, things_of(scene.metadata)
        assert metadata["tag"] == task and len(scene.solids) == len(things)
        for k, (solid, thing) in enumerate(zip(scene.solids, things, strict=True)):
            assert solid.shape == thing.shape and thing.colour in (None, solid.colour)
            assert int(masks[i, k].sum()) >= 40
            mean = rendered.images[i][:, masks[i, k]].mean(1)
            assert COLOURS[int((palette - mean).norm(dim=1).argmin())] == solid.colour
            x0, y0, x1, y1 = boxes[i, k].tolist()
            assert min(x0, y0) >= 1 and max(x1, y1) <= 63
            outside = masks[i, k].clone()
            outside[y0:y1, x0:x1] = False
            assert not bool(outside.any()) and bool(masks[i, k, y0].any()) and bool(masks[i, k, :, x1 - 1].any())
        for include in metadata["include"]:
            assert sum(solid.shape == include["class"] for solid in scene.solids) == include["count"]
        assert not bool(masks[i, len(things) :].any()) and boxes[i, len(things) :].sum() == 0
        if task == "position":
            relation, reference = metadata["include"][1]["position"]
            assert relations(boxes[i, 1].tolist(), boxes[i, reference].tolist()) == {relation}


def test_no_solid_hides_another() -> None:
    scenes, rendered = every_scene("counting", 60)
    alone = [
        (i, k, replace(scene, solids=(solid,)))
        for i, scene in enumerate(scenes)
        for k, solid in enumerate(scene.solids)
    ]
    single = render([scene for _, _, scene in alone]).index
    for (i, k, _), index in zip(alone, single, strict=True):
        assert torch.equal(index == 0, rendered.index[i] == k)


# ------------------------------------------------------------------------------------------------------ turntables


def test_turntables_show_one_solid_from_where_their_caption_says() -> None:
    scenes = [sample_turntable(seed) for seed in range(400)]
    assert {scene.solids[0].shape for scene in scenes} == set(SHAPES)
    assert sample_turntable(3) == scenes[3] != scenes[4]
    fine = 0
    for scene in scenes:
        caption, view = scene.prompt.split(", ")
        assert parse(caption)["include"] == scene.metadata["include"] and scene.metadata.get("view") == view in SEEN
        if view.startswith("seen from"):
            fine += 1
            off = (scene.camera.azimuth - float(view.split()[2]) + 180) % 360 - 180
            assert abs(off) <= 7.5
        else:
            assert view == f"{scene.camera.view} view"
    assert 0.65 < fine / 400 < 0.85
    index = render(scenes[:60]).index
    border = torch.cat([index[:, 0], index[:, -1], index[:, :, 0], index[:, :, -1]], 1)
    assert bool((border == -1).all()) and bool((index == 0).flatten(1).any(1).all())


def test_a_turntables_torus_is_open_in_front_and_thin_from_the_side() -> None:
    scene = next(scene for scene in map(sample_turntable, range(100)) if scene.solids[0].shape == "torus")
    boxes = render([scene] * 3, 64, [Camera(0), Camera(90), Camera(180)])
    widths = (boxes.boxes(1)[:, 0, 2] - boxes.boxes(1)[:, 0, 0]).tolist()
    middle = boxes.boxes(1)[0, 0].view(2, 2).float().mean(0).long().tolist()
    assert int(boxes.index[0, middle[1], middle[0]]) == -1 and widths[1] < 0.5 * widths[0] == 0.5 * widths[2]


def test_the_share_of_turntables() -> None:
    """Other scenes are what they are without."""
    plain, mixed = Solids(16).batch(range(200))[1], Solids(16, turntable=0.3).batch(range(200))[1]
    turned = ["view" in scene.metadata for scene in mixed]
    assert 0.2 < sum(turned) / 200 < 0.4
    assert all(turns or a == b for turns, a, b in zip(turned, plain, mixed, strict=True))


# ------------------------------------------------------------------------------------------------ reproducibility


def test_scenes_are_functions_of_their_seeds() -> None:
    assert [sample_scene(seed).prompt for seed in range(4)] == GOLDEN_PROMPTS
    assert sample_scene(2) == sample_scene(2) != sample_scene(3)
    assert [x for solid in sample_scene(0).solids for x in solid.centre] == pytest.approx(GOLDEN_CENTRES, abs=1e-9)
    images, scenes = Solids(64).batch(range(24))
    index = render(scenes).index
    assert images.shape == (24, 3, 64, 64) and images.dtype == torch.float32 and scenes[7] == sample_scene(7)
    assert float(images.abs().max()) <= 1
    for seed in (0, 5, 23):
        one = render([scenes[seed]])
        assert torch.allclose(one.images[0], images[seed], atol=1e-4) and torch.equal(one.index[0], index[seed])


def test_scenes_are_the_same_at_every_size() -> None:
    small, large = (render([sample_scene(seed) for seed in range(12)], size) for size in (32, 96))
    assert float((small.boxes(4) * 3 - large.boxes(4)).abs().max()) <= 4


def test_excluded_captions_are_never_drawn() -> None:
    held_out = frozenset(f"a photo of {n} cubes" for n in ("two", "three")) | {"a photo of a cube"}
    seen = {sample_scene(seed).prompt for seed in range(400)}
    assert seen & held_out
    kept = {sample_scene(seed, exclude=held_out).prompt for seed in range(400)}
    assert not kept & held_out and kept >= seen - held_out


# --------------------------------------------------------------------------------------------------------- grammar


def test_metadata_are_genevals() -> None:
    lines = {
        "a photo of a cube": '{"tag": "single_object", "include": [{"class": "cube", "count": 1}]',
        "a photo of an orange cube": '{"tag": "colors", "include": [{"class": "cube", "count": 1, "color": "orange"}]',
        "a photo of a cube and a cone": '{"tag": "two_object", "include": [{"class": "cube", "count": 1}, '
        '{"class": "cone", "count": 1}]',
        "a photo of three tori": '{"tag": "counting", "include": [{"class": "torus", "count": 3}], '
        '"exclude": [{"class": "torus", "count": 4}]',
        "a photo of a torus left of a red cone": '{"tag": "position", "include": '
        '[{"class": "cone", "count": 1, "color": "red"}, {"class": "torus", "count": 1, "position": ["left of", 0]}]',
        "a photo of a red cube and an orange cone": '{"tag": "color_attr", "include": '
        '[{"class": "cube", "count": 1, "color": "red"}, {"class": "cone", "count": 1, "color": "orange"}]',
    }
    for prompt, start in lines.items():
        assert json.dumps(parse(prompt)) == f'{start}, "prompt": "{prompt}"}}'


def test_captions_are_parsed_back() -> None:
    for seed, task in itertools.product(range(150), TASKS):
        metadata = draw(random.Random(seed), task)
        assert parse(metadata["prompt"]) == metadata and unknown_words(metadata["prompt"]) == []
    assert parse("A photo of  an red Cube.") == describe([Thing("cube", "red")])


def test_every_word_of_the_vocabulary_is_used() -> None:
    captions = [seen(draw(random.Random(seed)), SEEN[seed % len(SEEN)])["prompt"] for seed in range(2000)]
    assert {word for caption in captions for word in words(caption)} == set(VOCABULARY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of a crimson cube and a dog", "unknown words: crimson, dog; known are: .*pyramid"),
        ("a photo of a cube, please!", "unknown words: please, !;"),
        ("a red cube", "not of a known form"),
        ("a photo of five", "unknown words: five"),
        ("a photo of two red cubes", "not of a known form"),
        ("a photo of a cube and a cube", "names cube twice"),
        ("", "not of a known form"),
    ],
)
def test_what_cannot_be_parsed_is_said(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(prompt)
    assert "\n" not in str(error.value)


def test_evaluation_prompts_are_balanced_and_held_out() -> None:
    found = prompts(0, 300)
    assert found == prompts(0, 300) != prompts(1, 300)
    assert [m["tag"] for m in found] == list(TASKS) * 50
    for task, distinct in zip(TASKS, (6, 30, 18, 50, 50, 50), strict=True):
        assert len({m["prompt"] for m in found if m["tag"] == task}) == distinct
    exclude = {m["prompt"] for m in found if m["tag"] in ("colors", "position", "color_attr")}
    rest = prompts(0, 60, exclude)
    assert len(rest) == 60 and not {m["prompt"] for m in rest} & exclude
    with pytest.raises(UserError, match="every caption of the task single_object"):
        prompts(0, 6, {m["prompt"] for m in found})


def test_contact_sheet(tmp_path: Path) -> None:
    contact_sheet(0, 7, tmp_path / "new" / "sheet.png", size=32)
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000
    with pytest.raises(UserError, match="count 0"):
        contact_sheet(0, 0, tmp_path / "sheet.png")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_renders_the_same_pictures():
    scenes = [sample_scene(i) for i in range(32)]
    here, there = render(scenes, 128), render(scenes, 128, device="cuda")
    assert (here.images - there.images.cpu()).abs().mean() < 1e-4
    assert (here.index == there.index.cpu()).float().mean() > 0.999


def test_pairs_make_up_their_share_and_nothing_else_changes():
    plain, paired = Solids(8), Solids(8, pairs=0.5)
    tags = [[world.batch([seed])[1][0].metadata["tag"] for seed in range(300)] for world in (plain, paired)]
    share = [sum(tag in PAIRS for tag in part) / 300 for part in tags]
    assert share[0] == pytest.approx(0.5, abs=0.09) and share[1] == pytest.approx(0.75, abs=0.09)
    assert sum(a == b for a, b in zip(*tags, strict=True)) > 150
