"""Rules of the house that a program can check."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

ROOMS = ["models", "eval", "distill", "app"]
"""Each may import those before it."""


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str):
    forbidden = set(ROOMS[ROOMS.index(room) + 1 :])
    wrong = {str(path.relative_to(ROOT)): imported(path) & forbidden for path in sources(room)}
    assert not {path: names for path, names in wrong.items() if names}


def test_no_script_shadows_a_module():
    """`accelerate launch distill/train.py` puts distill/ first on the path."""
    installed = set(importlib.metadata.packages_distributions()) - set(ROOMS)
    taken = installed | set(sys.stdlib_module_names)
    for room in ("distill", "eval", "app"):
        stems = {p.stem if p.is_file() else p.name for p in (ROOT / room).glob("*")} - {"__init__", "__main__"}
        assert not stems & taken, f"{room}: {stems & taken}"


def test_optional_packages_are_imported_where_they_are_used():
    code = "import sys, models, models.teachers, distill.run; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"gradio", "open_clip", "trimesh", "torchmetrics", "wandb", "datasets", "timm"}


def test_files_keep_their_size():
    sizes = {path: len(path.read_text().splitlines()) for path in sources("distill")}
    assert sizes[ROOT / "distill/train.py"] <= 60 and sizes[ROOT / "distill/trainer.py"] <= 250
    assert all(size <= 250 for path, size in sizes.items() if path.parent.name == "methods")


def test_methods_do_not_touch_the_loops_business():
    for path in sources("distill/methods"):
        assert not imported(path) & {"accelerate", "logging", "tqdm"}, path
        assert ".step()" not in path.read_text() and "optim." not in path.read_text()
