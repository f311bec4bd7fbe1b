"""Text-to-image checkpoints in diffusers' pipeline folders, whatever the family.

A family (models/teachers/{stable_diffusion,pixart,sd3,flux,qwen_image,z_image}.py) says how its network is called and
how its prompts are encoded. Schedule, kind of prediction, latent scaling and sizes come from the checkpoint's configs.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from models.adapters import merged, save_lora
from models.condition import Condition
from models.denoiser import CoreNetwork, Denoiser
from models.errors import UserError
from models.folders import replace_folder
from models.process import Process
from models.teachers import distilled, keys
from models.teachers.base import EXAMPLE, StepTimes, Texts, TextSpec
from models.teachers.files import FROM_FILES, opened
from models.teachers.latents import Latents, checked
from models.teachers.schedule import process_of, scheduler_config, step_times, student_scheduler
from models.trigflow import TrigFlowView

SIDE = 1024
"""Of the pictures of a transformer whose config names none."""


class PipelineNetwork(CoreNetwork):
    """A pipeline's U-Net or transformer as ``network(x, t, cond)`` in the time of the checkpoint's own process.

    ``part`` is its name in the pipeline and here, so that blocks are named as in the checkpoint; ``factor`` the pixels
    to a latent.
    """

    part: ClassVar[Literal["unet", "transformer"]] = "transformer"
    length: ClassVar[int] = 77
    """Tokens of a prompt unless told otherwise."""
    null_prompt: ClassVar[str | None] = ""
    """What an unconditional answer is asked for; None: the network knows none."""
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}
    """Arguments with which the stock pipeline calls it once, without guidance."""
    told: ClassVar[float] = 3.5
    """What a guidance-distilled network is told where the condition says nothing."""
    scaling: ClassVar[tuple[str, ...]] = ("scaling_factor",)
    """Keys of its autoencoder's config by which the stock pipeline scales latents."""
    packed: ClassVar[int] = 1
    """Latents to a channel of the network's input."""
    absent: ClassVar[tuple[str, ...]] = ()
    """Keys of the network's config that say that it asks for more than its pipeline gives it."""
    given: ClassVar[bool] = True
    """Whether its pipeline gives a flow's scheduler the times of n steps, 1 to 1/n, rather than their number."""

    def __init__(self, core: nn.Module, factor: int):
        super().__init__()
        self.add_module(self.part, core)
        self.factor = factor

    @classmethod
    def of(cls, core: Any, pipe: Any, channels: int) -> "type[PipelineNetwork]":
        """The family of the network ``core`` in latents of so many ``channels``. UserError if it asks for more than
        noise, time and prompt."""
        where = f"{cls.part}/config.json"
        if (count := core.config["in_channels"]) != cls.packed * channels:
            raise UserError(
                f"teacher: {where}: in_channels {count}, but latents have {cls.packed * channels}: a network for "
                "inpainting or editing, which needs more than prompts, or another's autoencoder"
            )
        keys.check_asked(core.config, cls.absent, where)
        return cls.fitting(core.config, pipe, channels)

    @classmethod
    def fitting(cls, _config: Any, _pipe: Any, _channels: int) -> "type[PipelineNetwork]":
        """The family of a network of this ``config``, as :meth:`of`."""
        return cls

    @property
    def core(self) -> Any:
        return self._modules[self.part]

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``x`` (B, C, H, W), ``t`` (B,), text from ``cond``; the network's prediction (B, C, H, W)."""

    @staticmethod
    @abstractmethod
    def embed(pipe: Any, prompts: list[str], length: int, device: torch.device) -> Condition:
        """Prompts to text, mask and pooled embeddings, of ``length`` tokens, as the pipeline does it."""

    @classmethod
    def null(cls, pipe: Any, length: int, device: torch.device) -> Condition:
        """The unconditional counterpart, (1,)."""
        return cls.embed(pipe, [cls.null_prompt or ""], length, device)

    def text(self, cond: Condition) -> Tensor:
        if cond.text is None:
            raise ValueError("this network is conditional on text: the condition has none")
        return cond.text

    def scale(self, x: Tensor, cond: Condition) -> Tensor:
        """Guidance scales (B,) that a network is told."""
        return x.new_full((len(x),), self.told) if cond.guidance is None else cond.guidance.to(x.dtype)

    def embedded(self, x: Tensor, cond: Condition) -> Tensor | None:
        """They, for a transformer that embeds them."""
        return self.scale(x, cond) if self.core.config.get("guidance_embeds") else None


def padded(embeddings: Sequence[Tensor], length: int) -> Condition:
    """Texts of different lengths (L_i, D), cut or filled up with zeros to ``length``, with their mask."""
    text = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[1])
    mask = torch.zeros(len(embeddings), length, dtype=torch.long, device=text.device)
    for row, value in enumerate(embeddings):
        count = min(len(value), length)
        text[row, :count], mask[row, :count] = value[:count], 1
    return Condition(text=text, text_mask=mask)


