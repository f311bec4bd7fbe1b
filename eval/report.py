"""The report of a run: one HTML page that opens offline, the same numbers as JSON, and the pictures.

python -m eval.report runs/my_run    # draw report.html again from report.json, with the newest training curve
"""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eval.generate import Sampler, images, painted
from models.errors import UserError, run_command
from models.teachers.base import ClassSpec

GRID_ROWS, GRID_COLUMNS = 4, 10
CURVE_POINTS = 400
LOSS_TERMS = {"matching", "regression", "adversarial"}


@dataclass(frozen=True)
class Chart:
    """One drawing for the page: inline ``svg`` and the sentence that stands for it."""

    title: str
    description: str
    svg: str


# ---------------------------------------------------------------------------------------------------- pictures


def _pixels(images_: Tensor, side: int) -> NDArray[np.uint8]:
    """uint8 (B, C, H, W) to RGB (B, side, side, 3), enlarged by whole pixels."""
    factor = max(1, side // images_.shape[-1])
    rgb = images_.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return rgb.repeat(factor, 1).repeat(factor, 2)


def picture_grid(samplers: list[Sampler], spec: ClassSpec, seed: int, device: torch.device | str) -> NDArray[np.uint8]:
    """RGB (H, W, 3): one column for each of the first ten classes; four groups of rows, one row for each sampler.

    Pictures of a group and column have the same noise and class; with at most ten classes they are the first of those
    that are scored.
    """
    columns = min(GRID_COLUMNS, spec.num_classes)
    n = GRID_ROWS * columns
    rest: dict[str, Any] = {"device": device, "to_uint8": painted(spec)}
    made = [torch.cat(list(images(s, n, spec.shape, columns, 50, seed, **rest))) for s in samplers]
    tiles = [_pixels(pictures, 64) for pictures in made]
    side, head, margin, gap = tiles[0].shape[1], 22, 64, 8
    group = len(samplers) * side + gap
    canvas = Image.new("RGB", (margin + columns * (side + 2), head + GRID_ROWS * group - gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, name in enumerate(spec.class_names[:columns]):
        draw.text((margin + column * (side + 2) + side / 2, head / 2), name, "black", font, anchor="mm")
    for row in range(GRID_ROWS):
        for index, sampler in enumerate(samplers):
            top = head + row * group + index * side
            draw.text((4, top + side / 2), sampler.name.split(",")[0], "black", font, anchor="lm")
            for column in range(columns):
                tile = Image.fromarray(tiles[index][row * columns + column])
                canvas.paste(tile, (margin + column * (side + 2), top))
    return np.asarray(canvas)


def pairs_grid(pairs: Tensor) -> NDArray[np.uint8]:
    """RGB (H, W, 3) of uint8 pairs (n, 2, C, H, W): the first ones in a row, the second ones below them."""
    rows = [np.concatenate(list(_pixels(pairs[:, which], 64)), 1) for which in range(2)]
    return np.concatenate([rows[0], np.full((4, *rows[0].shape[1:]), 255, np.uint8), rows[1]])


def embedded_png(path: Path) -> str | None:
    """A picture as text for a page; None if it is not there."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


# ------------------------------------------------------------------------------------------------------ curves


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Series (step, value) of every finite number in metrics.jsonl; broken lines are left out."""
    series: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return series
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step = float(entry.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                series.setdefault(name, []).append((step, float(value)))
    return series


def _thinned(points: list[tuple[float, float]]) -> NDArray[np.float64]:
    """At most CURVE_POINTS points (k, 2): means over equal stretches of the series."""
    array = np.array(points)
    if len(array) <= CURVE_POINTS:
        return array
    return np.stack([part.mean(0) for part in np.array_split(array, CURVE_POINTS)])


def draw_chart(
    title: str,
    series: dict[str, list[tuple[float, float]]],
    unit: str,
    log_scale: bool = False,
    over: str = "student step",
) -> Chart:
    """Lines over student steps as an SVG that takes its text colour from the page."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    ink = "#010203"
    colours = ["#2f7fd6", "#d9772b", "#2f9e62", "#b04fc0", "#c9373f", "#8a8a2a"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(series.items(), colours * len(series), strict=False):
            xy = _thinned(points)
            axes.plot(xy[:, 0], xy[:, 1], label=name, color=colour, linewidth=1.6, marker="o" if len(xy) < 30 else None)
        axes.set_xlabel(over, color=ink)
        if over != "student step":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylabel(unit, color=ink)
        if log_scale and all(y > 0 for points in series.values() for _, y in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.tick_params(colors=ink, which="both")
        axes.grid(alpha=0.25, color="#888888")
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_edgecolor(ink)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'((?:id="|href="#|url\(#))', rf"\1{prefix}-", svg)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    last = "; ".join(f"{name}: {points[-1][1]:.4g} at {over} {points[-1][0]:.0f}" for name, points in series.items())
    label = f"{title}. Last values: {last}"
    return Chart(title, label, svg.replace("<svg", '<svg role="img" aria-hidden="true" focusable="false"', 1))


def charts(series: dict[str, list[tuple[float, float]]]) -> list[Chart]:
    """The distance over steps, and one chart of losses."""
    drawn = []
    distances = {name: points for name, points in series.items() if name == "fd" or name.startswith("fd_")}
    losses = {name: points for name, points in series.items() if "loss" in name or name in LOSS_TERMS}
    if distances:
        drawn.append(draw_chart("Distance during training", distances, "Fréchet distance", log_scale=True))
    if losses:
        drawn.append(draw_chart("Losses", losses, "loss", log_scale=True))
    return drawn


def curve_of(scores: list[dict[str, Any]]) -> Chart | None:
    """Distance over network calls of a generator's different numbers of steps; None with fewer than three of them."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(scores, key=lambda row: row["nfe"]):
        series.setdefault(row["sampler"].split(",")[0], []).append((row["nfe"], row["fd"]))
    if max(map(len, series.values())) < 3:
        return None
    return draw_chart("Distance over network calls", series, "distance", log_scale=True, over="network calls")


# ------------------------------------------------------------------------------------------------------- pages


def decimals(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def rates_of(result: dict[str, Any]) -> dict[str, float]:
    """Pictures per second by sampler; empty where none was timed."""
    return result["speed"]["images_per_second"] if result["speed"] else {}


def as_text(result: dict[str, Any]) -> str:
    """The scores as a table for a terminal."""
    lines = [f"{result['protocol']['extractor']}, {result['protocol']['images']} pictures"]
    columns = {
        "calls": 6,
        "FD": 10,
        "floor": 8,
        "KID x 1e3": 18,
        "precision": 11,
        "recall": 8,
        "IS": 8,
        "pictures/s": 12,
    }
    lines.append(f"{'':<30}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    rates = rates_of(result)
    for row in result["scores"]:
        kid = "-" if row["kid"] is None else f"{1e3 * row['kid']:.2f} ± {1e3 * row['kid_std']:.2f}"
        shown = [
            row["nfe"] or "-",
            decimals(row["fd"], 3),
            decimals(row["floor"], 3),
            kid,
            decimals(row["precision"], 3),
        ]
        shown += [decimals(row[name], 3) for name in ("recall", "inception_score")]
        shown += [decimals(rates.get(row["sampler"]), 1)]
        cells = "".join(f"{value:>{width}}" for value, width in zip(shown, columns.values(), strict=True))
        times = [row.get(f"seconds_{what}") for what in ("generating", "scoring")]
        spent = "" if None in times else f", {times[0]:.1f} s to make and {times[1]:.1f} s to score"
        lines.append(f"{row['sampler']:<30}{cells}  {row['source']}{spent}")
    return "\n".join([*lines, *(f"warning: {caution}" for caution in result["cautions"])])


def pages() -> jinja2.Environment:
    """The templates, everything in them escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def write(result: dict[str, Any], folder: Path, run: Path) -> Path:
    """Write report.json and report.html into ``folder``; returns the page.

    ``result`` is what ``eval.fid.evaluate`` returned; grid.png is taken from ``folder``, the training curve and the
    settings from metrics.jsonl and config.yaml of ``run``, each if it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    config, curve = run / "config.yaml", curve_of(result["scores"])
    page = (
        pages()
        .get_template("report.html")
        .render(
            **result,
            name=run.resolve().name,
            rates=rates_of(result),
            decimals=decimals,
            grid=embedded_png(folder / "grid.png"),
            nearest_grid=embedded_png(folder / "nearest.png"),
            curve=curve,
            charts=charts(read_metrics(run / "metrics.jsonl")),
            config=config.read_text() if config.is_file() else None,
        )
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


FAILURES_PER_TASK = 4


def failures(records: Sequence[Mapping[str, Any]], picture_of: Callable[[int], Image.Image]) -> list[dict[str, str]]:
    """The first wrong pictures of each task, at most 128 pixels wide, with prompt and reason."""
    found, counts = [], dict.fromkeys((record["tag"] for record in records), 0)
    for index, record in enumerate(records):
        if record["correct"] or counts[record["tag"]] == FAILURES_PER_TASK:
            continue
        counts[record["tag"]] += 1
        picture, buffer = picture_of(index).convert("RGB"), io.BytesIO()
        picture.thumbnail((128, 128))
        picture.save(buffer, "PNG")
        png = base64.b64encode(buffer.getvalue()).decode()
        found.append({"png": png, "prompt": record["prompt"], "reason": record["reason"], "task": record["tag"]})
    return sorted(found, key=lambda failure: list(counts).index(failure["task"]))


def write_geneval(
    report: Mapping[str, Any], folder: Path, failing: str, failed: list[dict[str, str]], prompts: Sequence[str]
) -> Path:
    """geneval.html of what geneval.json holds, with grid.png if it is there; returns the page."""
    rows = report["scores"].values()
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    page = (
        pages()
        .get_template("geneval.html")
        .render(
            name=report["name"],
            protocol=report["protocol"],
            provenance={k: v for k, v in report.items() if k not in ("name", "protocol", "scores")},
            scores=report["scores"],
            tasks=tasks,
            distances=any("fd_solids" in row for row in rows),
            decimals=decimals,
            grid=embedded_png(folder / "grid.png"),
            prompts=prompts,
            failing=failing,
            failures=failed,
        )
    )
    target = folder / "geneval.html"
    target.write_text(page, encoding="utf-8")
    return target


@dataclass(frozen=True)
class Options:
    """Draw a run's report.html again from its report.json."""

    run: tyro.conf.Positional[Path]
    """Run folder that has been scored."""


def main(options: Options) -> None:
    """Read report/report.json of the run and write report/report.html."""
    source = options.run / "report" / "report.json"
    try:
        result = {"nearest": None} | json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: score the run first with `python -m eval.fid --student`") from error
    print(f"report: {write(result, source.parent, options.run)}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
