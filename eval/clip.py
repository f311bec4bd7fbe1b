"""CLIP through open_clip: unit embeddings of texts and pictures, and the CLIP score of a folder that eval.paint made.

    python -m eval.clip pictures ViT-g-14:laion2b_s12b_b42k

The score is the mean cosine of a picture and its prompt, 0 to 1, as DMD2 and f-distill report it, by whatever CLIP they
say they use; torchmetrics' CLIPScore is 100 times as large and never below 0.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from eval.machine import place_of
from models.errors import UserError, run_command
from models.pictures import raw


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


def clip_scores(clip: CLIP, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Cosines (n,) of pictures with their own prompts."""
    return (clip.pictures(pictures) * clip.texts(prompts)).sum(1)


@dataclass(frozen=True)
class Options:
    """CLIP score of pictures in GenEval's layout."""

    images: tyro.conf.Positional[Path]
    """Folder of `python -m eval.paint`, or in GenEval's layout."""
    clip: tyro.conf.Positional[str]
    """MODEL:WEIGHTS of open_clip, or a folder with open_clip_config.json."""
    prefix: str = ""
    """Words put before every prompt: "A photo depicts " in DMD2's evaluation."""
    batch: int = 50
    output: Path | None = None
    """JSON file for the result."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def main(options: Options) -> None:
    """Print the mean with its standard error."""
    from eval.geneval.folder import pictures as pictures_in  # which needs this module

    if options.batch < 1:
        raise UserError(f"--batch: {options.batch} must be at least 1")
    clip, every = CLIP(options.clip, place_of(options.device)), pictures_in(options.images)
    values = []
    for start in trange(0, len(every), options.batch, desc="CLIP score", unit="batch"):
        part = every[start : start + options.batch]
        opened = [raw(picture.path) for picture in part]
        values.append(clip_scores(clip, opened, [options.prefix + picture.metadata["prompt"] for picture in part]))
    found = torch.cat(values).double()
    error = float(found.std() / len(found) ** 0.5) if len(found) > 1 else float("nan")
    result = {"clip": clip.name, "clip_sha256": clip.sha256, "prefix": options.prefix, "pictures": len(found)}
    result |= {"clip_score": float(found.mean()), "error": error}
    print(f"CLIP score by {clip.name}: {result['clip_score']:.4f} ± {error:.4f} over {len(found)} pictures")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options)))
