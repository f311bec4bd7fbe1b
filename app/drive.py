"""The page in a headless Chromium, for screenshots, measurements and tests."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# WebGL without a graphics card, for the 3D viewer.
FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def chromium() -> str:
    """The path of a Chromium or Chrome; UserError if there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise UserError("a browser is needed: apt-get install chromium")
    return found


@contextmanager
def browser() -> Iterator["Browser"]:
    """A headless browser; UserError without Playwright's package or a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise UserError("playwright is needed: pip install -c constraints.txt -e '.[app,dev]'") from error
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield made
        finally:
            made.close()


def open_page(made: "Browser", address: str, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
    """The studio's page once its first picture is there."""
    page = made.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.goto(address)
    page.wait_for_selector("#picture img", timeout=60_000)
    return page


def choose_tab(page: "Page", name: str) -> None:
    """Also where a narrow page hides some tabs behind a button."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
    else:
        tab.click()


def draw_stroke(page: "Page", *points: tuple[float, float]) -> None:
    """A line through ``points``, in shares of the canvas."""
    board = page.locator("#canvas canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box is not None
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y, steps=8)
    page.mouse.up()
