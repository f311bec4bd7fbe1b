"""Make what the scores of Fashion-MNIST stand on: the classifier, and the statistics of the training images.

    python -m distill.workshop.references    # 5 to 12 minutes on a CPU core, most of it EfficientNet's 70,000 pictures

The reference set is all 60,000 training images for both extractors; the floor is held-out test images against it.
Ends with a check that the distances order known damage as they should.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from distill.data import FashionMNIST
from eval.features import REFERENCES, EfficientNetLite0, Extractor, FashionClassifier, FashionCNN, extract, quantize
from eval.frechet import Statistics, frechet_distance
from eval.metrics import kernel_distance
from eval.reference import Reference
from models.errors import UserError, run_command

FLOOR_SIZES = (250, 500, 1000, 2000, 4000, 10000)


@dataclass(frozen=True)
class Options:
    """Train the classifier of fd_fmnist_cnn and write the reference statistics of both extractors."""

    data: Path = Path("data/fashion-mnist")
    """Folder with Fashion-MNIST's four files."""
    output: Path = REFERENCES
    """Folder for fashion_mnist_cnn.safetensors, fd_fmnist_cnn.npz and fd_effnet_lite0_64.npz."""
    epochs: int = 3
    seed: int = 0
    retrain: bool = False
    """Train the classifier even if its weights are there. New weights make a new metric."""
    only: str | None = None
    """Name of the one extractor to do; default both."""


def train_classifier(pictures: FashionMNIST, epochs: int, seed: int, batch: int = 128) -> FashionClassifier:
    """Cross-entropy with Adam, its rate rising for 100 steps to 4e-3 and falling linearly to 0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = FashionClassifier().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    steps = epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * (1 - i / steps))
    with tqdm(total=steps, desc="classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(pictures), generator=generator)
            for indices in order[: steps // epochs * batch].split(batch):
                images = pictures.pixels[indices].float() / 127.5 - 1
                loss = F.cross_entropy(network(images), pictures.labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval()


@torch.inference_mode()
def accuracy(network: FashionClassifier, pictures: FashionMNIST) -> float:
    """Share of ``pictures`` that is classified rightly."""
    scores = torch.cat([network(images.float() / 127.5 - 1) for images in pictures.pixels.split(500)])
    return float((scores.argmax(1) == pictures.labels).double().mean())


def batches(images: Tensor, description: str, size: int = 250) -> Iterator[Tensor]:
    """``images`` (n, C, H, W) in batches, with progress."""
    return iter(tqdm(images.split(size), desc=description, unit="batch", leave=False))


def floors(
    held_out: Tensor, statistics: Statistics, sizes: Sequence[int] = FLOOR_SIZES, limit: int = 8
) -> dict[int, float]:
    """Distance of n held-out pictures from the reference, mean over at most ``limit`` disjoint subsets of each size."""
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    means = {}
    for n in sizes:
        parts = [part for part in held_out[order].split(n) if len(part) == n][:limit]
        means[n] = sum(frechet_distance(part, statistics) for part in parts) / len(parts)
    return means


def make_reference(extractor: Extractor, train: FashionMNIST, test: FashionMNIST, kept: int) -> Reference:
    """Statistics of all training images, ``kept`` of their features for the kernel distance, and the floors."""
    features = extract(extractor, batches(train.pixels, f"{extractor.name}, training images"))
    held_out = extract(extractor, batches(test.pixels, f"{extractor.name}, test images"))
    statistics = Statistics.of(features)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:kept]
    statistics.provenance = {
        "extractor": extractor.name,
        "weights_sha256": extractor.sha256,
        "resize": extractor.resize,
        "data": "Fashion-MNIST, all 60,000 training images, 28 x 28 padded to 32 x 32 with 0",
        "data_sha256": hashlib.sha256(train.pixels.numpy().tobytes()).hexdigest(),
        "covariance_divisor": "n - 1",
        "floors": "Fréchet distance of n test images from the reference, mean over at most 8 disjoint subsets",
        "features": f"float16 features of {kept} training images drawn with seed 0, for the kernel distance",
        "torch": torch.__version__,
        "command": "python -m distill.workshop.references",
    }
    return Reference(extractor.name, statistics, features[chosen], floors(held_out, statistics))


def damaged(train: FashionMNIST, test: FashionMNIST) -> dict[str, Tensor]:
    """Sets of 4,000 uint8 pictures, none of them among the first 4,000 test images, with known damage."""
    generator = torch.Generator().manual_seed(0)
    others, labels = test.pixels[4000:], test.labels[4000:]
    x = others[:4000].float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=generator)
    box = lambda side: F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)
    return {
        "other test images (floor)": others[:4000],
        "noise, 0.05 of black to white": quantize(x + 0.1 * noise),
        "noise, 0.2 of black to white": quantize(x + 0.4 * noise),
        "blur 3": quantize(box(3)),
        "blur 5": quantize(box(5)),
        "one class missing": others[labels != 0][:4000],
        "five classes missing": train.pixels[train.labels >= 5][:4000],
        "400 images x 10": others[:400].repeat(10, 1, 1, 1),
        "shifted by 2 pixels": x.add(1).mul(127.5).round().to(torch.uint8).roll((2, 2), (2, 3)),
        "inverted": 255 - others[:4000],
    }


def check(extractor: Extractor, train: FashionMNIST, test: FashionMNIST, say: Callable[[str], None] = print) -> None:
    """Print the distances of ``damaged`` sets from the first 4,000 test images."""
    base = extract(extractor, batches(test.pixels[:4000], "check"))
    say(f"\n{extractor.name}: 4,000 test images against      FD      KID x 1e3")
    for name, images in damaged(train, test).items():
        features = extract(extractor, batches(images, "check"))
        kernel = kernel_distance(base, features, subsets=20)
        distance = frechet_distance(base, features)
        say(f"  {name:<36} {distance:9.3f} {1e3 * kernel.mean:9.2f} ± {1e3 * kernel.std:.2f}")


def main(options: Options) -> None:
    """Write what ``options`` ask for and print accuracy, floors and the check."""
    train, test = FashionMNIST(options.data), FashionMNIST(options.data, train=False)
    options.output.mkdir(parents=True, exist_ok=True)
    weights = options.output / "fashion_mnist_cnn.safetensors"
    if options.retrain or not weights.is_file():
        network = train_classifier(train, options.epochs, options.seed)
        metadata = {
            "command": "python -m distill.workshop.references",
            "epochs": str(options.epochs),
            "seed": str(options.seed),
            "test_accuracy": f"{accuracy(network, test):.4f}",
            "torch": torch.__version__,
        }
        save_file(network.state_dict(), weights, metadata)
        weights.chmod(0o644)
        print(f"classifier: test accuracy {metadata['test_accuracy']}")
    kept = {"fd_fmnist_cnn": 2000, "fd_effnet_lite0_64": 1000}
    if options.only not in (None, *kept):
        raise UserError(f"--only: {options.only} is no extractor; there are {', '.join(kept)}")
    extractors: list[Extractor] = []
    if options.only in (None, "fd_fmnist_cnn"):
        extractors.append(FashionCNN(weights))
    if options.only in (None, "fd_effnet_lite0_64"):
        extractors.append(EfficientNetLite0())
    for extractor in extractors:
        reference = make_reference(extractor, train, test, kept[extractor.name])
        path = options.output / f"{extractor.name}.npz"
        reference.save(path)
        listed = ", ".join(f"{n}: {value:.3f}" for n, value in reference.floors.items())
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB); floor by number of pictures {listed}")
    for extractor in extractors:
        check(extractor, train, test)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
