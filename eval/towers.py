"""Features of vision transformers: DINOv2 for FD-DINOv2, CLIP for CMMD. Neither network comes with a package."""

from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval.clip import CLIP
from eval.features import file_digest
from models.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2:
    """Class tokens of a DINOv2 in transformers' layout, as EDM2 feeds it: 224 x 224, bicubic with antialias.

    The papers' is ViT-L/14 (facebook/dinov2-large), over 50,000 pictures.
    """

    name, resize, shape = "fd_dinov2", "224 x 224, bicubic, half-pixel centres, antialias (EDM2)", None

    def __init__(self, folder: Path | None, device: torch.device | str = "cpu"):
        from transformers import Dinov2Model

        if folder is None or not (folder / "model.safetensors").is_file():
            raise UserError(f"--weights: fd_dinov2 needs a folder of DINOv2 in transformers' layout, not {folder}")
        try:
            network: Any = Dinov2Model.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--weights: {folder} is no DINOv2: {' '.join(str(error).split())[:200]}") from error
        self.network, self.device = network.eval().to(device), device
        self.dim, self.sha256 = network.config.hidden_size, file_digest(folder / "model.safetensors")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).to(self.device).float() / 255
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        return self.network((x - mean) / std).pooler_output.float().cpu()


class CLIPFeatures:
    """Unit embeddings of a CLIP of open_clip, with its own resize; CMMD's is ViT-L-14-336-quickgelu:openai."""

    name, resize, shape = "cmmd", "as open_clip prepares pictures for this network", None

    def __init__(self, source: Path | None, device: torch.device | str = "cpu"):
        if source is None:
            raise UserError("--weights: cmmd needs a CLIP: ViT-L-14-336-quickgelu:openai, or a folder of open_clip")
        self.clip = CLIP(str(source), device)
        self.sha256 = self.clip.sha256
        self.dim = len(self.clip.texts([""])[0])

    def __call__(self, images: Tensor) -> Tensor:
        arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        return self.clip.pictures([Image.fromarray(array) for array in arrays])


def load_tower(
    protocol: Literal["fd_dinov2", "cmmd"], weights: Path | None, device: torch.device | str
) -> DINOv2 | CLIPFeatures:
    return DINOv2(weights, device) if protocol == "fd_dinov2" else CLIPFeatures(weights, device)
