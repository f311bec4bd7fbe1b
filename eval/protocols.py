"""The protocols by which the field's numbers are made, as settings with a name.

What parts them is mostly what happens to a picture before the network sees it; the same student's FID by two of them
differs by more than the papers' methods do. A number is called FID only where the network is the Inception of 2015 with
the published weights; by any other it carries that network's name.
"""

from dataclasses import dataclass
from typing import Literal

Quantisation = Literal["edm", "truncate"]
Resize = Literal["tf1", "clean", "lanczos256_clean"]
RESIZES: dict[Resize, str] = {
    "tf1": "299 x 299 in the network, TensorFlow 1's bilinear (no half-pixel centres, no antialias)",
    "clean": "299 x 299, PIL bicubic of each channel in float32, clipped, not rounded (clean-fid)",
    "lanczos256_clean": "central square, 256 x 256 by PIL Lanczos, then 299 x 299 as clean-fid",
}
ProtocolName = Literal[
    "fd_fmnist_cnn",
    "fd_effnet_lite0_64",
    "fd_solids",
    "edm",
    "torch_fidelity",
    "adm",
    "clean",
    "coco30k",
    "mjhq30k",
    "fd_dinov2",
    "cmmd",
]


@dataclass(frozen=True)
class InceptionRules:
    """An Inception protocol.

    images:     the papers' number of pictures
    quantise:   how a generator's output becomes uint8: "edm" 127.5 x + 128, "truncate" 127.5 (x + 1), fraction cut off
    reference:  what the papers compare with
    """

    resize: Resize
    images: int
    reference: str
    quantise: Quantisation = "edm"


INCEPTION: dict[ProtocolName, InceptionRules] = {
    "edm": InceptionRules("tf1", 50000, "EDM's .npz of the training set (arXiv 2206.00364)"),
    "torch_fidelity": InceptionRules("tf1", 50000, "a folder of real pictures, or their statistics"),
    "adm": InceptionRules("tf1", 50000, "ADM's .npz with pictures for precision and recall (arXiv 2105.05233)"),
    "clean": InceptionRules("clean", 50000, "a folder of real pictures, or their statistics (arXiv 2104.11222)"),
    "coco30k": InceptionRules(
        "lanczos256_clean",
        30000,
        "the 40,504 pictures of COCO val2014; prompts are 30,000 of its captions (GigaGAN's evaluator, as in DMD2)",
        quantise="truncate",
    ),
    "mjhq30k": InceptionRules("clean", 30000, "MJHQ-30K's 30,000 pictures, whose prompts they answer"),
}


def quantisation_of(name: ProtocolName) -> Quantisation:
    """How a generator's output becomes uint8 under the protocol."""
    return INCEPTION[name].quantise if name in INCEPTION else "edm"
