"""Runs: curves of several, samples by step and reports of one, live while training goes on."""

import html
import re
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from app import files
from app.ask import shown, whole
from app.engine import Engine
from app.handlers import PICTURE, file_data, guarded
from app.library import Library, inside, matching
from app.scenes import copied
from eval.report import draw_chart, read_metrics
from models.errors import UserError

REPORTS = {"report": ("report", "report.html"), "geneval": ("geneval", "geneval.html")}
MOST_COMPARED = 6
LOOK_EVERY = 3.0
CHART: dict[str, Any] = {"concurrency_id": "chart", "concurrency_limit": 1}
"""matplotlib's settings are of the whole process."""


class Seen(NamedTuple):
    """The last look: a stamp of all that was shown, the run whose samples were, and its newest step then."""

    stamp: str = ""
    run: str | None = None
    newest: int | None = None


def steps_of(run: Path) -> dict[int, Path]:
    """Sample sheets by step."""
    found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in matching(run, "samples/step-*.png"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def step_shown(step: int | None, sheets: dict[int, Path], run: str | None, seen: Seen) -> int | None:
    """The newest of ``sheets`` for another run, and where the newest was shown; else the step that was chosen."""
    if step in sheets and run == seen.run and step != seen.newest:
        return step
    return next(reversed(sheets), None)


def reports_of(run: Path) -> dict[str, Path]:
    found = {name: inside(run, *parts) for name, parts in REPORTS.items()}
    return {name: path for name, path in found.items() if path is not None}


def curves(library: Library, names: list[str], series: str | None) -> tuple[list[str], str]:
    """Names of all series, and one of them over the steps of every run as a drawing for the page."""
    if not isinstance(names, list) or len(names) > MOST_COMPARED:
        raise UserError(f"runs: at most {MOST_COMPARED} compare at a time")
    found = {name: read_metrics(library.run(name) / "metrics.jsonl") for name in names}
    every = sorted({key for lines in found.values() for key in lines}, key=lambda key: (_dull(key), key))
    if not every:
        return [], "<p>No curves yet.</p>"
    wanted = series if series in every else every[0]
    plain = lambda name: name.replace("$", r"\$")
    drawn = {plain(name): lines[wanted] for name, lines in found.items() if wanted in lines}
    positive = all(y > 0 for points in drawn.values() for _, y in points)
    chart = draw_chart(plain(wanted), drawn, "", log_scale=positive)
    return (
        every,
        f"<figure class='chart' role='img' aria-label='{html.escape(chart.description, True)}'>{chart.svg}</figure>",
    )


def _dull(key: str) -> bool:
    return key.startswith(("seconds", "skipped", "lr", "grad_norm", "time"))


def framed(path: Path, name: str) -> str:
    """A report in a frame of its own, without scripts."""
    page = html.escape(path.read_text(errors="replace")[: files.MAX_BYTES], True)
    return f"<iframe class='report' sandbox='' title='{html.escape(name, True)}' srcdoc=\"{page}\"></iframe>"


def endpoints(engine: Engine) -> None:
    """What clients may call."""
    library = engine.library

    def runs() -> list[str]:
        """Names of the runs, the newest first."""
        return list(library.runs())

    def run(run: str) -> dict:
        """A run's series ((step, value) pairs), the steps of its samples, the names of its reports, its settings."""
        folder = library.run(run)
        config = inside(folder, "config.yaml")
        return {
            "series": read_metrics(folder / "metrics.jsonl"),
            "samples": list(steps_of(folder)),
            "reports": list(reports_of(folder)),
            "config": config.read_text(errors="replace") if config else None,
        }

    def sample(run: str, step: int) -> dict:
        """The sample sheet of a run at a step that /run lists."""
        found = steps_of(library.run(run))
        number = whole("step", step, 0, 10**12)
        if number not in found:
            raise UserError(f"step: this run has no samples at {number}; it has them at {list(found)[:20]}")
        return file_data(copied(found[number]) or "")

    def report(run: str, name: str = "report") -> dict:
        """A report of a run as HTML; name: one that /run lists."""
        found = reports_of(library.run(run))
        if name not in found:
            raise UserError(f"report: this run has no report '{shown(name)}'; it has {list(found)}")
        return file_data(copied(found[name]) or "")

    gr.api(guarded(runs), api_name="runs")
    gr.api(guarded(run), api_name="run")
    gr.api(guarded(sample), api_name="sample")
    gr.api(guarded(report), api_name="report")


def tab(engine: Engine, tabs: gr.Tabs, this: gr.Tab) -> None:
    """Build the tab inside a gr.Blocks."""
    library = engine.library
    names = list(library.runs())
    chosen = gr.Dropdown(
        names,
        value=[name for name in names if inside(library.run(name), "metrics.jsonl")][:1],
        multiselect=True,
        max_choices=MOST_COMPARED,
        label="Runs (the first one's samples and reports are shown)",
        elem_id="runs",
        interactive=True,
    )
    with gr.Row():
        with gr.Column(min_width=320):
            series = gr.Dropdown([], label="Curve", elem_id="series", interactive=True)
            chart = gr.HTML("", elem_id="chart")
        with gr.Column(min_width=320):
            step = gr.Dropdown([], label="Samples at step", elem_id="step", interactive=True)
            sheet = gr.Image(
                **PICTURE,
                label="Samples",
                show_label=False,
                buttons=["download", "fullscreen"],
                elem_id="sheet",
                elem_classes="picture short",
                alt_text="Samples of the run at this step",
            )
    with gr.Accordion("Reports", open=False, elem_id="reports"):
        report = gr.HTML("", elem_id="report")
    with gr.Accordion("Settings", open=False):
        config = gr.Code("", language="yaml", label="config.yaml", interactive=False, elem_id="config")
    seen = gr.State(Seen())
    timer = gr.Timer(LOOK_EVERY, active=False)

    @guarded
    def look(
        chosen: list[str], series: str | None, step: int | None, seen: Seen, at_once: bool = True
    ) -> tuple[Any, ...]:
        """Everything that changed since the last look; what has gone is left out of the choice."""
        now = library.runs()
        kept = [name for name in chosen or [] if name in now]
        stamp = f"{kept} {series} {step} " + " ".join(_stamp(now[name]) for name in kept) + f" {len(now)}"
        if not at_once and stamp == seen.stamp:
            return (gr.skip(),) * 8
        gone = [name for name in chosen or [] if name not in now]
        every, drawing = curves(library, kept, series) if kept else ([], "<p>Choose a run.</p>")
        if gone:
            drawing = f"<p class='warn'>{html.escape(', '.join(gone))}: removed.</p>" + drawing
        run = kept[0] if kept else None
        first = now[run] if run else None
        sheets = steps_of(first) if first else {}
        at = step_shown(step, sheets, run, seen)
        pages = reports_of(first) if first else {}
        settings = inside(first, "config.yaml") if first else None
        return (
            gr.update(choices=list(now), value=kept),
            gr.update(choices=every, value=series if series in every else (every[0] if every else None)),
            drawing,
            gr.update(choices=list(sheets), value=at),
            copied(sheets[at]) if at is not None else None,
            "".join(framed(path, name) for name, path in pages.items()) or "<p>Not scored yet: python -m eval.fid</p>",
            settings.read_text(errors="replace") if settings else "",
            Seen(stamp, run, next(reversed(sheets), None)),
        )

    @guarded
    def again(*values: Any) -> tuple[Any, ...]:
        return look(*values, at_once=False)

    def watched(event: gr.SelectData) -> gr.Timer:
        """No page asks for what it does not show."""
        return gr.Timer(active=event.value == "Runs")

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    inputs, outputs = [chosen, series, step, seen], [chosen, series, chart, step, sheet, report, config, seen]
    gr.on([chosen.input, series.input, step.input], look, inputs, outputs, trigger_mode="always_last", **quiet, **CHART)
    timer.tick(again, inputs, outputs, queue=True, **quiet, **CHART)
    tabs.select(watched, None, timer, **quiet)
    this.select(look, inputs, outputs, **quiet, **CHART)


def _stamp(run: Path) -> str:
    """Changes whenever something that is shown does."""
    times = []
    for name in ("metrics.jsonl", "samples", "report", "config.yaml"):
        try:
            times.append(str((run / name).stat().st_mtime_ns))
        except OSError:
            times.append("-")
    return ",".join(times)
