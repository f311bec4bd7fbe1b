"""Class-conditional teachers in pixel space, embedded or converted (models/teachers/edm.py), and their students.

All are one kind of folder: a ``unet/`` and a ``model_index.json`` with the few numbers that make it a denoiser. The
folder holds its own ``pipeline.py`` too (models/pipelines), and the code of a U-Net that diffusers does not have, so
it loads without this project.
"""

import inspect
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters import merged
from models.condition import Condition
from models.denoiser import CoreNetwork, Denoiser
from models.folders import replace_folder
from models.pipelines import class_conditional
from models.process import EDM, Process
from models.teachers import keys
from models.teachers.base import ClassSpec
from models.teachers.edm2_networks import EDM2UNet
from models.teachers.edm_networks import DhariwalUNet, SongUNet
from models.trigflow import TrigFlowView


class PatchUNet(CoreNetwork):
    """A U-Net on ``patch`` x ``patch`` squares folded into channels; conditional on classes.

    Convolutions at full resolution are what a CPU pays for: folding makes them 1 / patch^2 as many. The U-Net is a
    UNet2DModel, or called like one.
    """

    def __init__(self, unet: ModelMixin, patch: int, num_classes: int):
        super().__init__()
        self.unet, self.patch, self.num_classes = unet, patch, num_classes

    @property
    def core(self) -> ModelMixin:
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

    def class_embeddings(self) -> Tensor:
        """(num_classes, D), for telling which classes are alike."""
        match self.unet:
            case UNet2DModel():
                return cast(nn.Embedding, self.unet.class_embedding).weight[: self.num_classes]
            case SongUNet(map_label=nn.Linear() as layer) | DhariwalUNet(map_label=nn.Linear() as layer):
                return layer.weight.T
            case EDM2UNet(emb_label=nn.Module() as layer):
                return layer.weight.T
            case _:  # unconditional: one class
                return torch.zeros(self.num_classes, 1)

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
        names = ", ".join(self.class_names[:20]) + (", ..." if len(self.class_names) > 20 else "")
        classes = "one class" if self.num_classes == 1 else f"{self.num_classes} classes"
        return f"{classes} ({names}), {self.size} x {self.size}, {self.channels} channel(s)."

    @property
    def usage(self) -> str:
        labels = [i % self.num_classes for i in range(3)]
        return f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH", trust_remote_code=True)  # runs the code in this folder
images = pipe({labels}, seeds=[0, 1, 2]).images"""

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
        whole = merged(network)
        assert isinstance(whole, PatchUNet)
        unet = whole.unet
        code = None if isinstance(unet, UNet2DModel) else Path(inspect.getfile(type(unet)))
        index = {
            "_class_name": ["pipeline", "ClassConditionalPipeline"],
            "_diffusers_version": diffusers.__version__,
            "unet": [code.stem if code else "diffusers", type(unet).__name__],
            **asdict(self),
        }
        with replace_folder(folder) as temporary:
            unet.save_pretrained(temporary / "unet", safe_serialization=True)
            if code:
                shutil.copy(code, temporary / "unet")
            shutil.copy(class_conditional.__file__, temporary / "pipeline.py")
            (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            (temporary / "README.md").write_text(card)


def _index(folder: Path) -> dict[str, Any]:
    return keys.read(folder / "model_index.json")


def read_spec(folder: Path) -> Spec:
    index = _index(folder)
    return Spec(**{name: index[name] for name in Spec.__dataclass_fields__ if name in index})


def _unet_class(name: str) -> type[ModelMixin]:
    match name:
        case "UNet2DModel":
            return UNet2DModel
        case "SongUNet":
            return SongUNet
        case "DhariwalUNet":
            return DhariwalUNet
        case "EDM2UNet":
            return EDM2UNet
        case _:
            raise ValueError(f"its U-Net is of the unknown class {name}")


def load(folder: Path) -> tuple[Denoiser, Spec]:
    """The denoiser in ``folder``, in float32 and evaluation mode. Code in the folder is not run."""
    spec, kind = read_spec(folder), _unet_class(_index(folder)["unet"][1])
    place = folder / "unet"
    keys.check_model(keys.config_of(folder, "unet"), kind, place / "config.json")
    keys.name_others(folder / "model_index.json", _index(folder), {"unet", *Spec.__dataclass_fields__})
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32, "output_loading_info": True}
    unet, info = cast(Any, kind).from_pretrained(place, **options)
    keys.check_weights(info, place)
    network = PatchUNet(unet, spec.patch, spec.num_classes)
    return Denoiser(network, EDM(), "edm", spec.sigma_data).eval(), spec
