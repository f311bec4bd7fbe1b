"""The app in a headless Chromium: all six tabs, as a person uses them."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from models.errors import UserError

pytest.importorskip("gradio", reason="the app's packages are not installed: pip install -e '.[app]'")
pytest.importorskip("playwright", reason="the browser's driver is not installed: pip install -e '.[dev]'")

from playwright.sync_api import Error, expect

from app import drive, files, scenes, studio
from app.ask import Ask
from app.engine import Engine
from app.library import Library
from tests.test_app import save_mesh, save_run, save_training
from tests.tiny import save_network

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROMPT = "a red cube and a cone"
"""Of 21 characters."""

try:
    drive.chromium()
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser") / "runs"
    save_run(root / "several")
    save_mesh(root / "cube" / "mesh" / "mesh.glb")
    (root / "cube" / "config.yaml").write_text("method: {prompt: a red cube}\n")
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    made = studio.build_app(Engine(Library([root])), may_train=True)
    yield studio.launch(made)
    made.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with drive.browser() as made:
        yield made


@pytest.fixture
def page(browser: "Browser", address: str) -> Iterator["Page"]:
    """The page with nothing but itself to reach; no test may leave an error in its console."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if _outside(request.url, address) else None)
    page.goto(address)
    page.wait_for_selector("#picture img")
    yield page
    page.close()
    assert not faults


def _outside(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:", "about:"))


def bytes_of(page: "Page", image: str) -> bytes:
    source = page.locator(image).first.get_attribute("src")
    assert source
    return page.request.get(source).body()


def shown(page: "Page") -> Ask:
    """The settings inside the picture that is shown."""
    return files.read_settings(files.serve(bytes_of(page, "#picture img"), "seen.png"))


def upload(page: "Page", button: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(button).click()
    chooser.value.set_files(path)


def until(page: "Page", true: Callable[[], bool]) -> None:
    """Wait for what a page does by itself; fails after half a minute."""
    for _ in range(300):
        try:
            if true():
                return
        except Error:  # an element that is just being replaced
            pass
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen")


def test_typing_ends_with_the_picture_of_the_whole_prompt(page: "Page"):
    first = bytes_of(page, "#picture img")
    box = page.locator("#prompt textarea")
    box.fill("")
    box.press_sequentially(PROMPT, delay=80)
    until(page, lambda: shown(page).prompt == PROMPT)
    assert bytes_of(page, "#picture img") != first
    expect(page.locator("#status")).to_contain_text("ms a picture")
    box.press("Backspace")
    until(page, lambda: shown(page).prompt == PROMPT[:-1])
    box.fill("a red dragon")  # at once, as a paste
    expect(page.locator("#status")).to_contain_text("unknown to this model: dragon")


def test_grid_dice_lock_and_a_picked_seed(page: "Page"):
    count, seed = page.locator("#count input[type=number]"), page.get_by_label("Seed", exact=True)
    count.fill("4")
    count.press("Tab")
    expect(page.locator("#status")).to_contain_text("seeds 7 to 10")
    box = page.locator("#picture img").bounding_box()
    assert box is not None
    side = min(box["width"], box["height"])
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.click(middle[0] - side / 4, middle[1] + side / 4)  # below left: the third
    expect(seed).to_have_value("9")
    until(page, lambda: (shown(page).seed, shown(page).count) == (9, 1))
    page.locator("#prompt textarea").press("Enter")
    page.get_by_role("button", name="New seed").click()
    until(page, lambda: shown(page).seed != 9)
    rolled = shown(page).seed
    expect(seed).to_have_value(str(rolled))
    page.get_by_label("Keep the seed when I press Enter").uncheck()
    page.locator("#prompt textarea").press("Enter")
    until(page, lambda: shown(page).seed != rolled)


def test_download_carries_the_settings_and_reload_brings_them_back(page: "Page", tmp_path: Path):
    page.locator("#prompt textarea").fill("a photo of a blue sphere")
    until(page, lambda: shown(page).prompt == "a photo of a blue sphere")
    page.get_by_text("Guidance and walk").click()
    walk = page.locator("#walk input[type=number]")
    walk.fill("0.5")
    walk.press("Tab")
    until(page, lambda: shown(page).walk == 0.5)
    page.get_by_text("Download and reload").click()
    for kind in ("png", "jpeg"):
        page.locator("#format").get_by_label(kind, exact=True).check()
        until(
            page,
            lambda kind=kind: (
                bytes_of(page, "#picture img")[:4] == (b"\x89PNG" if kind == "png" else b"\xff\xd8\xff\xe0")
            ),
        )
        with page.expect_download() as download:
            page.locator("#download").click()
        download.value.save_as(tmp_path / f"kept.{kind}")
        kept = files.read_settings(str(tmp_path / f"kept.{kind}"))
        assert (kept.prompt, kept.walk, kept.seed) == ("a photo of a blue sphere", 0.5, 7)
    page.locator("#prompt textarea").fill("a cone")
    until(page, lambda: shown(page).prompt == "a cone")
    upload(page, "#reload", tmp_path / "kept.png")
    expect(page.locator("#prompt textarea")).to_have_value("a photo of a blue sphere")
    until(page, lambda: shown(page).prompt == "a photo of a blue sphere")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    upload(page, "#reload", tmp_path / "plain.png")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("this picture carries no settings of this studio")
    assert "Traceback" not in page.content()
    ask = Ask("<img src=x onerror='window.broken = 1'>", "a cone")
    (tmp_path / "crafted.png").write_bytes(files.encode(Image.new("RGB", (8, 8)), ask.as_json(), "png"))
    upload(page, "#reload", tmp_path / "crafted.png")
    expect(toast.filter(has_text="there is no model")).to_be_visible()
    assert page.evaluate("() => window.broken") is None


def test_a_model_of_classes_asks_for_classes(page: "Page"):
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="embedded:fashion_mnist").click()
    expect(page.locator("#prompt textarea")).to_be_hidden()
    until(page, lambda: shown(page).prompt == "T-shirt")
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="sneaker").click()
    until(page, lambda: shown(page).prompt == "sneaker")


