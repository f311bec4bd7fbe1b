"""Sana checkpoints (arXiv 2410.10629) and SANA-Sprint students (arXiv 2503.09641) in diffusers' folder layout.

The embedded miniature of the solids world is one of them: the same classes with small sizes.
"""

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.adapters import merged, save_lora
from models.condition import Condition
from models.controlnet import SanaControlBranch
from models.denoiser import CoreNetwork, Denoiser
from models.errors import UserError
from models.folders import replace_folder
from models.guidance import start_guidance_embedding
from models.pictures import decode
from models.process import Process, RectifiedFlow, TrigFlow
from models.student import OneStepStudent
from models.teachers import keys
from models.teachers.base import EXAMPLE, Texts, TextSpec
from models.teachers.files import read_part
from models.teachers.schedule import is_flow
from models.teachers.single_file import SingleFile
from models.trigflow import TrigFlowView

LINES = "examples.png"
"""The examples' lines in a folder's controlnet/, one below the other."""
LONGEST = 300
"""Tokens of a prompt that Sana's pipelines read; a tokenizer's own ``model_max_length`` may be shorter."""


class SanaNetwork(CoreNetwork):
    """A SanaTransformer2DModel as ``network(x, t, cond)`` with t the flow time in [0, 1]; predicts the velocity.

    With a ``text_encoder`` (while it is trained too) ``cond.text`` holds token ids (B, L) in the place of embeddings.
    With a ``control`` branch it follows the lines in ``cond.control`` as closely as ``control_strength`` says: 0 is
    not at all, 1 as it was trained.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        text_encoder: nn.Module | None = None,
        control: SanaControlBranch | None = None,
    ):
        super().__init__()
        self.transformer, self.text_encoder, self.control = transformer, text_encoder, control
        self.control_strength = 1.0

    @property
    def core(self) -> SanaTransformer2DModel:
        return self.transformer

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """``x`` (B, C, H, W), ``t`` (B,); text and, where the transformer embeds it, guidance from ``cond``."""
        if cond.text is None or cond.text_mask is None:
            raise ValueError("this network is conditional on text: the condition has none")
        text, config = cond.text, self.transformer.config
        if self.text_encoder is not None:
            text = self.text_encoder(text, attention_mask=cond.text_mask)[0]
        guidance = None
        if config["guidance_embeds"]:
            if cond.guidance is None:
                raise ValueError("this network embeds the guidance scale: the condition has none")
            guidance = config["guidance_embeds_scale"] * cond.guidance
        text, timestep, added = text.to(x.dtype), 1000 * config["timestep_scale"] * t, None
        if self.control is not None and self.control_strength != 0:
            if cond.control is None:
                raise ValueError("this network follows lines: the condition has no control")
            added = self.control(self.transformer, x, text, cond.text_mask, timestep, guidance, cond.control)
            added = tuple(self.control_strength * residual for residual in added)
        return self.transformer(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=cond.text_mask,
            timestep=timestep,
            guidance=guidance,
            controlnet_block_samples=added,
            return_dict=False,
        )[0]


def with_guidance(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A copy that embeds the guidance scale and, before any training, gives the same output at every scale."""
    if transformer.config["guidance_embeds"]:
        return copy.deepcopy(transformer)
    grown: Any = SanaTransformer2DModel.from_config(transformer.config, guidance_embeds=True)
    state = {name.replace("time_embed.emb.", "time_embed."): value for name, value in transformer.state_dict().items()}
    missing, unexpected = grown.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("time_embed.guidance_embedder.") for name in missing):
        raise ValueError(f"the transformer does not fit its own class with guidance: {unexpected}, {missing}")
    start_guidance_embedding(grown.time_embed.guidance_embedder)
    return grown


