"""How scenes are judged: solids against themselves, seeds, critics, CLIP and the report, through real files."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from eval import scene as command
from eval.fake_score import critic_file, fake_score_errors
from eval.glb import Exported, on_white
from eval.nearest_solid import fit, inside_mesh, iou, solid_outlines
from eval.scene_report import COLUMNS, THUMB
from eval.scene_scores import Colours, chamfer, judge_clip, judge_solid, psnr
from eval.scene_seeds import Seed, diversity, interval, means
from models.errors import UserError
from models.scene import export, saved, solids
from models.scene.cameras import Orbit, camera_to_world, rays
from models.scene.captions import Thing
from models.scene.fields import Blob, Box, FieldSizes
from models.scene.mesh import Mesh, lattice, marching_tetrahedra, tetrahedra
from models.scene.particles import Views
from models.teachers import load
from models.teachers.base import TextSpec
from tests.test_geneval_folder import save_clip
from tests.tiny import save_sana

BOX, ORBIT = Box((0.0, 0.2, 0.0), 1.0), Orbit()


def solid_of(shape: str, colour: str = "red") -> solids.Solid:
    tilt = 50.0 if shape == "torus" else 0.0
    return solids.Solid(shape, colour, (0.05, 0.1, -0.05), 0.7, yaw=25.0, tilt=tilt)


def exported(solid: solids.Solid, colour: str | None = None, cells: int = 40) -> Exported:
    """A solid as a file would have it: marching tetrahedra from its distances, one colour all over."""
    places = lattice(cells)
    mesh = marching_tetrahedra(places, solid.sdf(BOX.world(places)), tetrahedra(cells))
    texture = torch.tensor(solids.RGB[colour or solid.colour]).view(3, 1, 1).expand(3, 4, 4)
    return Exported(Mesh(BOX.world(mesh.vertices), mesh.faces), torch.full((len(mesh.vertices), 2), 0.5), texture)


# --------------------------------------------------------------------------------------------- against true solids


@pytest.mark.parametrize("shape", ["cube", "cone", "torus"])
def test_a_solid_is_found_again(shape: str):
    """Points inside a mesh, and the solid that fits them, are those that it was made from."""
    solid, cells, box = solid_of(shape), 28, Box()
    places = lattice(cells)
    distance = solid.sdf(places)
    inside = inside_mesh(marching_tetrahedra(places, distance, tetrahedra(cells)), box, cells)
    assert float((inside != (distance < 0)).float().mean()) < 2e-3
    values, overlap = fit(shape, places, inside)
    assert overlap > 0.93
    torch.testing.assert_close(values[:4], torch.tensor([0.7, 0.05, 0.1, -0.05]), atol=0.03, rtol=0)


@pytest.mark.parametrize("shape", ["cube", "pyramid", "torus"])
def test_outlines_are_where_a_ray_comes_inside(shape: str):
    """Against the least distance at 600 places along every ray."""
    solid, cameras, size = solid_of(shape), ORBIT.turntable(2, 10.0), 48
    origins, directions = rays(cameras, size)
    along = directions.flatten(2).transpose(1, 2)[:, :, None] * torch.linspace(3.0, 5.2, 600)[:, None]
    seen = (solid.sdf(origins[:, None, None] + along).amin(2) < 0).view(2, size, size)
    assert float(iou(seen.flatten(1), solid_outlines(solid, cameras, size).flatten(1)).min()) > 0.985


@pytest.mark.parametrize("shape", ["cube", "pyramid", "torus"])
def test_a_true_solid_scores_as_one(shape: str):
    judged = judge_solid(exported(solid_of(shape)), Thing(shape, "red"), BOX, ORBIT)
    scores = judged.scores
    assert scores["silhouette_iou"] > 0.95 and scores["worst_silhouette_iou"] > 0.9, scores
    assert scores["volume_iou"] > 0.93 and scores["chamfer"] < 0.03
    assert scores["view_agreement"] == scores["colour_right"] == scores["shape_right"] == 1.0
    assert scores["variant"] == f"red {shape}" and scores["albedo_psnr"] == 60.0 and scores["psnr"] > 18
    assert scores["radius"] == pytest.approx(0.7, abs=0.02)


def test_a_cube_is_no_sphere_and_no_green_thing():
    """Another shape and another colour than the prompt's are seen, and count as what they are."""
    scores = judge_solid(exported(solid_of("cube"), "blue"), Thing("sphere", "green"), BOX, ORBIT).scores
    assert scores["silhouette_iou"] < 0.93 and scores["volume_iou"] < 0.85 and scores["worst_silhouette_iou"] < 0.9
    assert scores["colour_right"] == scores["shape_right"] == 0.0 and scores["albedo_psnr"] < 10
    assert scores["variant"] == "blue cube" and scores["view_agreement"] == 1.0


