"""The report of judged scenes: one HTML page that opens offline, the scores as JSON, and a contact sheet."""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval.glb import Exported, on_white
from eval.nearest_solid import solid_outlines
from eval.report import Chart, draw_chart, pages, read_metrics
from eval.scene_scores import solid_pictures, to_pictures
from models.folders import replace_file, replace_text
from models.scene import solids
from models.scene.cameras import Orbit

COLUMNS = 8
"""Views around in a strip and on the contact sheet."""
SIDE, THUMB = 192, 96
"""Their sides in pixels."""
ROWS = 64
"""Scenes on a contact sheet at most."""

MEANINGS: dict[str, tuple[str, str]] = {
    "silhouette_iou": (
        "Silhouette IoU",
        "Overlap of the outlines with the true solid's in 12 held-out views; 1 is the same.",
    ),
    "worst_silhouette_iou": ("Worst view", "The lowest of those 12 overlaps."),
    "volume_iou": ("Volume IoU", "Overlap of what both enclose; hollows and dents that outlines hide count here."),
    "chamfer": (
        "Chamfer distance",
        "Mean distance between the two surfaces, in world units; the solid's radius is below.",
    ),
    "psnr": ("PSNR", "Bare colours against the solid in its light, where both are seen, in dB; higher is nearer."),
    "albedo_psnr": ("PSNR of the colour", "Bare colours against the solid's own colour without light, in dB."),
    "colour_right": ("Colour right", "Share of views whose mean colour is nearest to the one that the prompt names."),
    "shape_right": (
        "Shape right",
        "Share of views whose outline is nearest to the shape that the prompt names, among six.",
    ),
    "view_agreement": (
        "View agreement",
        "Share of views that show what all views together show; less than 1 is another thing from another "
        "side (Janus).",
    ),
    "variant": ("Variant", "The nearest of six shapes in ten colours, of all views together."),
    "radius": ("Radius", "Of the true solid that fits best, in world units."),
    "glb_psnr": (
        "PSNR of the file",
        "model.glb as it is read back against the particle that it was made from, at 128 pixels, in dB.",
    ),
    "glb_iou": ("Outlines of the file", "Overlap of their outlines."),
    "fake_score_error": (
        "Fake-score error",
        "Distance of the last stage's critic to the exact score, over that of the untrained one; below 1 is "
        "better than untrained.",
    ),
    "clip_score": ("CLIP score", "Mean cosine of 36 views and the prompt."),
    "r_precision": ("R-precision", "Share of views whose nearest prompt is their own."),
    "front_twice": (
        "Front seen twice",
        "Share of back views that CLIP calls a front view; it says something only of what has one front, and "
        "where the next number is higher.",
    ),
    "front_seen": ("Front seen", "Share of front views that CLIP calls a front view."),
}
"""Title and a plain sentence of each score, in the order of the page."""

COLUMNS_OF_TABLE = ("silhouette_iou", "volume_iou", "view_agreement", "colour_right", "psnr", "glb_psnr",
                    "fake_score_error", "clip_score", "r_precision")  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """One particle as the page has it; ``truth`` is the solid that it was compared with, if any."""

    path: Path
    model: Path
    stages: Sequence[Path]
    exported: Exported
    orbit: Orbit
    truth: solids.Solid | None
    scores: dict[str, Any]

    @property
    def name(self) -> str:
        parent = self.path.resolve().parent.name
        number = "" if self.model.name == "model.glb" else f", particle {self.model.name.split('-')[0]}"
        return f"{parent}/{self.path.resolve().name}{number}"

    def strip(self, side: int) -> list[Tensor]:
        """Rows (COLUMNS, 3, side, side) in [0, 1]: model.glb all around, lit, and the true solid if there is one; cut
        out around the scene."""
        cameras = self.orbit.turntable(COLUMNS)
        colours, coverage = self.exported.views(cameras, 2 * side, lit=True)
        rows = [on_white(colours, coverage)]
        if self.truth is not None:
            mask = solid_outlines(self.truth, cameras, 2 * side)
            rows.append(on_white(solid_pictures(self.truth, cameras, 2 * side), mask.float()))
        top, left, length = _window(torch.cat([(row < 1).any(1) for row in rows]))
        cut = [row[..., top : top + length, left : left + length] for row in rows]
        return [F.interpolate(row, (side, side), mode="bilinear", antialias=True).clamp(0, 1) for row in cut]