def test_students_exported_meanwhile_can_be_chosen(page: "Page", root: Path, tmp_path: Path):
    def options(label: str) -> list[str]:
        page.get_by_label(label, exact=True).locator("visible=true").click()
        return page.get_by_role("option").all_inner_texts()

    save_network(root / "late" / "student", 2.5, 0)
    kept = tmp_path / "kept.png"
    kept.write_bytes(files.encode(Image.new("RGB", (8, 8)), Ask("runs/late", "bag").as_json(), "png"))
    page.get_by_text("Download and reload").click()
    upload(page, "#reload", kept)
    until(page, lambda: shown(page).model == "runs/late")
    page.reload()
    until(page, lambda: "runs/late" in " ".join(options("Model")))
    page.get_by_role("option", name="runs/late").click()
    until(page, lambda: shown(page).model == "runs/late")
    save_network(root / "later" / "student", 2.5, 0)
    (root / "later" / "student" / "controlnet").mkdir()
    shutil.rmtree(root / "late")
    for tab, label in (("Draw", "Model"), ("Compare", "Left model"), ("Compare", "Right model"), ("Generate", "Model")):
        drive.choose_tab(page, tab)
        if tab == "Draw":
            page.get_by_text("Model, seed, strength of the lines").click()
        until(page, lambda label=label: "runs/later" in " ".join(options(label)))
        page.keyboard.press("Escape")
    expect(page.get_by_label("Model", exact=True).locator("visible=true")).to_have_value("runs/late")


def test_compare_shows_both_models_on_the_same_noise(page: "Page"):
    drive.choose_tab(page, "Compare")
    steps = page.locator("#left-steps input[type=number]")
    steps.fill("3")
    box = page.locator("#compare-prompt textarea")
    box.fill("a photo of a red cube")
    box.press("Enter")
    expect(page.locator("#compare-status")).to_contain_text("times as fast")
    expect(page.locator("#compare-status")).to_contain_text("3 steps")
    until(page, lambda: page.locator("#compare-slider img").count() == 2)
    sources = page.locator("#compare-slider img").evaluate_all("all => all.map(image => image.src)")
    found = [files.read_settings(files.serve(page.request.get(source).body(), "seen.png")) for source in sources]
    assert {(ask.model, ask.seed) for ask in found} == {("embedded:solids", 7), ("embedded:solids_sprint", 7)}


def test_every_stroke_gives_another_picture(page: "Page", tmp_path: Path):
    drive.choose_tab(page, "Draw")
    seen: list[bytes] = []

    def another() -> bool:
        picture = bytes_of(page, "#drawn img")
        return bool(picture) and picture not in seen

    def canvas() -> str:
        return page.locator("#canvas canvas").evaluate("canvas => canvas.toDataURL()")

    empty = canvas()
    drive.draw_stroke(page, (0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.3))
    page.wait_for_selector("#drawn img")
    until(page, another)
    page.wait_for_timeout(500)  # the last of the answers while the stroke went on
    box = canvas()
    assert box != empty
    seen.append(bytes_of(page, "#drawn img"))
    page.get_by_role("button", name="Eraser").click()
    drive.draw_stroke(page, (0.3, 0.3), (0.7, 0.3))
    until(page, another)
    assert canvas() not in (empty, box)
    page.get_by_role("button", name="Undo").click()
    until(page, lambda: canvas() == box)
    page.get_by_role("button", name="Clear").click()
    until(page, lambda: canvas() == empty)
    photograph = tmp_path / "photo.png"
    Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((80, 80))).astype(np.uint8)).save(photograph)
    upload(page, "#photograph", photograph)
    until(page, lambda: canvas() != empty)


