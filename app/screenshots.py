"""Screenshots of every tab, on a desk and on a phone.

python -m app.screenshots --run runs
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from PIL import Image

from app.drive import browser, choose_tab, draw_stroke, open_page
from models.errors import run_command

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (1280, 390)


@dataclass(frozen=True)
class Options:
    """Write TAB-WIDTH.jpg for each of the six tabs."""

    run: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A run, or a folder of runs, for the tabs that show some; may be given several times. Default: runs/."""
    output: Path = Path("docs/screenshots")
    """Folder for the pictures."""
    dark: bool = False
    """In the dark theme."""


def generate(page: "Page") -> None:
    page.locator("#prompt textarea").fill("a photo of a green cone and a black torus")
    count = page.locator("#count input[type=number]")
    count.fill("9")
    count.press("Tab")
    page.locator("#status").get_by_text("seeds 7 to 15").wait_for()


def compare(page: "Page") -> None:
    page.locator("#compare-prompt textarea").fill("a photo of a red cube")
    page.locator("#compare-prompt textarea").press("Enter")
    page.locator("#compare-status").get_by_text("times as fast").wait_for(timeout=60_000)


def draw(page: "Page") -> None:
    draw_stroke(page, (0.3, 0.42), (0.52, 0.5), (0.52, 0.78), (0.3, 0.68), (0.3, 0.42), (0.5, 0.35), (0.72, 0.42))
    draw_stroke(page, (0.52, 0.5), (0.72, 0.42), (0.72, 0.68), (0.52, 0.78))
    page.locator("#draw-status").get_by_text("a picture").wait_for()


def nothing(page: "Page") -> None:
    page.wait_for_timeout(3000)


TABS: dict[str, Callable[["Page"], None]] = {
    "Generate": generate,
    "Compare": compare,
    "Draw": draw,
    "Students": nothing,
    "3D": nothing,
    "Runs": nothing,
}


def main(options: Options) -> None:
    from app import studio
    from app.engine import Engine
    from app.library import Library

    options.output.mkdir(parents=True, exist_ok=True)
    roots = options.run or ([Path("runs")] if Path("runs").is_dir() else [])
    address = studio.launch(studio.build_app(Engine(Library(roots))))
    with browser() as made:
        for width in WIDTHS:
            page = open_page(made, address, width, 900 if width > 600 else 844, options.dark)
            for name, act in TABS.items():
                choose_tab(page, name)
                page.wait_for_timeout(500)
                act(page)
                page.wait_for_timeout(700)
                path = options.output / f"{name.lower()}-{width}{'-dark' if options.dark else ''}.jpg"
                shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                shot.convert("RGB").save(path, quality=82, optimize=True)
                print(path)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