def test_one_colour_in_front_and_another_behind_is_no_agreement():
    """Janus among solids: half of the views show another variant."""
    images, masks = torch.zeros(4, 3, 8, 8), torch.ones(4, 8, 8)
    for index, colour in enumerate(("red", "red", "red", "blue")):
        images[index] = torch.tensor(solids.RGB[colour]).view(3, 1, 1)
    assert Colours.of(images, masks) == Colours(["red", "red", "red", "blue"], "red")
    cube = exported(solid_of("cube"), cells=24)
    back = (cube.mesh.vertices[:, 2] < -0.05).float()
    texture = torch.tensor([solids.RGB["red"], solids.RGB["blue"]]).T.reshape(3, 1, 2)
    two = Exported(cube.mesh, torch.stack([0.25 + 0.5 * back, torch.full_like(back, 0.5)], 1), texture)
    scores = judge_solid(two, Thing("cube", "red"), BOX, ORBIT).scores
    assert scores["view_agreement"] < 0.8 and scores["colour_right"] < 0.8 and scores["shape_right"] == 1.0


def test_nothing_of_a_texture_is_seen_but_what_the_charts_show():
    """Two charts, both red, and blue between them on the texture."""
    ball = exported(solid_of("sphere"), cells=20)
    count = len(ball.mesh.faces)
    corners = Mesh(ball.mesh.vertices[ball.mesh.faces].flatten(0, 1), torch.arange(3 * count).view(-1, 3))
    u = (0.05 + 0.9 * (torch.arange(count) % 2).float()).repeat_interleave(3)
    texture = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).repeat(1, 1, 10)
    texture[:, :, 3:7] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    colours, coverage = Exported(corners, torch.stack([u, 0 * u + 0.5], 1), texture).views(ORBIT.turntable(2), 48)
    partial = (coverage > 0) & (coverage < 1)
    assert int(partial.sum()) > 50
    assert float(colours[:, 2][coverage > 0].max()) < 1e-3 and float(colours[:, 0][coverage > 0].min()) > 0.99


def test_psnr_and_chamfer_are_their_formulas():
    assert psnr(torch.tensor(0.01)) == pytest.approx(20) and psnr(torch.tensor(0.0)) == 60
    assert psnr(torch.tensor(0.04)) == pytest.approx(psnr(torch.tensor(0.01)) - 20 * math.log10(2))
    ball = replace(solid_of("sphere"), centre=(0.0, 0.2, 0.0), radius=0.5)
    larger = replace(ball, radius=0.6)
    assert chamfer(exported(ball).mesh, larger, BOX) == pytest.approx(0.1, abs=0.01)


def test_a_mesh_without_volume_is_named():
    flat = Exported(Mesh(torch.eye(3), torch.tensor([[0, 1, 2]])), torch.zeros(3, 2), torch.zeros(3, 2, 2))
    with pytest.raises(UserError, match="encloses no volume"):
        judge_solid(flat, Thing("cube"), BOX, ORBIT)


# ----------------------------------------------------------------------------------------------------- several seeds


def flat_seed(variant: str, grey: float) -> Seed:
    return Seed([variant], torch.full((1, 2, 3, 4, 4), grey))


