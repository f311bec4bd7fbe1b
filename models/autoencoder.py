"""What an autoencoder run is about: pictures in, pictures out."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from models.condition import Condition
from models.errors import UserError
from models.folders import replace_folder


@dataclass(frozen=True)
class PictureSpec:
    """Pictures as they are, asked for by nothing; saved as ``vae/``."""

    picture: tuple[int, int, int]
    student = False
    usage = """from diffusers import AutoencoderDC

vae = AutoencoderDC.from_pretrained("PATH/vae")
latents = vae.encode(pictures).latent * vae.config.scaling_factor  # pictures (B, 3, H, W) in [-1, 1]
pictures = vae.decode(latents / vae.config.scaling_factor).sample"""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.picture

    @property
    def summary(self) -> str:
        return f"Pictures of {self.picture[1]} x {self.picture[2]} to latents and back."

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def preview(self, _count: int) -> Condition:
        return Condition()

    def to(self, _device: torch.device | str) -> "PictureSpec":
        return self

    def parts(self) -> list[nn.Module]:
        return []

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        assert isinstance(network, AutoencoderDC)
        with replace_folder(folder) as temporary:
            network.save_pretrained(temporary / "vae", safe_serialization=True)
            (temporary / "README.md").write_text(card)


def load(path: Path) -> AutoencoderDC:
    """The frozen autoencoder of a run, or of a folder with vae/, in float32; UserError if there is none."""
    for folder in (path / "student" / "vae", path / "vae"):
        if (folder / "config.json").is_file():
            vae = AutoencoderDC.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
            return vae.requires_grad_(False).eval()
    raise UserError(f"method.sana.autoencoder: there is no vae/ in {path}: train configs/solids/autoencoder.yaml first")
