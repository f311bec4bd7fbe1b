"""Fetch Fashion-MNIST: python -m distill.data data/fashion-mnist"""

from pathlib import Path

import tyro

from distill.data.fashion_mnist import fetch_fashion_mnist
from models.errors import run_command


def main(folder: tyro.conf.Positional[Path] = Path("data/fashion-mnist")) -> None:
    """Fetch Fashion-MNIST, if it is not there.

    Args:
        folder: Where to.
    """
    fetch_fashion_mnist(folder)
    print(f"Fashion-MNIST is in {folder}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
