"""Tiny random networks, pictures and settings, in the real formats."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from models.scene import captions
from models.teachers import miniature, sana
from models.teachers.embedded import PatchUNet, Spec

ROOT = Path(__file__).parent.parent
NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def save_network(folder: Path, sigma_init: float | None, seed: int, size: int = 32, classes: int = 10) -> Path:
    """A tiny random U-Net as this project exports it."""
    torch.manual_seed(seed)
    network = PatchUNet.create(1, size, classes, [8, 32], patch=4, layers=1)
    spec = Spec(4, classes, 1, size, 0.5, sigma_init, NAMES[:classes])
    spec.save(folder, network, "")
    return folder


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for this and every thread begun meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_sana(
    folder: Path, side: int = 8, depth: int = 2, seed: int = 0, vocabulary: Sequence[str] = captions.VOCABULARY
) -> Path:
    """A tiny random Sana teacher as SanaPipeline's folder."""
    torch.manual_seed(seed)
    tokenizer = miniature.new_tokenizer(vocabulary, 16)
    text_encoder, vae = miniature.new_text_encoder(len(tokenizer), 32, 1, 16), miniature.new_autoencoder([16, 32], 4, 1)
    network = sana.SanaNetwork(miniature.new_transformer(4, side, 32, depth, 32))
    sana.SanaSpec(tokenizer, text_encoder, vae, (4, side, side), examples=("a cube",)).save(folder, network, "")
    return folder


def save_pictures(folder: Path, count: int = 24, size: int = 16) -> Path:
    """Random gray pictures in two classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / NAMES[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size), dtype=np.uint8)).save(path)
    return folder


def settings(base: Path, output: str = "run", **changes: Any) -> dict[str, Any]:
    """Values of a short f-distill run on 16 x 16 pictures; makes the teacher and the pictures in ``base`` once."""
    if not (base / "teacher").is_dir():
        save_network(base / "teacher", None, 0, size=16, classes=2)
        save_pictures(base / "pictures")
    values: dict[str, Any] = {
        "output": str(base / output),
        "data": {"kind": "image_folder", "path": str(base / "pictures"), "size": 16, "channels": 1},
        "teacher": {"path": str(base / "teacher")},
        "method": {"kind": "f_distill", "critic_turns": 2, "bins": 4, "gan": {"width": 8, "r1_weight": 0.1}},
        "student": {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-3},  # eps: rounding must not decide an update's sign
        "train": {
            "steps": 6,
            "cpu_threads": 1,
            "batch_size": 8,
            "log_every": 2,
            "sample_every": 100,
            "checkpoint_every": 2,
            "ema_decay": 0.9,
            "mixed_precision": "no",
        },
    }
    for key, value in changes.items():
        place = values
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return values


def write_settings(base: Path, output: str = "run", **changes: Any) -> Path:
    """The same as a file."""
    path = base / f"{output}.yaml"
    path.write_text(yaml.safe_dump(settings(base, output, **changes)))
    return path


def environment() -> dict[str, str]:
    """Two threads at most, none that spins; no GPU, so that every machine runs the same arithmetic."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | quiet


def command(*arguments: object) -> list[str]:
    """``python distill/train.py`` with these arguments."""
    return [sys.executable, str(ROOT / "distill" / "train.py"), *map(str, arguments)]


def train(*arguments: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end; ``launcher`` comes in the place of the interpreter."""
    line = command(*arguments)
    line = launcher + line[1:] if launcher else line
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
