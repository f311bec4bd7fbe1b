"""A configuration from a YAML file and a command line; mistakes in them become one line.

``accelerate launch distill/train.py --config configs/.../x.yaml --method.divergence jensen_shannon``
"""

import argparse
import copy
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill.settings.config import Config
from models.errors import UserError
from models.folders import replace_text
from models.yaml_text import KeyGivenTwice, read_yaml

MOST_PROBLEMS = 20
"""Of a file that are named."""


def _variants(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for arg in get_args(annotation) for model in _variants(arg)]


def _known_keys(model: type[BaseModel], values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys that are allowed under ``model``, of a union only those of the variant that ``values`` chooses."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = values.get(name) if isinstance(values, dict) else None
        kind = inner.get("kind") if isinstance(inner, dict) else None
        for variant in _variants(field.annotation):
            if kind is None or "kind" not in variant.model_fields or variant.model_fields["kind"].default == kind:
                yield from _known_keys(variant, inner, f"{prefix}{name}.")


def _hint(key: str, keys: list[str]) -> str:
    """The known key that ``key`` was probably meant to be: alike in its last part, rather under the same parent."""

    def likeness(other: str) -> float:
        parent, _, last = key.rpartition(".")
        other_parent, _, other_last = other.rpartition(".")
        return difflib.SequenceMatcher(None, last, other_last).ratio() + 0.1 * (parent == other_parent)

    key = re.sub(r"\.\d+", "", key)  # keys do not know the places in a list
    best = max(keys, key=likeness)
    return f"; did you mean '{best}'?" if likeness(best) > 0.75 else ""


def _explain(error: ValidationError, values: Any, source: str) -> str:
    """All problems of a file in a line: key, what is wrong, what was given."""
    keys = list(dict.fromkeys(_known_keys(Config, values)))
    lines = []
    for item in error.errors():
        where, value, model = [], values, None
        for part in item["loc"]:
            if isinstance(value, dict) and part not in value and value.get("kind") == part:
                continue  # pydantic puts the union's tag into the path; the file has no such level
            where.append(str(part))
            if isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                value = value.get(part) if isinstance(value, dict) else model
        key = ".".join(where)
        match item["type"]:
            case "extra_forbidden":
                lines.append(f"{key}: unknown key{_hint(key, keys)}")
            case "missing":
                lines.append(f"{key}: missing")
            case "union_tag_invalid" | "union_tag_not_found":
                allowed = item.get("ctx", {}).get("expected_tags", "see --help")
                lines.append(f"{key}.kind: must be one of {allowed}")
            case _:
                lines.append(f"{key}: {item['msg']} (got {item['input']!r:.200})")
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    return f"{source}: " + "; ".join(lines[:MOST_PROBLEMS] + more)


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked; UserError if there are none to be had."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def check(values: dict[str, Any], source: str) -> Config:
    """The configuration that ``values`` are; UserError in one line that names every problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, values, source)) from error


def read_config(path: Path) -> Config:
    """The configuration in a YAML file."""
    return check(read_values(path), str(path))


def write_config(config: Config, path: Path) -> None:
    replace_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def override(values: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """``values`` with ``--dotted.key value`` or ``--dotted.key=value`` put in; values are read as YAML.

    UserError for a key that is given twice, as in a file.
    """
    values, rest, given = copy.deepcopy(values), list(arguments), list[str]()
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise UserError(f"command line: expected --key value, found '{argument}'")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"command line: --{key} has no value")
            text = rest.pop(0)
        name = key.replace("-", "_")
        if lost := [before for before in given if f"{before}.".startswith(f"{name}.")]:
            said = "is given twice" if lost[0] == name else f"would take away --{lost[0]}, which stands before it"
            raise UserError(f"command line: --{key} {said}: give each key once, a whole section before its keys")
        given.append(name)
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        try:
            place[last] = read_yaml(text)
        except KeyGivenTwice as error:
            raise UserError(f"--{key}: {error}") from error
        except yaml.YAMLError:
            place[last] = text
    return values


def show_help(path: Path | None) -> None:
    """Every key with its meaning; with a file, that file's method and values."""
    epilogue = (
        "--dry-run prints the resolved configuration with an estimate of time and memory, and ends. Each key is given "
        "once, a section before keys of its own."
    )
    if path is None:
        print(f"usage: train.py --config FILE [--key.sub value ...] [--dry-run]\n\n{epilogue}")
        print("--config FILE --help shows every key of that file's kind of run, and its values as defaults.")
        return
    import tyro

    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    description = f"Defaults are the values of {path}. {epilogue}"
    tyro.cli(
        Config, args=["--help"], default=read_config(path), prog="train.py", description=description, config=options
    )


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"command line: --{self.dest} is given twice")
        setattr(namespace, self.dest, values)


def parse(argv: list[str]) -> tuple[Config, bool]:
    """The configuration that a command line asks for, and whether it is only to be shown (``--dry-run``)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, action=_Once)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--prompt", action=_Once)
    known, rest = parser.parse_known_args(argv)
    if known.prompt is not None:
        rest.append(f"--method.prompt={json.dumps(known.prompt, ensure_ascii=False)}")  # whatever YAML makes of it
    if known.help:
        show_help(known.config)
        sys.exit(0)
    if known.config is None:
        raise UserError("--config is missing: give one, e.g. --config configs/fashion_mnist/quickstart.yaml")
    source = f"{known.config} with the command line" if rest else str(known.config)
    return check(override(read_values(known.config), rest), source), known.dry_run