def test_students_say_who_answered(page: "Page"):
    drive.choose_tab(page, "Students")
    captions = page.locator("#answers figcaption")
    expect(captions).to_have_count(4)
    assert [line.split("\n")[1] for line in captions.all_inner_texts()] == ["student 0"] * 2 + ["student 1"] * 2
    expect(page.locator("#partition")).to_contain_text("T-shirt, trouser")
    before = page.locator("#answers img").last.get_attribute("src")
    page.get_by_label("student 0 alone").check()
    until(page, lambda: "student 1" not in page.locator("#answers").inner_text())
    assert page.locator("#answers img").last.get_attribute("src") != before


def test_a_scene_can_be_turned_around_and_downloaded(
    page: "Page", root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drive.choose_tab(page, "3D")
    viewer = page.locator("#viewer canvas")
    viewer.wait_for()

    def red() -> bool:
        pixels = np.asarray(Image.open(io.BytesIO(viewer.screenshot())).convert("RGB")).astype(int)
        return bool(((pixels[..., 0] > 120) & (pixels[..., 1] < 100)).mean() > 0.02)

    until(page, red)
    expect(page.locator("#scene-status")).to_contain_text("a red cube")
    with page.expect_download() as download:
        page.locator("#glb").click()
    download.value.save_as(tmp_path / "mesh.glb")
    assert (tmp_path / "mesh.glb").read_bytes() == (root / "cube" / "mesh" / "mesh.glb").read_bytes()
    monkeypatch.setattr(scenes, "CONFIG", "configs/missing.yaml")
    page.get_by_text("A new scene").click()
    page.get_by_role("button", name="Train it").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("configs/missing.yaml is not here")


def test_a_training_ends_with_its_button_and_with_its_page(
    page: "Page", browser: "Browser", address: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scenes, "ROOT", save_training(tmp_path))
    log, other = root / "scenes" / "log", drive.open_page(browser, address)

    def said(*words: str) -> bool:
        return log.is_file() and log.read_text().split() == list(words)

    drive.choose_tab(other, "3D")
    other.get_by_text("A new scene").click()
    other.get_by_role("button", name="Train it").click()
    until(page, lambda: said("started"))
    other.get_by_role("button", name="Stop and save").click()
    until(page, lambda: said("started", "saved"))
    other.get_by_role("button", name="Train it").click()
    until(page, lambda: said("started", "saved", "started"))
    other.close()
    until(page, lambda: said("started", "saved", "started", "saved"))
    shutil.rmtree(log.parent)


def test_runs_are_read_live_and_may_go(page: "Page", root: Path):
    run = save_run(root / "live")
    page.reload()
    page.wait_for_selector("#picture img")
    drive.choose_tab(page, "Runs")
    chosen = page.locator("#runs .token").filter(has_text="runs/live")
    expect(chosen).to_have_count(1)  # the newest one opens by itself
    page.locator("#chart svg").wait_for()
    page.get_by_label("Runs", exact=False).first.click()
    page.get_by_role("option", name="runs/live").click()
    expect(chosen).to_have_count(0)
    expect(page.locator("#chart")).to_contain_text("Choose a run")
    page.get_by_role("option", name="runs/live").click()
    expect(chosen).to_have_count(1)
    page.locator("#chart svg").wait_for()
    before = page.locator("#chart figure").get_attribute("aria-label")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "matching": 0.01, "critic_loss": 0.1}) + "\n")
    until(page, lambda: page.locator("#chart figure").get_attribute("aria-label") != before)
    page.locator("#sheet img").wait_for()
    page.get_by_text("Reports", exact=True).click()
    expect(page.frame_locator("#report iframe").first.get_by_role("heading")).to_have_text("A report")
    shutil.rmtree(run)
    until(page, lambda: "runs/live: removed" in page.locator("#chart").inner_text())
    expect(chosen).to_have_count(0)
    drive.choose_tab(page, "Generate")
    page.locator("#prompt textarea").fill("a cone")
    until(page, lambda: shown(page).prompt == "a cone")


UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button, canvas, img, iframe")]
    .filter((e) => e.offsetParent !== null && !e.closest("#viewer"))
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.title
        || e.alt || e.closest("label") || (e.tagName === "BUTTON" && (e.innerText.trim() || e.querySelector("[alt]")))))
    .map((e) => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_every_tab_fits_and_names_its_parts(browser: "Browser", address: str, width: int, dark: bool):
    page = drive.open_page(browser, address, width, 844, dark)
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    bright = sum(int(part) for part in colour.strip("rgba()").split(",")[:3])
    assert bright < 150 if dark else bright > 600
    for name in ("Generate", "Compare", "Draw", "Students", "3D", "Runs"):
        drive.choose_tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(UNNAMED) == [], name
    page.close()
