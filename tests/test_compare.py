"""The comparison of methods: trains, scores, tabulates, and goes on where it stopped."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.compare import Options, Record, Row, main, markdown, pace, steps_in
from models.errors import UserError
from tests.tiny import ROOT, environment, save_network, save_pictures, write_settings


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Two methods, two seeds, two steps of a tiny teacher with ten classes of 32 x 32 pixels."""
    base = tmp_path_factory.mktemp("compare")
    data = {"kind": "image_folder", "path": str(save_pictures(base / "pictures", size=32)), "size": 32, "channels": 1}
    save_network(base / "teacher", None, 0)
    configs = tuple(
        write_settings(base, kind, method={"kind": kind, "critic_turns": 1}, data=data) for kind in ("sid", "dmd2")
    )
    chosen = Options(configs, (0, 1), 2, None, 20, jobs=2, runs=base / "runs", output=base / "report")
    main(chosen)
    return chosen


def test_every_run_is_in_the_table(options: Options):
    found = json.loads((options.output / "compare.json").read_text())["steps"]
    assert [row["name"] for row in found["rows"]] == ["sid", "dmd2"] and len(found["teacher"]) == 2
    for row in found["rows"]:
        assert row["steps"] == 2 and len(row["scores"]) == 2 and len(set(row["scores"])) == 2
        assert all(second > 0 for second in row["seconds"])
    text = (options.output / "compare.md").read_text()
    assert (
        "Equal steps of each student (2), 2 seeds" in text and text.count("±") == 2 and "teacher, 18 Heun steps" in text
    )


def test_repeating_it_reads_what_is_there(options: Options):
    before = {path: path.stat().st_mtime_ns for path in options.runs.rglob("*") if path.is_file()}
    main(options)
    assert {path: path.stat().st_mtime_ns for path in options.runs.rglob("*") if path.is_file()} == before


def test_what_was_made_by_other_settings_is_not_passed_off(options: Options):
    with pytest.raises(UserError, match="sid-2-0 was made from"):
        main(replace(options, set=("student.lr=0.5",)))
    config, text = options.configs[0], options.configs[0].read_text()
    config.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(UserError, match="as it was then"):
        main(options)
    config.write_text(text)
    record = options.runs / "sid-2-0.json"
    record.rename(record.with_suffix(".away"))
    with pytest.raises(UserError, match="a run of another command"):
        main(options)
    record.with_suffix(".away").rename(record)


def test_scores_are_measured_again_for_another_protocol(options: Options):
    first = json.loads((options.output / "compare.json").read_text())["steps"]["rows"][0]["scores"]
    main(replace(options, num_images=30, seeds=(0,), configs=options.configs[:1]))
    again = json.loads((options.output / "compare.json").read_text())["steps"]["rows"][0]["scores"]
    assert again[0] != first[0]
    main(options)
    assert json.loads((options.output / "compare.json").read_text())["steps"]["rows"][0]["scores"] == first


def test_an_interrupted_comparison_counts_its_time_and_goes_on(options: Options, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM while a run trains: the run saves and ends, and the next call adds to its time."""
    chosen = replace(options, configs=options.configs[:1], seeds=(5,), steps=10000, runs=options.runs / "more")
    record = Record(chosen, chosen.configs[0], 10000, 5)

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None or not (record.folder / "metrics.jsonl").is_file():
            return original(process, timeout)
        raise KeyboardInterrupt

    original = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        record.train()
    monkeypatch.undo()
    checkpoints = list((record.folder / "checkpoints").glob("step-*"))
    assert checkpoints and "the same command resumes" in record.log.read_text()
    spent = Record(chosen, chosen.configs[0], 10000, 5).values["seconds"]
    assert spent > 0
    record.steps = int(checkpoints[-1].name.split("-")[1]) + 1  # the end in sight
    assert record.train() > spent


def test_equal_time_gives_each_method_steps_by_its_own_pace(options: Options):
    paces = {config: pace(options, config) for config in options.configs}
    assert {config: pace(options, config) for config in options.configs} == paces, "measured once"
    seconds = 4 * max(paces.values())
    main(replace(options, seeds=(0,), seconds=seconds))
    found = json.loads((options.output / "compare.json").read_text())["seconds"]["rows"]
    steps = {row["name"]: row["steps"] for row in found}
    assert steps == {config.stem: round(seconds / paces[config]) for config in options.configs}
    assert min(steps.values()) == 4


def test_equal_time_repeats_no_run_of_nearly_the_same_steps():
    assert [steps_in(seconds, 0.5, 200) for seconds in (95, 100, 105, 120, 0.1)] == [200, 200, 200, 240, 1]


def test_best_comes_first_and_one_seed_has_no_spread():
    rows = [Row("worse", 4, [2.0, 4.0], [1.0, 3.0]), Row("better", 4, [1.0], [2.0])]
    lines = markdown("Title", rows, [{"sampler": "teacher, 1 step", "fd": 9.0}]).splitlines()
    assert lines[4:] == [
        "| teacher, 1 step | | | 9.000 | |",
        "| better | 4 | 2 | 1.000 | 1.000 |",
        "| worse | 4 | 2 | 3.000 ± 1.414 | 2.000, 4.000 |",
    ]


def test_mistakes_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="is not a file"):
        main(Options((tmp_path / "none.yaml",)))
    same = write_settings(tmp_path, "a"), write_settings(tmp_path, "b")
    (tmp_path / "c").mkdir()
    copy = same[0].rename(tmp_path / "c" / "b.yaml")
    with pytest.raises(UserError, match="two files have one name"):
        main(Options((same[1], copy)))
    options = Options((same[1],), (0,), 2, None, 20, runs=tmp_path / "runs", output=tmp_path / "report")
    with pytest.raises(UserError, match=r"method\.kind"):
        main(replace(options, set=("method.kind=none",)))
    with pytest.raises(UserError, match="--jobs: at least 1"):
        main(replace(options, jobs=0))
    with pytest.raises(UserError, match="at least one of each"):
        main(replace(options, seeds=()))


@pytest.mark.parametrize("name", ["benchmark", "compare"])
def test_the_old_command_works_and_says_the_new_one(name: str):
    line = [sys.executable, "-m", f"eval.{name}", "--help"]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "usage: " in done.stdout
    assert done.stderr.startswith(f"eval.{name} is now distill.{name}: python -m distill.{name}\n")
