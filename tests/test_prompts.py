"""Text that people have: prompt files of any editor, captions of any data set."""

from pathlib import Path
from typing import Any

import pytest

from eval.paint import main as paint
from models.errors import BadSample, UserError
from models.prompts import captions, read_prompts, settled


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffa red cube\r\n\r\n a sphere \r\n".encode(),
        b"a red cube\na sphere",
        "\ufeffa red cube\n\ufeffa sphere\n".encode(),  # two such files, one behind the other
        "a red cube\r\na sphere\r\n".encode("utf-16"),
        b"\xfe\xff" + "a red cube\na sphere\n".encode("utf-16-be"),
    ],
)
def test_prompts_are_the_same_whatever_wrote_the_file(tmp_path: Path, data: bytes):
    (tmp_path / "p.txt").write_bytes(data)
    assert read_prompts(tmp_path / "p.txt") == ["a red cube", "a sphere"]


def test_lines_end_at_newlines_alone(tmp_path: Path):
    prompts = ["a red\u2028cube", "a\x0bsphere", "a cone\x85 here", "a\x0cb", "c\x1cd\x1de\x1ef", "g\u2029h", "i\rj"]
    (tmp_path / "p.txt").write_bytes("\n".join(prompts).encode())
    assert read_prompts(tmp_path / "p.txt") == prompts


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("ein grüner Würfel\n".encode("cp1252"), "not UTF-8"),
        ("a cube\n".encode("utf-16-le"), "zero bytes"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n \n", "is empty"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, data: bytes, words: str):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / "p.txt")
    from eval.paint import Options

    with pytest.raises(UserError, match=words):
        paint(Options("embedded:solids_sprint", tmp_path / "p.txt", tmp_path / "o"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.csv", b"prompt,seed\na red cube,1\n", "is a table, of which 'prompt,seed' would be a prompt"),
        ("p.jsonl", b'{"prompt": "a red cube"}\n', "is a table"),
        ("p.txt", b'{"prompt": "a red cube"}\r\n{"prompt": "a sphere"}\r\n', "is a table"),
        ("p.txt", b'["a red cube", "a sphere"]', "is a table"),
        ("p.txt", b"a red cube\ra sphere\r", "carriage returns alone"),
    ],
)
def test_rows_of_a_table_are_no_prompts(tmp_path: Path, name: str, data: bytes, words: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name)


def test_a_prompt_may_look_like_a_record(tmp_path: Path):
    (tmp_path / "p.txt").write_text('{a red cube}\n["a sphere"]\na, b\n')
    assert read_prompts(tmp_path / "p.txt") == ["{a red cube}", '["a sphere"]', "a, b"]


@pytest.mark.parametrize(
    ("value", "rule", "wanted"),
    [
        ("a cube ", None, ("a cube",)),
        (b"\xef\xbb\xbfa cube\n", None, ("a cube",)),
        (["a", "b"], "first", ("a",)),
        ([None, "", " ", "b"], "first", ("b",)),
        (["a", "b"], "random", ("a", "b")),
        (["a"], None, ("a",)),
        ({"en": "a", "de": "b"}, "de", ("b",)),
        ([{"raw": "a"}], "raw", ("a",)),
        ({"first": "a", "second": "b"}, "first", ("a",)),
    ],
)
def test_captions_by_rule(value: Any, rule: str | None, wanted: tuple[str, ...]):
    assert captions(value, "x", rule) == wanted and settled(wanted) == settled(wanted) in wanted


@pytest.mark.parametrize(
    "value", [None, "", " \n", b"", [], [None, ""], float("nan"), 3, b"\xff\xfe\xfa", {"en": None}]
)
def test_no_caption_is_no_words(value: Any):
    with pytest.raises(BadSample, match=r"^sample 3 "):
        captions(value, "sample 3", "en")


@pytest.mark.parametrize(
    ("value", "rule"), [(["a", "b"], None), (["a", "b"], "en"), ({"en": "a"}, None), ({}, "first")]
)
def test_several_captions_are_refused_unless_told_which(value: Any, rule: str | None):
    with pytest.raises(UserError, match=r"data\.caption: sample 3 has") as caught:
        captions(value, "sample 3", rule)
    assert not isinstance(caught.value, BadSample)
