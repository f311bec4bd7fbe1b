"""GenEval's judge of photographs: Mask2Former's objects, their colours by CLIP."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval.clip import CLIP
from eval.geneval.judge import Detection, Options, cutout
from eval.geneval.mask2former import Mask2Former
from models.scene.captions import COLOURS

OPTIONS = Options()


def colour_prompts(name: str) -> list[list[str]]:
    """For each of :data:`COLOURS` the sentences whose mean embedding stands for an object ``name`` of that colour."""
    return [
        [f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"] for c in COLOURS
    ]


class ColourClassifier:
    """Zero-shot colours of objects by a CLIP with QuickGELU; GenEval's is ViT-L-14-quickgelu:openai, in float32."""

    def __init__(self, clip: CLIP):
        self.clip = clip
        self.embeddings = functools.cache(self._embeddings)

    def _embeddings(self, name: str) -> Tensor:
        return torch.stack([F.normalize(self.clip.texts(texts).mean(0), dim=0) for texts in colour_prompts(name)])

    def __call__(self, crop: Image.Image, name: str) -> str:
        """The colour of the object ``name`` in ``crop``."""
        return COLOURS[int((self.embeddings(name) @ self.clip.pictures([crop])[0]).argmax())]


class CocoJudge:
    """Detector and colours in one; ``protocol`` is what defines its verdicts."""

    options = OPTIONS

    def __init__(self, detector: Path, clip: str, device: torch.device | str = "cpu", short: int = 800):
        self.detector = Mask2Former(detector, device, short)
        self.colours = ColourClassifier(CLIP(clip, device, quick_gelu=True))
        self.name = self.detector.name
        self.protocol: dict[str, Any] = {
            "judge": self.name,
            "detector_sha256": self.detector.sha256,
            "input": f"short side {self.detector.short}, long side at most {self.detector.long}",
            "clip": self.colours.clip.name,
            "clip_sha256": self.colours.clip.sha256,
        }

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        return self.detector(images)

    def colour_of(self, image: Tensor) -> Callable[[Detection], str]:
        """Names colours of objects in ``image`` (3, H, W) uint8."""
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        return lambda found: self.colours(cutout(picture, found, self.options), found.label)
