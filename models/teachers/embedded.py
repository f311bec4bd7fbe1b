"""The embedded class-conditional teachers in pixel space, and the students that come from them.

Both are one kind of folder: a stock ``unet/`` of diffusers and a ``model_index.json`` with the few numbers that make
it a denoiser. The folder holds its own ``pipeline.py`` too (models/pipelines), so it loads without this project.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.condition import Condition
from models.denoiser import Denoiser
from models.folders import replace_folder
from models.pipelines import class_conditional
from models.process import EDM, Process
from models.teachers.base import ClassSpec
from models.trigflow import TrigFlowView


class PatchUNet(nn.Module):
    """A UNet2DModel on ``patch`` x ``patch`` squares folded into channels; conditional on classes.

    Convolutions at full resolution are what a CPU pays for: folding makes them 1 / patch^2 as many.
    """

    def __init__(self, unet: UNet2DModel, patch: int, num_classes: int):
        super().__init__()
        self.unet, self.patch, self.num_classes = unet, patch, num_classes

    @property
    def core(self) -> UNet2DModel:
        return self.unet

    @classmethod
    def create(
        cls, image_channels: int, image_size: int, num_classes: int, channels: list[int], patch: int, layers: int
    ) -> "PatchUNet":
        """A new one with random weights: ``channels`` per level, ``layers`` residual blocks per level."""
        unet = UNet2DModel(
            sample_size=image_size // patch,
            in_channels=image_channels * patch**2,
            out_channels=image_channels * patch**2,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=layers,
            norm_num_groups=8,
            attention_head_dim=min(32, channels[-1]),
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=num_classes + 1,
        )
        return cls(unet, patch, num_classes)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``x`` (B, C, H, W), ``t`` = ln(sigma) / 4 (B,), classes from ``cond``."""
        if cond.class_ids is None:
            raise ValueError("this network is conditional on classes: the condition has no class_ids")
        labels = torch.where(cond.class_ids < 0, self.num_classes, cond.class_ids)
        folded = F.pixel_unshuffle(x, self.patch)
        return F.pixel_shuffle(self.unet(folded, 1000 * t, class_labels=labels).sample, self.patch)


@dataclass(frozen=True)
class Spec(ClassSpec):
    """What a folder says beside its U-Net; sizes in pixels, ``sigma_init`` None for a teacher.

    ``student_of_class``: with several students, the number of each class's own; None for one.
    """

    patch: int
    num_classes: int
    channels: int
    size: int
    sigma_data: float
    sigma_init: float | None
    class_names: list[str]
    student_of_class: list[int] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def picture(self) -> tuple[int, int, int]:
        return self.shape

    @property
    def student(self) -> bool:
        return self.sigma_init is not None

    @property
    def summary(self) -> str:
        names = ", ".join(self.class_names)
        return f"{self.num_classes} classes ({names}), {self.size} x {self.size}, {self.channels} channel(s)."

    @property
    def usage(self) -> str:
        return """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH", trust_remote_code=True)  # runs pipeline.py of this folder
images = pipe([0, 1, 2], seeds=[0, 1, 2]).images"""

    def beginning(self, process: Process) -> tuple[float, bool]:
        if self.sigma_init is None:
            raise ValueError("a teacher has no student")
        return float(process.time_from_ratio(torch.tensor(self.sigma_init, dtype=torch.float64))), False

    def begun(self, _process: Process, sigma_init: float) -> "Spec":
        return replace(self, sigma_init=sigma_init)

    def begun_flow(self, view: TrigFlowView, _guidance: float) -> "Spec":
        last = torch.tensor(view.process.t_max, dtype=torch.float64)
        return replace(self, sigma_init=float(view.process.ratio(last)))

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def preview(self, count: int) -> Condition:
        return Condition(class_ids=torch.arange(count) % min(10, self.num_classes))

    def to(self, _device: torch.device | str) -> "Spec":
        return self

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        """unet/, pipeline.py, model_index.json and README.md, through a temporary folder."""
        index = {
            "_class_name": ["pipeline", "ClassConditionalPipeline"],
            "_diffusers_version": diffusers.__version__,
            "unet": ["diffusers", "UNet2DModel"],
            **asdict(self),
        }
        assert isinstance(network, PatchUNet)
        with replace_folder(folder) as temporary:
            network.unet.save_pretrained(temporary / "unet", safe_serialization=True)
            shutil.copy(class_conditional.__file__, temporary / "pipeline.py")
            (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            (temporary / "README.md").write_text(card)


def read_spec(folder: Path) -> Spec:
    index = json.loads((folder / "model_index.json").read_text())
    return Spec(**{name: index[name] for name in Spec.__dataclass_fields__ if name in index})


def load(folder: Path) -> tuple[Denoiser, Spec]:
    """The denoiser in ``folder``, in float32 and evaluation mode."""
    spec = read_spec(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, torch_dtype=torch.float32)
    network = PatchUNet(unet, spec.patch, spec.num_classes)
    return Denoiser(network, EDM(), "edm", spec.sigma_data).eval(), spec
