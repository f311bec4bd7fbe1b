"""What a command does not wait for: a mistake in the settings is told before anything large is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LARGE = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "scipy", "gradio"}


def loaded(code: str) -> set[str]:
    """Top-level modules that ``code`` has imported when it ends."""
    code += "\nprint('LOADED', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "arguments, status", [(["--help"], 0), (["--train.stepz", "3"], 2), (["--method.kind", "x"], 2)]
)
def test_a_command_line_is_read_without_torch(arguments: list[str], status: int):
    line = ["train.py", "--config", "configs/fashion_mnist/quickstart.yaml", *arguments]
    code = f"""
import sys
from pathlib import Path
from distill.train import main
sys.argv = {line}
try:
    found = main()
except SystemExit as end:
    found = end.code
assert found == {status}, found"""
    assert not loaded(code) & LARGE


def test_models_by_themselves_import_nothing_large():
    assert not loaded("import sys, models") & LARGE