class Stock:
    """What checkpoints in stock pipelines have in common, whatever they are asked for.

    ``pipe`` is the pipeline without its network, which is called ``part`` there; ``times`` are a student's, None for a
    teacher, and ``scheduler`` is the stock one that asks it at them.
    """

    pipe: Any
    process: Process
    shape: tuple[int, int, int]
    times: StepTimes | None
    scheduler: Any

    @property
    @abstractmethod
    def part(self) -> str: ...

    @property
    @abstractmethod
    def scaling(self) -> tuple[str, ...]:
        """Keys by which the pipeline scales latents."""

    @property
    @abstractmethod
    def given(self) -> bool:
        """As :attr:`PipelineNetwork.given`."""

    @property
    def student(self) -> bool:
        return self.times is not None

    @property
    def latents(self) -> Latents | None:
        """None for a network that makes pixels."""
        vae = self.pipe.components.get("vae")
        return None if vae is None else Latents(vae, self.scaling)

    @property
    def picture(self) -> tuple[int, int, int]:
        if (latents := self.latents) is None:
            return self.shape
        return 3, latents.factor * self.shape[1], latents.factor * self.shape[2]

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures if (latents := self.latents) is None else latents.encode(pictures)

    def decode(self, x0: Tensor) -> Tensor:
        return x0 if (latents := self.latents) is None else latents.decode(x0)

    def beginning(self, _process: Process) -> tuple[float, bool]:
        if self.times is None:
            raise ValueError("a teacher has no student")
        return self.times[0], True

    def begun(self, _process: Process, _sigma_init: float) -> Self:
        """It starts at the process's last time and is asked where stock pipelines with its scheduler ask it; one that
        goes on from another keeps its times."""
        if self.times is not None:
            return self
        scheduler = student_scheduler(self.process, scheduler_config(self.pipe), self.given)
        return replace(cast(Any, self), times=step_times(scheduler, self.given), scheduler=scheduler)

    def begun_flow(self, view: TrigFlowView, _guidance: float) -> Self:
        return self.begun(view.process, 1.0)

    def parts(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def whole(self) -> Any:
        """The pipeline with all of its parts but the network."""
        return self.pipe

    def write(self, folder: Path, network: nn.Module, card: str, own: dict[str, Any]) -> None:
        """A stock pipeline folder with ``own`` in studio.json, and ``pytorch_lora_weights.safetensors`` beside it for a
        LoRA student."""
        whole, pipe, before = cast(Any, merged(network)), self.whole(), self.pipe.scheduler
        scheduler = before if self.scheduler is None else self.scheduler
        with replace_folder(folder) as temporary:
            pipe.register_modules(**{self.part: whole.core, "scheduler": scheduler})
            try:
                pipe.save_pretrained(temporary, safe_serialization=True)
            finally:
                pipe.register_modules(**{self.part: None, "scheduler": before})
            save_lora(temporary, self.part, network)
            rows = None if self.times is None else self.times.rows
            text = json.dumps(own | {"times": rows, "shape": self.shape}, indent=2)
            (temporary / "studio.json").write_text(text + "\n")
            (temporary / "README.md").write_text(card)


@dataclass(frozen=True)
class PipelineSpec(Stock, TextSpec):
    """What a pipeline folder holds beside its network. ``pipe`` is the stock pipeline, without it.

    ``tokens`` of a prompt; ``offload`` keeps text encoders and autoencoder on the CPU, which are the slower then, and
    leave the GPU to the networks.
    """

    family: type[PipelineNetwork]
    pipe: Any
    shape: tuple[int, int, int]
    process: Process
    source: Path
    tokens: int
    times: StepTimes | None = None
    scheduler: Any = field(default=None, repr=False)
    guidance: float = 1.0
    examples: tuple[str, ...] = (EXAMPLE,)
    guidable: bool = True
    unguided: str = ""
    offload: bool = False
    texts: Texts | None = None
    place: list[torch.device] = field(default_factory=lambda: [torch.device("cpu")], repr=False)
    _null: list[Condition] = field(default_factory=list, repr=False)

    @property
    def part(self) -> str:
        return self.family.part

    @property
    def scaling(self) -> tuple[str, ...]:
        return self.family.scaling

    @property
    def given(self) -> bool:
        return self.family.given

    @property
    def device(self) -> torch.device:
        return self.place[0]

    @property
    def summary(self) -> str:
        _, height, width = self.picture
        shape = " x ".join(map(str, self.shape))
        return f"Text to image, {height} x {width}, in latents of {shape}; {type(self.pipe).__name__}."

    @property
    def usage(self) -> str:
        _, height, width = self.picture
        name, values = type(self.pipe).__name__, self.family.call | {"height": height, "width": width}
        values = {**values, "num_inference_steps": 1 if self.student else 20}
        arguments = ", ".join(f"{key}={value!r}" for key, value in values.items())
        steps = "" if self.times is None else f"  # num_inference_steps: 1 to {len(self.times)}"
        return f"""from diffusers import {name}

pipe = {name}.from_pretrained("PATH"){steps}
image = pipe({self.examples[0]!r}, {arguments}).images[0]"""

    def preview(self, count: int) -> Condition:
        return self.text([self.examples[i % len(self.examples)] for i in range(count)])

    def to(self, device: torch.device | str) -> "PipelineSpec":
        self.place[0] = torch.device(device)
        self._null.clear()
        if not self.offload:
            for part in self.parts():
                part.to(device)
        return self

    @torch.no_grad()
    def text(self, prompts: Sequence[str], guidance: float | None = None) -> Condition:
        if self.texts is not None:
            cond = self.texts(prompts).to(self.device)
        else:
            encoders = self.pipe.vae.device
            if not self._null and self.family.null_prompt is not None:
                self._null.append(self.family.null(self.pipe, self.tokens, encoders).to(self.device))
            cond = self.family.embed(self.pipe, list(prompts), self.tokens, encoders).to(self.device)
            if self._null:
                null = self._null[0]
                cond = replace(cond, null_text=null.text, null_text_mask=null.text_mask, null_pooled=null.pooled)
        scale = None if guidance is None else torch.full((len(prompts),), guidance, device=self.device)
        return replace(cond, guidance=scale)

    def known_distilled(self, whether: bool) -> "PipelineSpec":
        """The same where it is known ``whether`` it is distilled, whatever its files say. UserError if they cannot be
        wrong: its network knows no unconditional answer."""
        if not whether and self.family.null_prompt is None:
            raise UserError(f"teacher.distilled: false, but {self.unguided}: remove the key")
        return replace(self, guidable=not whether, unguided="teacher.distilled" if whether else "")

    def without_encoders(self, texts: Texts, pictures: bool) -> "PipelineSpec":
        """Of all that share this one's ``pipe`` too."""
        names = [name for name in self.pipe.components if name.startswith("text_encoder")]
        self.pipe.register_modules(**dict.fromkeys(names))
        if pictures:
            self.pipe.vae.encoder = nn.Identity()  # an autoencoder's own methods look for its parts
        return replace(self, texts=texts)

    def whole(self) -> Any:
        """The pipeline with all of its parts but the network."""
        if self.texts is None:
            return self.pipe
        kept = {name: part for name, part in self.pipe.components.items() if name == "scheduler"}
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        parts = kept | {self.family.part: None} | (unsafe if "safety_checker" in self.pipe.components else {})
        return type(self.pipe).from_pretrained(self.source, **parts, **FROM_FILES)

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        own = {"guidance": self.guidance, "examples": self.examples, "tokens": self.tokens}
        self.write(folder, network, card, own)


def load(
    folder: Path,
    pipeline: Any,
    family: type[PipelineNetwork],
    size: int | None = None,
    tokens: int | None = None,
    weights: Path | None = None,
) -> tuple[Denoiser, PipelineSpec]:
    """The denoiser and everything else of a folder of the stock class ``pipeline``, in float32 and evaluation mode.

    ``size`` is the side of its pictures in pixels, by default the checkpoint's own.
    """
    pipe, own = opened(folder, pipeline, family.part, weights)
    core, latents = getattr(pipe, family.part), checked(pipe.vae, family.scaling, pipeline.__name__)
    family = family.of(core, pipe, latents.channels)
    shape = cast(tuple[int, int, int], tuple(own["shape"])) if own and size is None else None
    shape = shape or (latents.channels, *_sides(core.config.get("sample_size"), size, latents.factor))
    process, prediction = process_of(scheduler_config(pipe), _tokens(shape))
    network = family(core, latents.factor)
    index = keys.read(folder / "model_index.json")
    unguided = distilled.reason(scheduler_config(pipe), index, None if weights else folder / "README.md")
    if family.null_prompt is None:
        unguided = f"its {family.part} is told the guidance scale or needs none"
    pipe.register_modules(**{family.part: None})
    spec = PipelineSpec(
        family,
        pipe,
        shape,
        process,
        folder,
        tokens or own.get("tokens") or family.length,
        StepTimes.read(own["times"]) if own.get("times") else None,
        pipe.scheduler if own.get("times") else None,
        own.get("guidance", 1.0),
        tuple(own.get("examples", (EXAMPLE,))),
        unguided="" if own.get("times") else unguided,
        guidable=family.null_prompt is not None and not unguided and not own.get("times"),
    )
    return Denoiser(network.requires_grad_(True), process, prediction, sigma_data=1.0).eval(), spec


def _sides(own: Any, size: int | None, factor: int) -> tuple[int, int]:
    """Of the latents: ``size`` pixels, or the network's ``own``. UserError for those that are not square."""
    if size:
        if size % (2 * factor):
            raise UserError(f"teacher.size: {size} is not a multiple of {2 * factor} pixels")
        return size // factor, size // factor
    height, width = (own, own) if isinstance(own, int) else own or (SIDE // factor, SIDE // factor)
    if height != width:
        raise UserError(
            f"teacher.size: missing; sample_size {[height, width]} of the network is not square, and students are: "
            f"give the side in pixels, as {max(1, min(height, width) // 2) * 2 * factor}"
        )
    return height, width


def _tokens(shape: tuple[int, int, int]) -> int:
    """Of a transformer with patches of 2 x 2, by which diffusers' pipelines bend their time grids."""
    return shape[1] * shape[2] // 4