def test_modes_and_distances_of_few_seeds_make_no_claim():
    found = diversity([flat_seed("red cube", 0.2), flat_seed("blue cube", 0.5), flat_seed("red cube", 0.2)])
    assert found["modes"] == 2 and found["variants"] == {"blue cube": 1, "red cube": 2} and found["seeds"] == 3
    assert found["picture_distance"] == pytest.approx((0.3 + 0.3 + 0.0) / 3, abs=1e-5)
    assert found["claim"] == "no claim below 8 seeds" and not any("interval" in key for key in found)


def test_eight_seeds_have_intervals_by_the_jackknife():
    """Of a mean it is two standard errors, exactly."""
    seeds = [flat_seed("red cube" if i else "blue cube", i / 10) for i in range(8)]
    found = diversity(seeds)
    assert found["modes"] == 2 and "claim" not in found and found["picture_distance_interval"] > 0
    # Without the only blue one there is one variant, so the jackknife's variance is 7/8 (7/64 + 7 / 64) ...
    left = torch.tensor([1.0] + [2.0] * 7)
    assert found["modes_interval"] == pytest.approx(2 * math.sqrt(7 / 8 * float((left - left.mean()).square().sum())))
    grey = lambda part: float(torch.cat([seed.pictures for seed in part]).mean())
    values = torch.arange(8.0) / 10
    assert interval(grey, seeds) == pytest.approx(2 * float(values.std()) / 8**0.5, rel=1e-4)
    rows: list[dict[str, Any]] = [{"scene": str(i), "psnr": float(i)} for i in range(8)]
    assert means(rows)["psnr_interval"] == pytest.approx(2 * float(torch.arange(8.0).std()) / 8**0.5)
    assert means([*rows[:7], rows[6]]) == {"psnr": 3.0}  # two particles of one scene are one


# ------------------------------------------------------------------------------------- scenes in folders, all of it


def stage_settings(name: str, fake: str) -> dict[str, Any]:
    levels = {"kind": "grid", "low": 0.1, "high": 0.9}
    return {
        "name": name,
        "kind": name,
        "fake": fake,
        "picture": "shaded",
        "resolutions": [[0.0, 16]],
        "matching": {"noise_levels": levels, "critic_noise_levels": None},
    }


def save_scene(path: Path, teacher: Path) -> Path:
    """A volume stage's folder as a run leaves it, with its files; its critic is new."""
    scene = saved.Scene(
        "a red sphere", "a photo of a red sphere", 1, ORBIT, BOX, Blob(40.0, 0.5), FieldSizes(side=8), "studio", 24
    )
    torch.manual_seed(0)
    stage = path / "volume"
    saved.save(stage / "student", scene, scene.new().tensors(), "card")
    config = {
        "teacher": {"path": str(teacher), "size": None, "tokens": None, "config": None},
        "method": {
            "stage": "volume",
            "stages": [stage_settings("volume", "lora"), stage_settings("texture", "noise")],
            "critic": {"rank": 2, "path": None},
            "export": {"threshold": 5.0},
        },
    }
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps({"step": step, "matching": 1 / step, "critic_loss": 0.5}) for step in (1, 2, 3)]
    (stage / "metrics.jsonl").write_text("\n".join(lines))
    export.export(stage / "student", path / "student", export.Sizes(5.0, faces=800, texture=64, frames=2, size=32))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sana(tmp_path_factory.mktemp("teacher") / "sana")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    for package in ("trimesh", "xatlas", "imageio"):
        pytest.importorskip(package)
    return save_scene(tmp_path_factory.mktemp("runs") / "run/a-red-sphere", teacher)


def new_critic(teacher: Path) -> tuple[Any, TextSpec]:
    from models.scene.critic import LoRACritic

    denoiser, spec = load(teacher)
    assert isinstance(spec, TextSpec)
    torch.manual_seed(0)
    return LoRACritic(denoiser.requires_grad_(False), spec.text(["a photo of a red sphere"]), 2), spec


