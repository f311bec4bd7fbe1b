"""Class-conditional and unconditional checkpoints in diffusers' pipeline folders, whatever the family.

A family (models/teachers/{dit,ddpm}.py) says how its network is called; see models/teachers/pipeline.py for the rest.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import CoreNetwork, Denoiser
from models.errors import UserError
from models.process import Process
from models.teachers import keys
from models.teachers.base import ClassSpec, StepTimes, later_times
from models.teachers.files import opened
from models.teachers.latents import checked
from models.teachers.pipeline import Stock
from models.teachers.schedule import process_of, scheduler_config


class ClassNetwork(CoreNetwork):
    """A pipeline's network as ``network(x, t, cond)``, with t the index of its discrete process."""

    part: ClassVar[Literal["unet", "transformer"]]

    def __init__(self, core: nn.Module):
        super().__init__()
        self.add_module(self.part, core)

    @property
    def core(self) -> Any:
        return self._modules[self.part]

    @property
    def num_classes(self) -> int:
        return self.count(self.core.config)

    @staticmethod
    @abstractmethod
    def count(config: Mapping[str, Any]) -> int:
        """Classes of a network of this configuration."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``x`` (B, C, H, W), ``t`` (B,), classes from ``cond``; the network's prediction (B, C, H, W)."""

    @staticmethod
    @abstractmethod
    def call(labels: list[int]) -> dict[str, Any]:
        """Arguments with which the stock pipeline makes a picture of each of ``labels``, without guidance."""


@dataclass(frozen=True)
class ClassPipelineSpec(Stock, ClassSpec):
    """What a pipeline folder holds beside its network; ``pipe`` is the stock pipeline, without it.

    ``offload`` keeps the autoencoder on the CPU.
    """

    family: type[ClassNetwork]
    pipe: Any
    shape: tuple[int, int, int]
    process: Process
    num_classes: int
    class_names: list[str] = field(repr=False)
    times: StepTimes | None = None
    scheduler: Any = field(default=None, repr=False)
    offload: bool = False

    @property
    def part(self) -> str:
        return self.family.part

    @property
    def scaling(self) -> tuple[str, ...]:
        return ("scaling_factor",)

    @property
    def given(self) -> bool:
        return True

    @property
    def summary(self) -> str:
        channels, height, width = self.picture
        classes = "One class" if self.num_classes == 1 else f"{self.num_classes} classes"
        latents = "" if self.latents is None else f", in latents of {' x '.join(map(str, self.shape))}"
        return f"{classes}, {height} x {width}, {channels} channel(s){latents}; {type(self.pipe).__name__}."

    @property
    def usage(self) -> str:
        name, values = type(self.pipe).__name__, self.family.call([i % self.num_classes for i in range(3)])
        values["num_inference_steps"] = 1 if self.student else 50
        arguments = ", ".join(f"{key}={value!r}" for key, value in values.items())
        return f"""from diffusers import {name}

pipe = {name}.from_pretrained("PATH")
images = pipe({arguments}).images"""

    def preview(self, count: int) -> Condition:
        return Condition(class_ids=torch.arange(count) % min(10, self.num_classes))

    def to(self, device: torch.device | str) -> "ClassPipelineSpec":
        if (latents := self.latents) is not None and not self.offload:
            latents.vae.to(device)
        return self

    def later(self, steps: int) -> tuple[float, ...]:
        return later_times(self.times or (), steps)

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        self.write(folder, network, card, {"class_names": self.class_names})


def _names(folder: Path, count: int) -> list[str]:
    """Of the classes: studio.json's, or id2label's in model_index.json, or their numbers."""
    if (folder / "studio.json").is_file():
        return keys.read(folder / "studio.json")["class_names"]
    labels = keys.read(folder / "model_index.json").get("id2label") or {}
    return ["all"] if count == 1 else [labels.get(str(i), str(i)).split(",")[0].strip() for i in range(count)]


def names(folder: Path, family: type[ClassNetwork]) -> list[str]:
    """Of the classes of the pipeline in ``folder``, without its network."""
    return _names(folder, family.count(keys.config_of(folder, family.part)))


def load(
    folder: Path, pipeline: Any, family: type[ClassNetwork], size: int | None = None, weights: Path | None = None
) -> tuple[Denoiser, ClassPipelineSpec]:
    """The denoiser and everything else of a folder of the stock class ``pipeline``, in float32 and evaluation mode.

    UserError if ``size`` (pixels) is not the checkpoint's own: such networks know one.
    """
    pipe, own = opened(folder, pipeline, family.part, weights)
    if labels := keys.read(folder / "model_index.json").get("id2label"):
        pipe.register_to_config(id2label=labels)  # which the stock class forgets to save
    network = family(getattr(pipe, family.part))
    config = network.core.config
    sides = config["sample_size"]
    sides = (sides, sides) if isinstance(sides, int) else sides
    process, prediction = process_of(scheduler_config(pipe), 0)
    pipe.register_modules(**{family.part: None})
    spec = ClassPipelineSpec(
        family,
        pipe,
        cast(tuple[int, int, int], (config["in_channels"], *sides)),
        process,
        network.num_classes,
        _names(folder, network.num_classes),
        StepTimes.read(own["times"]) if own.get("times") else None,
        pipe.scheduler if own.get("times") else None,
    )
    latents = None if spec.latents is None else checked(spec.latents.vae, spec.scaling, pipeline.__name__)
    if latents is not None and latents.channels != spec.shape[0]:
        raise UserError(
            f"teacher: {folder}: in_channels {spec.shape[0]} of the network, but its autoencoder's latents have "
            f"{latents.channels}: one of them is another checkpoint's"
        )
    if size is not None and (size, size) != spec.picture[1:]:
        raise UserError(f"teacher.size: {size}, but {folder} makes pictures of {spec.picture[1]} x {spec.picture[2]}")
    return Denoiser(network.requires_grad_(True), process, prediction, sigma_data=1.0).eval(), spec