def without_guidance(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The inverse of :func:`with_guidance` for one whose embedding of the scale was never trained."""
    plain: Any = SanaTransformer2DModel.from_config(transformer.config, guidance_embeds=False)
    state = {name.replace("time_embed.", "time_embed.emb."): value for name, value in transformer.state_dict().items()}
    state |= {name: value for name, value in transformer.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({name: value for name, value in state.items() if name in plain.state_dict()})
    return plain


LATER_TIMES = (1.3, 1.1, 0.6)
"""Times of a student's second to fourth step at sigma_data 0.5 (SANA-Sprint, Table 7), until eval.timesteps finds its
own."""


@dataclass(frozen=True)
class SanaSpec(TextSpec):
    """What a Sana folder holds beside its transformer.

    shape:         (C, H, W) of the latents
    flow_shift:    of the teacher's own time grid
    times:         TrigFlow times of a student's steps, falling, the first one just below pi / 2; n steps use the first
                   n of them. None for a teacher
    sigma_data:    of a student's TrigFlow process; latents are scaled to it
    guidance:      scale that a student is asked for unless told otherwise
    examples:      prompts of sample grids
    joint:         prompts become token ids: the network holds the text encoder itself
    control:       (n, 1, H, W) in [-1, 1]: lines of the examples, for a network with a control branch
    source:        the folder that it was read from; None for a new one
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: nn.Module
    vae: AutoencoderDC
    shape: tuple[int, int, int]
    flow_shift: float = 3.0
    times: tuple[float, ...] | None = None
    sigma_data: float = 0.5
    guidance: float = 4.5
    examples: tuple[str, ...] = (EXAMPLE,)
    tellable: bool = True
    joint: bool = False
    control: Tensor | None = None
    source: Path | None = None
    texts: Texts | None = None
    _null: list[Condition] = field(default_factory=list, repr=False)

    @property
    def picture(self) -> tuple[int, int, int]:
        """(C, H, W) of a decoded picture."""
        side = self.vae.spatial_compression_ratio
        return self.vae.config["in_channels"], side * self.shape[1], side * self.shape[2]

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def beginning(self, process: Process) -> tuple[float, bool]:
        return process.t_max, False

    def one_step(self, denoiser: Denoiser) -> OneStepStudent:
        if self.times is None:
            raise ValueError("a teacher has no student")
        view = TrigFlowView(denoiser, self.sigma_data, self.sigma_data)
        return OneStepStudent(cast(Denoiser, view), self.times[0])

    def begun(self, process: Process, _sigma_init: float) -> "SanaSpec":
        """A flow starts at pure noise, as SanaSprintPipeline does."""
        ratio = process.ratio(torch.tensor(process.t_max, dtype=torch.float64))
        trigonometric = TrigFlow(self.sigma_data, data_scale=self.sigma_data)
        return replace(self, times=(float(trigonometric.time_from_ratio(ratio)),))

    def begun_flow(self, view: TrigFlowView, guidance: float) -> "SanaSpec":
        sigma_data = view.process.sigma_data
        later = (math.atan(0.5 * math.tan(t) / sigma_data) for t in LATER_TIMES)
        return replace(self, times=(view.process.t_max, *later), sigma_data=sigma_data, guidance=guidance)

    @property
    def summary(self) -> str:
        _, height, width = self.picture
        return f"Text to image, {height} x {width}, in latents of {' x '.join(map(str, self.shape))}."

    @property
    def usage(self) -> str:
        _, height, width = self.picture
        if self.times is None:
            first, last = "from diffusers import SanaPipeline", "num_inference_steps=20"
        else:
            first = "from functools import partial\n\nfrom diffusers import SanaSprintPipeline"
            last = f"num_inference_steps=steps, timesteps=[*times[:steps], 0.0], guidance_scale={self.guidance:g}, "
            last += "max_timesteps=None, intermediate_timesteps=None"
        steps = ""
        if self.times is not None:  # SanaSprintPipeline takes timesteps, and forgets to tell its scheduler their number
            steps = f"""steps, times = 1, {[round(t, 5) for t in self.times]}
pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, steps)
"""
        return f"""{first}

pipe = {first.split()[-1]}.from_pretrained("PATH")
size = {{"height": {height}, "width": {width}, "use_resolution_binning": False}}
text = {{"complex_human_instruction": None, "max_sequence_length": {self.max_length}}}
{steps}image = pipe("{self.examples[0]}", {last}, **size, **text).images[0]"""

    @property
    def max_length(self) -> int:
        return min(LONGEST, self.tokenizer.model_max_length)

    def preview(self, count: int) -> Condition:
        scale = None if self.times is None else self.guidance
        cond = self.text([self.examples[i % len(self.examples)] for i in range(count)], scale)
        if self.control is None:
            return cond
        lines = self.control[torch.arange(count) % len(self.control)]
        return replace(cond, control=lines.to(self.vae.device))

    def to(self, device: torch.device | str) -> "SanaSpec":
        """Move the frozen parts; a joint text encoder moves with its network."""
        cast(nn.Module, self.vae).to(device)
        if not self.joint:
            self.text_encoder.to(device)
        self._null.clear()
        return self

    def parts(self) -> list[nn.Module]:
        return [cast(nn.Module, self.vae), *([] if self.joint else [self.text_encoder])]

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) of about unit variance."""
        return self.vae.encode(pictures).latent * self.vae.config["scaling_factor"]  # type: ignore[union-attr]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`encode`; not clamped."""
        return self.vae.decode(latents / self.vae.config["scaling_factor"]).sample  # type: ignore[union-attr]

    def text(self, prompts: Sequence[str], guidance: float | None = None) -> Condition:
        """Conditions for prompts, with the empty prompt as their null; on the autoencoder's device."""
        if self.texts is not None:
            cond = self.texts(prompts).to(self.vae.device)
        else:
            if not self._null:
                self._null.append(self._embed([""]))
            null, cond = self._null[0], self._embed(prompts)
            cond = replace(cond, null_text=null.text, null_text_mask=null.text_mask)
        scale = None if guidance is None else torch.full((len(prompts),), guidance, device=self.vae.device)
        return replace(cond, guidance=scale)

    def without_encoders(self, texts: Texts, pictures: bool) -> "SanaSpec":
        if pictures:
            cast(nn.Module, self.vae).encoder = nn.Identity()
        return replace(self, text_encoder=nn.Identity(), texts=texts)

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Condition:
        """As diffusers' Sana pipelines do it: lower case, padded on the right, no further instruction."""
        self.tokenizer.padding_side = "right"
        tokens = self.tokenizer(
            [prompt.lower().strip() for prompt in prompts],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids.to(self.vae.device), tokens.attention_mask.to(self.vae.device)
        return Condition(text=ids if self.joint else self.text_encoder(ids, attention_mask=mask)[0], text_mask=mask)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of ``prompt`` that the tokenizer does not know; empty for tokenizers that spell out every word."""
        unknown = self.tokenizer.unk_token_id
        words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
        return [word for word in words if unknown in self.tokenizer(word, add_special_tokens=False).input_ids]

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        """Write ``folder`` through a temporary one, as SanaPipeline (teacher) or SanaSprintPipeline (student)."""
        adapted, network = network, merged(network)
        assert isinstance(network, SanaNetwork)
        text_encoder, vae = network.text_encoder or self.text_encoder, self.vae
        if self.texts is not None and self.source is not None:
            text_encoder, vae = _frozen_parts(self.source)
        parts: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "text_encoder": text_encoder,
            "vae": vae,
            "transformer": network.transformer,
        }
        told = network.transformer.config["guidance_embeds"]
        if self.times is None:
            shift = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.flow_shift}
            pipeline: Any = SanaPipeline(**parts, scheduler=DPMSolverMultistepScheduler(**shift))
        else:
            scheduler: Any = SCMScheduler(sigma_data=self.sigma_data)
            parts["transformer"] = with_guidance(network.transformer)  # SanaSprintPipeline always tells a scale
            pipeline = SanaSprintPipeline(**parts, scheduler=scheduler)
        studio = {"times": self.times, "guidance": self.guidance, "examples": self.examples, "told": told}
        with replace_folder(folder) as temporary:
            pipeline.save_pretrained(temporary, safe_serialization=True)
            if network.control is not None and self.control is not None:
                network.control.save_pretrained(temporary / "controlnet", safe_serialization=True)
                strip = (self.control[:, 0] > 0).flatten(0, 1).numpy()
                Image.fromarray(strip).save(temporary / "controlnet" / LINES)
            for config in temporary.glob("*/config.json"):  # libraries note where weights came from on this machine
                values = json.loads(config.read_text())
                values.pop("_name_or_path", None)
                config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            save_lora(temporary, "transformer", adapted)
            (temporary / "studio.json").write_text(json.dumps(studio, indent=2) + "\n")
            (temporary / "README.md").write_text(card)


def _frozen_parts(folder: Path) -> tuple[nn.Module, AutoencoderDC]:
    """Text encoder and autoencoder. UserError if the autoencoder's class is another."""
    index = keys.read(folder / "model_index.json")
    if index["vae"][1] != "AutoencoderDC":
        raise UserError(f"teacher: {folder / 'vae'} is a {index['vae'][1]}: Sana is read with an AutoencoderDC alone")
    vae, text_encoder = (read_part(folder, name, index[name]) for name in ("vae", "text_encoder"))
    return text_encoder.requires_grad_(False).eval(), vae.requires_grad_(False).eval()


def _transformer(folder: Path, index: dict[str, Any], weights: Path | None) -> nn.Module | None:
    if weights is None:
        return read_part(folder, "transformer", index["transformer"])
    single = SingleFile(weights, folder)
    network = single.part("transformer", SanaTransformer2DModel, required=True)
    single.name_rest()
    return network


def load(folder: Path, weights: Path | None = None) -> tuple[Denoiser, SanaSpec]:
    """The denoiser and everything else in ``folder``, in float32 and evaluation mode.

    ``weights`` is a single file of the transformer, in the place of the folder's.
    """
    index = keys.read(folder / "model_index.json")
    transformer = cast(SanaTransformer2DModel, _transformer(folder, index, weights))
    text_encoder, vae = _frozen_parts(folder)
    place = folder / "scheduler" / "scheduler_config.json"
    scheduler = keys.read(place)
    keys.check_index(index, SanaPipeline, folder)
    keys.check_scheduler(scheduler, place)
    if scheduler["_class_name"] != "SCMScheduler" and not is_flow(scheduler):
        raise UserError(
            f"teacher: {place}: a {scheduler['_class_name']} that is no flow's (use_flow_sigmas is not true)"
        )
    studio = folder / "studio.json"
    own: dict[str, Any] = keys.read(studio) if studio.is_file() else {}
    if not own.get("told", True) and transformer.config["guidance_embeds"]:
        transformer = without_guidance(transformer)
    side, config = transformer.config["sample_size"], transformer.config
    branch = lines = None
    if (folder / "controlnet").is_dir():
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
        branch, info = cast(Any, SanaControlBranch).from_pretrained(folder / "controlnet", **options)
        keys.check_weights(info, folder / "controlnet")
        strip = torch.from_numpy(np.array(decode(folder / "controlnet" / LINES, LINES, "L")) > 127)
        lines = 2.0 * strip.view(-1, 1, strip.shape[1], strip.shape[1]) - 1
    sigma_data = scheduler.get("sigma_data", 0.5)
    times = tuple(own["times"]) if own.get("times") else None
    if times is None and scheduler["_class_name"] == "SCMScheduler":  # a student that another program exported
        later = (math.atan(0.5 * math.tan(t) / sigma_data) for t in LATER_TIMES)
        times = (TrigFlow(sigma_data).t_max, *later)
    spec = SanaSpec(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder,
        vae=vae,
        shape=(config["in_channels"], side, side),
        flow_shift=scheduler.get("flow_shift", scheduler.get("shift", 1.0)) or 1.0,
        times=times,
        sigma_data=sigma_data,
        guidance=own.get("guidance", 4.5),
        examples=tuple(own.get("examples", (EXAMPLE,))),
        control=lines,
        source=folder,
    )
    return denoiser(SanaNetwork(transformer, control=branch), spec.flow_shift).eval(), spec


def denoiser(network: SanaNetwork, flow_shift: float) -> Denoiser:
    """Latents have unit variance, hence sigma_data = 1."""
    return Denoiser(network, RectifiedFlow(flow_shift, t_max=0.9999), "velocity", sigma_data=1.0)
