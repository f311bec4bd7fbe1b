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
from app.library import Library, changed, inside, matching
from app.scenes import copied, settings_of
from eval.report import draw_chart, read_metrics
from models.errors import UserError

REPORTS = {"report": ("report", "report.html"), "geneval": ("geneval", "geneval.html")}
MOST_COMPARED = 6
LOOK_EVERY = 3.0
CHART: dict[str, Any] = {"concurrency_id": "chart", "concurrency_limit": 1}
"""matplotlib's settings are of the whole process."""


class View(NamedTuple):
    """What a page shows. It changes where its user chooses, never by what the page itself sends along with that or with
    the next look: answers that are still under way may be older.

    runs, series, step: as chosen; by_hand: the runs were; step None: the newest, whichever that is by then
    stamp: of all that was shown at the last look
    """

    runs: tuple[str, ...] = ()
    by_hand: bool = False
    series: str | None = None
    step: int | None = None
    stamp: str = ""


def parts_of(run: Path) -> dict[str, Path]:
    """The folders with curves and samples: the run itself, or the runs it is made of (several students, stages of
    text to 3D) by their place in it."""
    found = ["metrics.jsonl"] if inside(run, "metrics.jsonl") else ["*/metrics.jsonl", "*/*/metrics.jsonl"]
    folders = [log.parent for pattern in found for log in matching(run, pattern)]
    return {"" if folder == run else folder.relative_to(run).as_posix(): folder for folder in folders}


def steps_of(run: Path) -> dict[int, Path]:
    """Sample sheets by step; of a run with parts, those of the part that was written last."""
    folder = max(parts_of(run).values(), key=changed, default=run)
    found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in matching(folder, "samples/step-*.png"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def series_of(run: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Series of each part by their names."""
    return {part: read_metrics(folder / "metrics.jsonl") for part, folder in parts_of(run).items()}


def how_to_score(run: Path) -> str:
    """The command that judges what a run has made."""
    settings = settings_of(run)
    kind = {name: part.get("kind") for name, part in settings.items() if isinstance(part, dict)}
    if kind.get("method") == "scene_distillation":
        return "A scene is scored with all its stages: python -m eval.scene and the folder of this one's stages"
    module = "eval.geneval" if kind.get("data") == "solids" else "eval.fid"
    return f"Not scored yet: python -m {module}"


def reports_of(run: Path) -> dict[str, Path]:
    found = {name: inside(run, *parts) for name, parts in REPORTS.items()}
    return {name: path for name, path in found.items() if path is not None}


def curves(library: Library, names: list[str], series: str | None) -> tuple[list[str], str]:
    """Names of all series, and one of them over the steps of every run as a drawing for the page."""
    if not isinstance(names, list) or len(names) > MOST_COMPARED:
        raise UserError(f"runs: at most {MOST_COMPARED} compare at a time")
    found = {
        f"{name}: {part}" if part else name: lines
        for name in names
        for part, lines in series_of(library.run(name)).items()
    }
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
        """A run's series ((step, value) pairs), the steps of its samples, the names of its reports, its settings.

        Series of a run of several students are called by student and stage, then by what they are of.
        """
        folder = library.run(run)
        config = inside(folder, "config.yaml")
        return {
            "series": {
                f"{part}: {key}" if part else key: points
                for part, lines in series_of(folder).items()
                for key, points in lines.items()
            },
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
    chosen = gr.Dropdown(
        list(library.runs()),
        value=[],
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
    view = gr.State(View())
    timer = gr.Timer(LOOK_EVERY, active=False)

    def look(view: View, at_once: bool = True) -> tuple[Any, ...]:
        """Everything that changed since the last look; what has gone is left out of the choice."""
        now = library.runs()
        kept = [name for name in view.runs if name in now]
        gone = [name for name in view.runs if name not in now]
        stamp = f"{kept} " + " ".join(_stamp(now[name]) for name in kept) + f" {len(now)}"
        if not at_once and stamp == view.stamp:
            return (gr.skip(),) * 8
        every, drawing = curves(library, kept, view.series) if kept else ([], "<p>Choose a run.</p>")
        if gone:
            drawing = f"<p class='warn'>{html.escape(', '.join(gone))}: removed.</p>" + drawing
        first = now[kept[0]] if kept else None
        sheets = steps_of(first) if first else {}
        at = view.step if view.step in sheets else next(reversed(sheets), None)
        pages = reports_of(first) if first else {}
        settings = inside(first, "config.yaml") if first else None
        unscored = f"<p>{html.escape(how_to_score(first))}</p>" if first else ""
        return (
            gr.update(choices=list(now), value=kept),
            gr.update(choices=every, value=view.series if view.series in every else (every[0] if every else None)),
            drawing,
            gr.update(choices=list(sheets), value=at),
            copied(sheets[at]) if at is not None else None,
            "".join(framed(path, name) for name, path in pages.items()) or unscored,
            settings.read_text(errors="replace") if settings else "",
            view._replace(runs=tuple(kept), stamp=stamp),
        )

    @guarded
    def choose_runs(names: list[str], view: View) -> tuple[Any, ...]:
        runs = tuple(names or ())
        step = view.step if runs[:1] == view.runs[:1] else None
        return look(view._replace(runs=runs, by_hand=True, step=step))

    @guarded
    def choose_series(series: str | None, view: View) -> tuple[Any, ...]:
        return look(view._replace(series=series))

    @guarded
    def choose_step(step: int | None, view: View) -> tuple[Any, ...]:
        newest = next((next(reversed(steps_of(library.run(name))), None) for name in view.runs[:1]), None)
        return look(view._replace(step=None if step == newest else step))

    @guarded
    def opened(view: View) -> tuple[Any, ...]:
        """With the newest run that has curves, until its user has chosen others."""
        if not view.by_hand:
            newest = next((name for name, run in library.runs().items() if parts_of(run)), None)
            view = view._replace(runs=(newest,) if newest else (), step=None)
        return look(view)

    @guarded
    def again(view: View) -> tuple[Any, ...]:
        return look(view, at_once=False)

    def watched(event: gr.SelectData) -> gr.Timer:
        """No page asks for what it does not show."""
        return gr.Timer(active=event.value == "Runs")

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [chosen, series, chart, step, sheet, report, config, view]
    for part, choose in ((chosen, choose_runs), (series, choose_series), (step, choose_step)):
        part.input(choose, [part, view], outputs, trigger_mode="always_last", **quiet, **CHART)
    timer.tick(again, [view], outputs, queue=True, **quiet, **CHART)
    tabs.select(watched, None, timer, **quiet)
    this.select(opened, [view], outputs, **quiet, **CHART)


def _stamp(run: Path) -> str:
    """Changes whenever something that is shown does."""
    times = []
    files = [(run, name) for name in ("report", "geneval", "config.yaml")]
    files += [(folder, name) for folder in parts_of(run).values() for name in ("metrics.jsonl", "samples")]
    for folder, name in files:
        try:
            times.append(str((folder / name).stat().st_mtime_ns))
        except OSError:
            times.append("-")
    return ",".join(times)
