"""Fashion-MNIST: fetched once, read from four files."""

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from distill.data.batch import Batch
from models.condition import Condition
from models.errors import UserError

FASHION_MNIST_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def _intact(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in FASHION_MNIST_FILES.items()
    )


def _from_debian(folder: Path) -> None:
    """The Debian package, downloaded and unpacked without root."""
    with tempfile.TemporaryDirectory() as temporary:
        run = lambda *command: subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=300)
        run("apt-get", "download", "dataset-fashion-mnist")
        package = next(Path(temporary).glob("*.deb"))
        run("dpkg-deb", "-x", str(package), "unpacked")
        for name in FASHION_MNIST_FILES:
            shutil.copy(Path(temporary) / "unpacked/usr/share/datasets/fashion-mnist" / name, folder / name)


def _from_torchvision(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as temporary:
        FashionMNIST(temporary, download=True)
        for name in FASHION_MNIST_FILES:
            shutil.copy(Path(temporary) / "FashionMNIST/raw" / name, folder / name)


def fetch_fashion_mnist(folder: Path) -> None:
    """Put the four files into ``folder``, from Debian or through torchvision; UserError if neither is reachable."""
    if _intact(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for source in (_from_debian, _from_torchvision):
        try:
            source(folder)
        except (OSError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
            reasons.append(f"{source.__name__[6:]}: {type(error).__name__}")
        if _intact(folder):
            return
    raise UserError(
        f"Fashion-MNIST is not reachable ({', '.join(reasons)}): fetch the Debian package dataset-fashion-mnist "
        f"elsewhere and put its four .gz files into {folder}"
    )


class FashionMNIST:
    """60,000 training or 10,000 test photographs of clothes, 28 x 28 padded to 32 x 32 with background."""

    shape: tuple[int, int, int] = (1, 32, 32)
    class_names: list[str] = FASHION_MNIST_CLASSES

    def __init__(self, folder: Path, train: bool = True):
        if missing := [name for name in FASHION_MNIST_FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} lacks {missing[0]}: run `make data` (or `python -m distill.data {folder}`)")
        prefix = "train" if train else "t10k"
        try:
            raw = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        except (OSError, EOFError) as error:
            raise UserError(f"{folder} is damaged ({error}): delete it and run `make data`") from error
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
        self.pixels = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))).unsqueeze(1)
        self.labels = torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def get(self, indices: list[int]) -> Batch:
        return Batch(self.pixels[indices].float() / 127.5 - 1, Condition(class_ids=self.labels[indices]))