def _window(masks: Tensor) -> tuple[int, int, int]:
    """Top, left and side of the square around all masks (B, H, W), with a margin, within the picture."""
    size = masks.shape[-1]
    if not bool(masks.any()):
        return 0, 0, size
    x0, y0, x1, y1 = solids.boxes_around(masks.any(0)).tolist()
    side = min(size, round(1.15 * max(x1 - x0, y1 - y0)))
    place = lambda low, high: min(max((low + high - side) // 2, 0), size - side)
    return place(y0, y1), place(x0, x1), side


def joined(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of pictures (B, 3, H, W) in [0, 1], one below the other."""
    return to_pictures(torch.cat([torch.cat(list(row), 2) for row in rows], 1)[None])[0]


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _shown_value(key: str, value: Any) -> str:
    if value is None:
        return "-"
    digits = 1 if "psnr" in key else 3
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _curves(shown: Shown, prefix: str) -> list[Chart]:
    """Losses of every stage over its steps."""
    drawn = []
    for stage in shown.stages:
        series = read_metrics(stage / "metrics.jsonl")
        losses = {name: series[name] for name in ("matching", "critic_loss", "discriminator_loss") if name in series}
        if losses:
            drawn.append(draw_chart(f"{prefix}{stage.name}: losses", losses, "loss"))
    return drawn


def _links(shown: Shown, output: Path) -> list[dict[str, str]]:
    """The scene's files, relative to the page."""
    video = shown.model.with_name(shown.model.name.replace("model.glb", "turntable.mp4"))
    found = [path for path in (shown.model, video) if path.is_file()]
    relative = lambda path: quote(Path(os.path.relpath(path.resolve(), output.resolve())).as_posix())
    return [{"href": relative(path), "name": path.name} for path in found]


def _section(shown: Shown, strip: Sequence[Tensor], output: Path, number: int, many: bool) -> dict[str, Any]:
    scores = [
        {"title": title, "value": _shown_value(key, shown.scores[key]), "meaning": meaning}
        for key, (title, meaning) in MEANINGS.items()
        if shown.scores.get(key) is not None
    ]
    return {
        "name": shown.name,
        "prompt": shown.scores["prompt"],
        "strip": _png(joined(strip)),
        "truth": None if shown.truth is None else f"{shown.truth.colour} {shown.truth.shape}",
        "scores": scores,
        "fake_score": shown.scores.get("fake_score", {}),
        "charts": _curves(shown, f"Scene {number}, " if many else ""),
        "links": _links(shown, output),
    }


def _table(result: dict[str, Any], shown: Sequence[Shown]) -> dict[str, Any]:
    """A row for each particle and one of means, of the scores that there are."""
    keys = [key for key in COLUMNS_OF_TABLE if any(each.scores.get(key) is not None for each in shown)]
    cells = lambda each: [_shown_value(key, each.scores.get(key)) for key in keys]
    rows = [{"name": each.name, "variant": each.scores.get("variant"), "cells": cells(each)} for each in shown]
    mean = result["mean"]
    spread = lambda key: f" ± {mean[f'{key}_interval']:.3f}" if f"{key}_interval" in mean else ""
    means = [_shown_value(key, mean.get(key)) + spread(key) for key in keys]
    return {"titles": [MEANINGS[key][0] for key in keys], "rows": rows, "means": means}


def write(result: dict[str, Any], shown: Sequence[Shown], output: Path) -> Path:
    """Write report.html and report.json into ``output``, with several particles contact_sheet.png; returns the page."""
    output.mkdir(parents=True, exist_ok=True)
    many, sheet = len(shown) > 1, None
    strips = [each.strip(SIDE) for each in shown]
    if many:
        small = lambda row: F.interpolate(row, (THUMB, THUMB), mode="bilinear", antialias=True)
        sheet = joined([small(strip[0]) for strip in strips[:ROWS]])
        with replace_file(output / "contact_sheet.png") as temporary:
            sheet.save(temporary, "PNG")
    replace_text(output / "report.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    page = (
        pages()
        .get_template("scene.html")
        .render(
            sections=[
                _section(each, strip, output, number, many)
                for number, (each, strip) in enumerate(zip(shown, strips, strict=True), 1)
            ],
            table=_table(result, shown) if many else None,
            sheet=None if sheet is None else _png(sheet),
            rows=min(len(shown), ROWS),
            diversity=result["diversity"],
            columns=COLUMNS,
            clip=next((each.scores["clip"] for each in shown if "clip" in each.scores), None),
        )
    )
    replace_text(output / "report.html", page)
    return output / "report.html"
