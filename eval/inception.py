"""The Inception of 2015 behind FID, through torch-fidelity's port, from a local weights file that is checked."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eval.features import file_digest
from eval.protocols import RESIZES, Resize
from models.errors import UserError

PUBLISHED = "6726825d"
"""First digits of the SHA-256 of the port's published weights, weights-inception-2015-12-05-6726825d.pth."""
SIDE = 299


def clean_resize(image: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.float32]:
    """(H, W, 3) to float32 (side, side, 3) in [0, 255], as clean-fid does it: bicubic by PIL, not rounded."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], 2).clip(0, 255)


def central_square(image: NDArray[np.uint8], side: int = 256) -> NDArray[np.uint8]:
    """The largest central square of (H, W, 3), ``side`` x ``side`` by PIL's Lanczos."""
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = round((height - edge) / 2), round((width - edge) / 2)
    square = Image.fromarray(image[top : top + edge, left : left + edge])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def save_random(path: Path, seed: int = 0) -> None:
    """Random weights in the port's file format: for tests and speed, where the published ones are out of reach."""
    from unittest import mock

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        torch.manual_seed(seed)
        network = FeatureExtractorInceptionV3("random", ["2048"], "no file is read")
        for module in network.modules():  # its own start lets the pictures fade away layer by layer
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)


class Inception:
    """uint8 pictures of any size to 2048 features; ``logits`` go on from them to the Inception Score's.

    ``name`` is FID's only with the published weights. The file is read without running code from it.
    """

    dim, shape = 2048, None

    def __init__(self, weights: Path, resize: Resize = "tf1", device: torch.device | str = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("Inception needs the package torch-fidelity: pip install -e '.[eval]'") from error
        if not weights.is_file():
            raise UserError(
                f"--weights: there is no file {weights}: give torch-fidelity's weights-inception-2015-12-05"
            )
        self.sha256, self.device, self.resize_kind = file_digest(weights), device, resize
        if PUBLISHED in weights.name and not self.sha256.startswith(PUBLISHED):
            raise UserError(f"--weights: {weights} is damaged: its SHA-256 begins {self.sha256[:8]}, not {PUBLISHED}")
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run code from the file
            network: Any = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
        except Exception as error:
            raise UserError(f"--weights: {weights} are no weights of Inception: {type(error).__name__}") from error
        self.network = network.to(device)
        own = "inception" if self.sha256.startswith(PUBLISHED) else f"inception_{self.sha256[:8]}"
        self.name: Any = f"fid {resize} {own}" if own == "inception" else f"fd_{own} {resize}"
        self.resize = RESIZES[resize]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if self.resize_kind == "tf1":
            return self.network(images.to(self.device))[0].float().cpu()
        arrays = images.permute(0, 2, 3, 1).numpy()
        if self.resize_kind == "lanczos256_clean":
            arrays = [central_square(array) for array in arrays]
        resized = torch.from_numpy(np.stack([clean_resize(array) for array in arrays])).permute(0, 3, 1, 2)
        return self._resized(resized.to(self.device)).float().cpu()

    def _resized(self, x: Tensor) -> Tensor:
        """Features of pictures (B, 3, 299, 299) in [0, 255], fractions and all, which the port itself does not take."""
        net = self.network
        x = net.MaxPool_1(net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3((x - 128) / 128))))
        x = net.MaxPool_2(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(net, f"Mixed_{name}")(x)
        return net.AvgPool(x).flatten(1)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Of the classifier without its bias, (B, 1008), as the Inception Score takes them."""
        return (features.to(self.device) @ self.network.fc.weight.T).cpu()
