"""CLIP through open_clip: normalised embeddings of texts and pictures, with the activation that its weights ask for."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError


class CLIP:
    """``source`` is a folder in open_clip's layout (open_clip_config.json and weights) or ``MODEL:WEIGHTS``.

    WEIGHTS is a file, or one of open_clip's tags, which it downloads. OpenAI's weights were trained with QuickGELU; a
    network without it gives other numbers, which open_clip only warns of: here it is an error, as it is with
    ``quick_gelu`` for a network of another activation than asked for. ``sha256`` is over the tensors.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu", quick_gelu: bool | None = None):
        try:
            import open_clip
        except ImportError as error:
            raise UserError("CLIP needs the package open-clip-torch: pip install -e '.[eval]'") from error
        model, _, weights = source.partition(":")
        folder = Path(source)
        if folder.is_dir():
            model, weights = f"local-dir:{folder}", ""
        elif not weights:
            raise UserError(f"clip: {source} is neither a folder nor MODEL:WEIGHTS, e.g. ViT-L-14-quickgelu:openai")
        known: dict[str, Any] = open_clip.get_pretrained_cfg(model, weights) or {}
        if known.get("quick_gelu") and not (open_clip.get_model_config(model) or {}).get("quick_gelu"):
            raise UserError(f"clip: {source}: these weights need QuickGELU: take {model}-quickgelu")
        try:
            network, _, prepare = open_clip.create_model_and_transforms(
                model, pretrained=weights or None, device=device
            )
            self.tokenizer: Any = open_clip.get_tokenizer(model)
        except Exception as error:
            raise UserError(f"clip: {source} cannot be read: {' '.join(str(error).split())[:200]}") from error
        has = any(type(module).__name__ == "QuickGELU" for module in network.modules())
        if quick_gelu is not None and quick_gelu != has:
            wanted = "QuickGELU, as OpenAI's weights were trained" if quick_gelu else "no QuickGELU"
            raise UserError(f"clip: {source} must have {wanted}: set quick_gelu in its configuration")
        self.network: Any = network.eval()
        self.prepare: Any = prepare
        self.device, self.name = device, source if not folder.is_dir() else folder.resolve().name
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(
                name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        self.sha256 = digest.hexdigest()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, d) float32 on the CPU."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.network.encode_text(tokens).float(), dim=1).cpu()

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings (B, d) float32 on the CPU, of pictures of any size."""
        batch = torch.stack([self.prepare(picture.convert("RGB")) for picture in pictures]).to(self.device)
        return F.normalize(self.network.encode_image(batch).float(), dim=1).cpu()