def keep_critic(critic: Any, scene: Path, step: int) -> None:
    path = scene / f"volume/checkpoints/step-{step}/critic/model.safetensors"
    path.parent.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in critic.state_dict().items()}, path)


def test_the_fake_score_is_measured_against_the_exact_one(scene: Path, teacher: Path):
    """A new critic's error is 1 exactly; once trained on the particle's pictures it is much lower."""
    assert fake_score_errors(scene / "volume") is None  # no checkpoint yet
    critic, spec = new_critic(teacher)
    keep_critic(critic, scene, 9)
    found = fake_score_errors(scene / "volume")
    assert found is not None and found.relative == 1.0 and torch.equal(found.trained, found.untrained)
    assert bool((found.ratios.diff() > 0).all()) and len(found.summary()) == 5
    fields = saved.load_fields(scene / "volume/student")[1]
    cameras = ORBIT.turntable(8)
    with torch.no_grad():
        images = fields(Views(cameras, [0] * 8, 16, torch.rand(8, 4))).images
        x0 = spec.encode(torch.nn.functional.interpolate(images, spec.picture[1:], mode="bilinear", antialias=True))
    cond = spec.text(["a photo of a red sphere"] * 8)
    cond = replace(cond, camera=camera_to_world(cameras).flatten(1))
    optimizer = torch.optim.Adam(critic.parameters(), 2e-2)
    for _ in range(60):
        t = 0.1 + 0.8 * torch.rand(8)
        x_t = critic.base.process.add_noise(x0, torch.randn_like(x0), t)
        optimizer.zero_grad()
        (critic(x_t, t, cond) - x0).square().mean().backward()
        optimizer.step()
    keep_critic(critic, scene, 10)
    assert str(critic_file(scene / "volume")).endswith("step-10/critic/model.safetensors")  # not 9, the later name
    trained = fake_score_errors(scene / "volume")
    assert trained is not None and torch.equal(trained.untrained, found.untrained) and trained.relative < 0.8


