"""Text-to-image checkpoints in diffusers' pipeline folders, whatever the family.

A family (models/teachers/{stable_diffusion,pixart,sd3,flux,qwen_image,z_image}.py) says how its network is called and
how its prompts are encoded. Schedule, kind of prediction, latent scaling and sizes come from the checkpoint's configs.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor, nn

from models.adapters import merged, save_lora
from models.condition import Condition
from models.denoiser import CoreNetwork, Denoiser
from models.errors import UserError
from models.folders import replace_folder
from models.parameterization import Prediction
from models.process import DiscreteVP, Process, RectifiedFlow
from models.teachers.base import EXAMPLE, Texts, TextSpec
from models.teachers.files import FROM_FILES, opened
from models.trigflow import TrigFlowView

SIDE = 1024
"""Of the pictures of a transformer whose config names none."""
MOST_STEPS = 4
"""A student's steps are 1 to this many."""
DISTILLED = ("turbo", "lightning", "schnell", "hyper", "lcm")
"""Words in the name of a checkpoint that needs no guidance and knows none."""


class PipelineNetwork(CoreNetwork):
    """A pipeline's U-Net or transformer as ``network(x, t, cond)`` in the time of the checkpoint's own process.

    ``part`` is its name in the pipeline and here, so that blocks are named as in the checkpoint; ``factor`` the pixels
    to a latent. ``guidance`` is what a guidance-distilled network is told where the condition says nothing.
    """

    part: ClassVar[Literal["unet", "transformer"]] = "transformer"
    length: ClassVar[int] = 77
    """Tokens of a prompt unless told otherwise."""
    null_prompt: ClassVar[str | None] = ""
    """What an unconditional answer is asked for; None: the network knows none."""
    call: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}
    """Arguments with which the stock pipeline calls it once, without guidance."""

    def __init__(self, core: nn.Module, factor: int, guidance: float = 3.5):
        super().__init__()
        self.add_module(self.part, core)
        self.factor, self.guidance = factor, guidance

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

    def scale(self, x: Tensor, cond: Condition) -> Tensor | None:
        """Embedded guidance scales (B,) for a network that has them."""
        if not self.core.config.get("guidance_embeds"):
            return None
        return x.new_full((len(x),), self.guidance) if cond.guidance is None else cond.guidance.to(x.dtype)


def padded(embeddings: Sequence[Tensor], length: int) -> Condition:
    """Texts of different lengths (L_i, D), cut or filled up with zeros to ``length``, with their mask."""
    text = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[1])
    mask = torch.zeros(len(embeddings), length, dtype=torch.long, device=text.device)
    for row, value in enumerate(embeddings):
        count = min(len(value), length)
        text[row, :count], mask[row, :count] = value[:count], 1
    return Condition(text=text, text_mask=mask)


def process_of(scheduler: dict[str, Any], tokens: int) -> tuple[Process, Prediction]:
    """Noise process and kind of prediction that a scheduler's config tells of; ``tokens`` of a picture bend a flow's
    grid where the config says so. UserError for a scheduler that is neither a flow nor a discrete process."""
    name = scheduler["_class_name"]
    flow = name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas")
    if flow:
        shift = scheduler.get("shift") or scheduler.get("flow_shift") or 1.0
        if scheduler.get("use_dynamic_shifting"):
            low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
            first, last = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
            shift = math.exp(first + (tokens - low) * (last - first) / (high - low))
        return RectifiedFlow(shift, t_max=0.9999), "velocity"
    if "num_train_timesteps" not in scheduler or "beta_schedule" not in scheduler:
        raise UserError(f"teacher: its scheduler {name} is neither a flow nor a table of noise levels")
    table = DDPMScheduler.from_config(_plain(scheduler)).alphas_cumprod.double()  # type: ignore[union-attr]
    kinds: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"teacher: prediction_type {kind} of its scheduler is not one of {sorted(kinds)}")
    table[-1] = table[-1].clamp(min=2**-24)  # zero terminal SNR, as diffusers' own schedulers treat it
    return DiscreteVP(table), kinds[kind]


def scheduler_config(pipe: Any) -> dict[str, Any]:
    """With its class's name."""
    return dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}


SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def _plain(scheduler: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler's config says of the noise levels and the prediction."""
    return {key: scheduler[key] for key in (*SCHEDULE, "prediction_type") if key in scheduler}


def one_step_scheduler(process: Process, config: dict[str, Any]) -> Any:
    """A stock scheduler which makes the student's 1 to 4 steps: each answer is noised afresh for the next step."""
    if isinstance(process, RectifiedFlow):
        return FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    return LCMScheduler.from_config(
        _plain(config), original_inference_steps=MOST_STEPS, clip_sample=False, steps_offset=1
    )


def step_times(process: Process) -> tuple[float, ...]:
    """Times of a student's steps: the last one of the process and those that the stock schedulers divide it by."""
    u = [1 - k / MOST_STEPS for k in range(MOST_STEPS)]
    if isinstance(process, RectifiedFlow):
        return tuple(process.shift * v / (1 + (process.shift - 1) * v) for v in u)
    return tuple(v * (process.t_max + 1) - 1 for v in u)


class Latents:
    """An autoencoder as the teacher's latents are scaled: ``(z - shift) * scale`` by its own config."""

    def __init__(self, vae: Any):
        self.vae, config = vae, vae.config
        self.video = "latents_mean" in config and "z_dim" in config
        """Whether it encodes videos, here of one frame."""
        mean, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        self.mean, self.scale = torch.tensor(float(mean)), torch.tensor(float(scale))
        if self.video:
            column = lambda values: torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.mean, self.scale = column(config["latents_mean"]), 1 / column(config["latents_std"])

    @property
    def channels(self) -> int:
        return self.vae.config["z_dim" if self.video else "latent_channels"]

    @property
    def factor(self) -> int:
        """Pixels to a latent along a side."""
        if self.video:
            return 2 ** len(self.vae.temperal_downsample)
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to latents (B, C, h, w): the mode of their distribution."""
        device = self.vae.device
        inputs = pictures.to(device, self.vae.dtype)
        z = self.vae.encode(inputs.unsqueeze(2) if self.video else inputs).latent_dist.mode()
        z = (z.squeeze(2) if self.video else z).float()
        return ((z - self.mean.to(device)) * self.scale.to(device)).to(pictures.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse; not clamped."""
        device = self.vae.device
        z = (latents.to(device) / self.scale.to(device) + self.mean.to(device)).to(self.vae.dtype)
        pictures = self.vae.decode(z.unsqueeze(2) if self.video else z, return_dict=False)[0]
        return (pictures.squeeze(2) if self.video else pictures).float().to(latents.device)


class Stock:
    """What checkpoints in stock pipelines have in common, whatever they are asked for.

    ``pipe`` is the pipeline without its network, which is called ``part`` there; ``times`` are a student's, None for a
    teacher.
    """

    pipe: Any
    process: Process
    shape: tuple[int, int, int]
    times: tuple[float, ...] | None

    @property
    @abstractmethod
    def part(self) -> str: ...

    @property
    def student(self) -> bool:
        return self.times is not None

    @property
    def latents(self) -> Latents | None:
        """None for a network that makes pixels."""
        vae = self.pipe.components.get("vae")
        return None if vae is None else Latents(vae)

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
        """It starts at the process's last time, as stock pipelines do."""
        return replace(cast(Any, self), times=step_times(self.process))

    def begun_flow(self, _view: TrigFlowView, _guidance: float) -> Self:
        return replace(cast(Any, self), times=step_times(self.process))

    def parts(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def whole(self) -> Any:
        """The pipeline with all of its parts but the network."""
        return self.pipe

    def write(self, folder: Path, network: nn.Module, card: str, own: dict[str, Any]) -> None:
        """A stock pipeline folder with ``own`` in studio.json, and ``pytorch_lora_weights.safetensors`` beside it for a
        LoRA student."""
        whole, pipe, before = cast(Any, merged(network)), self.whole(), self.pipe.scheduler
        scheduler = one_step_scheduler(self.process, before.config) if self.times else before
        with replace_folder(folder) as temporary:
            pipe.register_modules(**{self.part: whole.core, "scheduler": scheduler})
            try:
                pipe.save_pretrained(temporary, safe_serialization=True)
            finally:
                pipe.register_modules(**{self.part: None, "scheduler": before})
            save_lora(temporary, self.part, network)
            text = json.dumps(own | {"times": self.times, "shape": self.shape}, indent=2)
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
    times: tuple[float, ...] | None = None
    guidance: float = 1.0
    examples: tuple[str, ...] = (EXAMPLE,)
    guidable: bool = True
    offload: bool = False
    texts: Texts | None = None
    place: list[torch.device] = field(default_factory=lambda: [torch.device("cpu")], repr=False)
    _null: list[Condition] = field(default_factory=list, repr=False)

    @property
    def part(self) -> str:
        return self.family.part

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
        return f"""from diffusers import {name}

pipe = {name}.from_pretrained("PATH")
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
    core, latents = getattr(pipe, family.part), Latents(pipe.vae)
    side = size // latents.factor if size else core.config.get("sample_size") or SIDE // latents.factor
    shape = cast(tuple[int, int, int], tuple(own["shape"]) if own and size is None else (latents.channels, side, side))
    if size and size % (2 * latents.factor):
        raise UserError(f"teacher.size: {size} is not a multiple of {2 * latents.factor} pixels")
    distilled = any(word in (weights or folder).resolve().name.lower() for word in DISTILLED)
    process, prediction = process_of(scheduler_config(pipe), _tokens(shape))
    network = family(core, latents.factor)
    pipe.register_modules(**{family.part: None})
    spec = PipelineSpec(
        family,
        pipe,
        shape,
        process,
        folder,
        tokens or own.get("tokens") or family.length,
        tuple(own["times"]) if own.get("times") else None,
        own.get("guidance", 1.0),
        tuple(own.get("examples", (EXAMPLE,))),
        guidable=family.null_prompt is not None and not distilled and not own.get("times"),
    )
    return Denoiser(network.requires_grad_(True), process, prediction, sigma_data=1.0).eval(), spec


def _tokens(shape: tuple[int, int, int]) -> int:
    """Of a transformer with patches of 2 x 2, by which diffusers' pipelines bend their time grids."""
    return shape[1] * shape[2] // 4
