"""Five hundred damaged configurations: each is a valid one or a mistake in one line, never a traceback."""

import copy
import datetime
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.settings import Config, parse, read_config, read_values, write_config
from models.errors import UserError
from models.yaml_text import KeyGivenTwice, read_yaml
from tests.tiny import ROOT

CONFIGS = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.parent.name != "accelerate"]
COUNT = 500
VALUES: list[Any] = [
    None, "", " ", "x", "no", "null", "embedded:solids", "../..", "a\nb", "é\u2028ü", "\x85", "9" * 400, [], {}, [[]],
    [None], [1, 2], {"kind": "dmd2"}, {"kind": None}, {"kind": ["sid"]}, {"kind": {}}, {1: 2}, {None: 1}, {True: "x"},
    -1, 0, 1, 2.5, 1e308, -1e-300, 10**30, float("nan"), float("inf"), float("-inf"), True, False, b"\x00\xff",
    datetime.date(2024, 2, 29), {"a": {"b": {"c": 1}}}, ["x"] * 200, {"kind": "image_folder", "path": 3},
    {"kind": "multi_student", "stages": [{}]}, {"kind": "scene_distillation", "stages": 1},
]  # fmt: skip
RAW = [
    "2024-13-45", "0x_", "0b_", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!python/object:os.system {}",
    "!!set {a, b}", "*nowhere", "&a [*a]", "{[1]: 2}", "{? {a: 1} : 2}", "'", "[", "@x", "`", "%x", "a: b: c", "\t- x",
    "1:60:70", "!!binary x", "!!omap [a: 1, a: 2]", "{a: 1, a: 2}", "[" * 2000 + "]" * 2000,
]  # fmt: skip
"""Values as they are written, of which no reader knows what to make."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value inside of another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in [(*path, key), *places(part, (*path, key))]]


def mutated(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """``values`` with a key taken away, renamed or given another's value, a value nested, replaced or made a string."""
    values = copy.deepcopy(values)
    way = draw.choice(places(values))
    parent = values
    for key in way[:-1]:
        parent = parent[key]
    key, old = way[-1], parent[way[-1]]
    match draw.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            letters = list(str(key))
            draw.shuffle(letters)
            parent["".join(letters)] = parent.pop(key)
        case 2:
            parent[key] = str(old) if draw.random() < 0.5 else [old]
        case 3:
            parent[key] = {str(key): old}
        case 4 if isinstance(parent, dict):
            parent[draw.choice(["kind", "path", "size", "lr", "steps", "stages", "share"])] = old
        case 5:
            other = values
            for part in draw.choice(places(values)):
                other = other[part]
            parent[key] = copy.deepcopy(other)
        case _:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
    return values


def outcome(path: Path, *arguments: str) -> Config | str:
    """The configuration, or the line that says what is wrong."""
    try:
        return parse(["--config", str(path), *arguments])[0]
    except UserError as error:
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 5000, line
        return line


def test_damaged_configurations_are_valid_or_a_line(tmp_path: Path):
    draw = random.Random(0)
    path, again = tmp_path / "c.yaml", tmp_path / "again.yaml"
    refused = 0
    for number in range(COUNT):
        values = yaml.safe_load(CONFIGS[number % len(CONFIGS)].read_text())
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            values = mutated(values, draw) if places(values) else values
        path.write_text(yaml.safe_dump(values, allow_unicode=True))
        found = outcome(path)
        if isinstance(found, Config):
            write_config(found, again)  # what a run folder holds is what was asked for
            assert read_config(again) == found
        refused += isinstance(found, str)
    assert COUNT // 2 < refused < COUNT


@pytest.mark.parametrize("raw", RAW)
def test_what_is_no_value_is_a_line(raw: str, tmp_path: Path):
    text = CONFIGS[0].read_text().splitlines()
    for line in draw_lines(text):
        path = tmp_path / "c.yaml"
        key = text[line].partition(":")[0]
        path.write_text("\n".join([*text[:line], f"{key}: {raw}", *text[line + 1 :]]))
        outcome(path)
    outcome(CONFIGS[0], "--train.steps", raw)
    outcome(CONFIGS[0], f"--data={raw}")


def test_numbers_are_finite_and_problems_are_counted():
    for value in (".nan", ".inf", "-.inf"):
        assert "student.lr: Input should be a finite number" in str(outcome(CONFIGS[0], "--student.lr", value))
    line = str(outcome(CONFIGS[0], "--classes", f"[{', '.join(['x'] * 300)}]"))
    assert "classes.19: " in line and "classes.20: " not in line and line.endswith("; and 280 more")


def draw_lines(text: list[str]) -> list[int]:
    """Three lines with a key."""
    return random.Random(1).sample([i for i, line in enumerate(text) if ":" in line and line[0] != "#"], 3)


@pytest.mark.parametrize("key", ["", "-", ".", "..", "train.", ".steps", "train..steps", "train.steps.x", "kind", "1"])
def test_any_key_on_the_command_line_is_taken_or_named(key: str):
    for path in CONFIGS[::6]:
        outcome(path, f"--{key}", "3")
        outcome(path, f"--{key}=[1]")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("teacher: {path: a, guidance: 7.5}\ntrain: {steps: 5}\nteacher: {path: b}\n", "line 3: the key 'teacher' is"),
        ("train:\n  steps: 5\n  batch_size: 2\n  steps: 6\n", "line 4: the key 'steps'"),
        ("a: [{b: 1}, {b: 1, c: 2, b: 1}]\n", "line 1: the key 'b'"),
        ('a: 1\n"a": 1\n', "line 2: the key 'a'"),
        ("a: {x: &b {c: 1}, <<: *b, <<: *b}\n", "the key '<<'"),
        ("1: a\n0x1: b\n", "line 2: the key '1'"),
    ],
)
def test_a_key_given_twice_is_an_error(text: str, line: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=f"c.yaml: not valid YAML: .*{line}.* given twice"):
        read_values(tmp_path / "c.yaml")
    with pytest.raises(KeyGivenTwice):
        read_yaml(text)


def test_a_key_given_twice_on_the_command_line_too():
    assert "--student: line 1: the key 'lr' is given twice" in str(outcome(CONFIGS[0], "--student", "{lr: 1, lr: 2}"))


def test_merged_keys_may_be_replaced(tmp_path: Path):
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")["b"] == {"x": 1, "y": 3}
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfoutput: x\r\n")
    assert read_values(tmp_path / "c.yaml") == {"output": "x"}