def test_one_scene_is_reported_with_everything(
    scene: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """CLIP with random weights, fake score, the file against its particle; a page that needs nothing else."""
    clip, folder, further = save_clip(tmp_path / "clip"), tmp_path / "run/a-red-sphere", tmp_path / "prompts.txt"
    shutil.copytree(scene, folder, ignore=shutil.ignore_patterns("checkpoints"))
    keep_critic(new_critic(teacher)[0], folder, 3)
    further.write_text("a photo of a blue cone\n\na photo of a green cube\n")
    command.Options((folder,), clip=str(clip), prompts=further).run()
    output = folder / "report"
    assert sorted(os.listdir(output)) == ["report.html", "report.json"]
    (found,) = json.loads((output / "report.json").read_text())["scenes"]
    assert found["variant"].endswith("sphere") and found["silhouette_iou"] > 0.9
    assert found["glb_psnr"] > 25 and found["glb_iou"] > 0.9 and found["fake_score_error"] == 1.0
    assert found["r_precision_among"] == 3 and 0 <= found["front_twice"] <= 1 and -1 <= found["clip_score"] <= 1
    page = (output / "report.html").read_text()
    assert "http" not in page and "data:image/png;base64," in page
    assert "a photo of a red sphere" in page and "volume: losses" in page and "Front seen twice" in page
    links = [part.split('"')[0] for part in page.split('href="')[1:] if not part.startswith("#")]
    assert links == ["../student/model.glb", "../student/turntable.mp4"]
    assert all((output / link).resolve().is_file() for link in links)
    assert "report:" in capsys.readouterr().out


def test_front_twice_is_what_clip_says_of_the_views(scene: Path, tmp_path: Path):
    """Counted here once more, view by view."""
    from eval.clip import CLIP
    from eval.scene_scores import CLIP_VIEWS, to_pictures

    clip, made = CLIP(str(save_clip(tmp_path / "clip"))), Exported.read(scene / "student/model.glb")
    found = judge_clip(made, clip, "a photo of a red sphere", [], ORBIT)
    texts = clip.texts([f"a photo of a red sphere, {view} view" for view in ("front", "back")])
    fronts: dict[str, list[bool]] = {"front": [], "back": [], "side": []}
    cameras = ORBIT.turntable(CLIP_VIEWS)
    for camera, picture in zip(cameras, to_pictures(on_white(*made.views(cameras, 224))), strict=True):
        similar = clip.pictures([picture]) @ texts.T
        fronts[camera.view].append(bool(similar[0, 0] > similar[0, 1]))
    assert (len(fronts["front"]), len(fronts["back"])) == (7, 7)
    assert found["front_twice"] == pytest.approx(sum(fronts["back"]) / 7)
    assert found["front_seen"] == pytest.approx(sum(fronts["front"]) / 7) and found["r_precision"] is None


def test_several_seeds_have_a_table_and_a_contact_sheet(scene: Path, tmp_path: Path):
    """Of what is not one solid: no truth, no variants."""
    folders = tuple(tmp_path / f"seed-{seed}/a-red-sphere" for seed in range(3))
    for folder in folders:
        shutil.copytree(scene, folder)
        description = folder / "volume/student/scene.json"
        description.write_text(description.read_text().replace("a photo of a red sphere", "a photo of two spheres"))
    output = tmp_path / "seeds"
    command.Options(folders, fake_score=False, output=output).run()
    result = json.loads((output / "report.json").read_text())
    found = result["diversity"]["a photo of two spheres"]
    assert found["seeds"] == 3 and found["modes"] is None and found["picture_distance"] == pytest.approx(0, abs=1e-4)
    assert found["claim"] and len(result["scenes"]) == 3 and set(result["mean"]) == {"glb_psnr", "glb_iou"}
    assert Image.open(output / "contact_sheet.png").size == (COLUMNS * THUMB, 3 * THUMB)
    page = (output / "report.html").read_text()
    assert "seed-2/a-red-sphere" in page and "No claim below 8 seeds" in page and page.count("<svg") == 3
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


@pytest.fixture
def broken(scene: Path, tmp_path: Path) -> Path:
    shutil.copytree(scene, tmp_path / "scene")
    return tmp_path / "scene"


def fails(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        command.Options((folder,), **options).run()
    assert "\n" not in str(error.value)


def test_a_solid_is_judged_before_any_backdrop(broken: Path):
    description = broken / "volume/student/scene.json"
    description.write_text(description.read_text().replace('"studio"', '"white"'))
    thing = command.SceneFolder.of(broken).thing()
    assert thing is not None and thing.shape == "sphere"


def test_mistakes_are_named(broken: Path, tmp_path: Path):
    fails(tmp_path / "nothing", "there is no folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"holds no stage of text to 3D: give OUTPUT/PROMPT")
    fails(broken, r"clip: nothing is neither a folder nor MODEL:WEIGHTS", clip="nothing")
    fails(broken, r"clip: ViT-B-32:nowhere cannot be read", clip="ViT-B-32:nowhere")
    fails(broken, "prompts: .* cannot be read", prompts=tmp_path / "none.txt", fake_score=False)
    config = broken / "volume/config.yaml"
    settings = yaml.safe_load(config.read_text())
    weights = broken / "volume/checkpoints/step-99/critic/model.safetensors"
    weights.parent.mkdir(parents=True)
    save_file({"other": torch.zeros(2)}, weights)
    fails(broken, "is not the critic that .* describes; or leave the fake score out: --no-fake-score")
    config.write_text(yaml.safe_dump(settings | {"teacher": settings["teacher"] | {"path": str(tmp_path)}}))
    fails(broken, "no model_index.json")
    config.write_text("method: {stages: 3}\n")
    fails(broken, "config.yaml is not that of a stage of text to 3D")
    config.write_text(yaml.safe_dump(settings))
    (broken / "student/model.glb").write_bytes(b"glTF nothing")
    fails(broken, r"model.glb is not one mesh with a texture", fake_score=False)
    (broken / "student/model.glb").unlink()
    fails(broken, "has no student/model.glb: run it to its end")
