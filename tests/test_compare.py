"""The comparison of methods: trains, scores, tabulates, and goes on where it stopped."""

import json
from pathlib import Path

import pytest

from eval.compare import Options, Row, main, markdown
from models.errors import UserError
from tests.tiny import save_network, save_pictures, write_settings


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Two methods, two seeds, two steps of a tiny teacher with ten classes of 32 x 32 pixels."""
    base = tmp_path_factory.mktemp("compare")
    data = {"kind": "image_folder", "path": str(save_pictures(base / "pictures", size=32)), "size": 32, "channels": 1}
    save_network(base / "teacher", None, 0)
    configs = tuple(
        write_settings(base, kind, method={"kind": kind, "critic_turns": 1}, data=data) for kind in ("sid", "dmd2")
    )
    chosen = Options(configs, (0, 1), 2, None, 20, base / "runs", base / "report")
    main(chosen)
    return chosen


def test_every_run_is_in_the_table(options: Options):
    found = json.loads((options.output / "compare.json").read_text())["steps"]
    assert [row["name"] for row in found["rows"]] == ["sid", "dmd2"] and len(found["teacher"]) == 2
    for row in found["rows"]:
        assert row["steps"] == 2 and len(row["scores"]) == 2 and len(set(row["scores"])) == 2
        assert all(second > 0 for second in row["seconds"])
    text = (options.output / "compare.md").read_text()
    assert "Equal steps (2), 2 seeds" in text and text.count("±") == 2 and "teacher, 18 Heun steps" in text


def test_repeating_it_reads_what_is_there(options: Options):
    before = {path: path.stat().st_mtime_ns for path in options.runs.rglob("*") if path.is_file()}
    main(options)
    assert {path: path.stat().st_mtime_ns for path in options.runs.rglob("*") if path.is_file()} == before


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
    with pytest.raises(UserError, match=r"method\.kind"):
        main(Options((same[1],), (0,), 2, None, 20, tmp_path / "runs", tmp_path / "report", ("method.kind=none",)))
