"""Compute latents and text embeddings once, for training without autoencoder and text encoders.

    python -m distill.precompute --config configs/x.yaml data/latents
    torchrun --nproc_per_node 8 -m distill.precompute --config configs/x.yaml data/latents
    accelerate launch distill/train.py --config configs/x.yaml --data '{kind: precomputed, path: data/latents}'

Teacher and data are those of a training configuration; any key of it can be given, as in training. The same command
again goes on where it was interrupted, and refuses pictures or captions that have changed since. The folder holds
webdataset shards of safetensors (distill/stored.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import nn

from distill import stored
from distill.build import build_stream, load_teacher, sana_spec
from distill.data import Pictures, ShuffledStream
from distill.settings import (
    ConditionsOnly,
    Config,
    HFData,
    ImageFolderData,
    PrecomputedData,
    Pretrain,
    SanaSize,
    check,
    override,
    read_values,
)
from distill.source import told
from models.errors import UserError, run_command
from models.prompts import read_prompts
from models.teachers.base import ClassSpec, TextSpec
from models.teachers.latents import Latents
from models.teachers.pipeline import Stock
from models.teachers.sana import SanaSpec


@dataclass(frozen=True)
class Options:
    """Write what a run asks its autoencoder and text encoders for. Other options are keys of the configuration."""

    output: tyro.conf.Positional[Path]
    """Folder for the shards."""
    config: Path
    """Configuration of a run with a teacher, or for a new Sana (method.sana), and pictures, or prompts alone."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Numbers on disk. float16 is the finer, bfloat16 has the wider range."""
    count: int | None = None
    """Only this many samples, the first ones."""
    batch: int = 16
    """Samples encoded at a time."""
    per_shard: int = 1000
    """Samples of a shard."""
    verify: bool = False
    """Read all pictures and captions again, and compare them with those that were encoded."""


def _source(config: Config) -> tuple[Pictures | Sequence[str], tuple[int, int, int] | None, list[str]]:
    """What is encoded, shape and class names; UserError if it cannot be counted."""
    if isinstance(config.data, PrecomputedData):
        raise UserError("data.kind: precomputed is what this command makes; give pictures or prompts")
    if isinstance(config.data, ConditionsOnly):
        if config.data.prompts is None:
            raise UserError("data.prompts: missing; conditions_only without prompts has nothing to encode")
        return read_prompts(config.data.prompts), None, []
    stream, shape, names = build_stream(config, 0, 1)
    if not isinstance(stream, ShuffledStream):
        raise UserError("data.streaming: samples are found by their number here: give false")
    return stream.pictures, shape, names


def _scaling(spec: ClassSpec | TextSpec) -> dict[str, Any]:
    """How the autoencoder's latents became x0 = (latents - shift) * scale."""
    match spec:
        case Stock(latents=Latents(mean=mean, scale=scale)):
            return {"shift": mean.flatten().tolist(), "scale": scale.flatten().tolist()}
        case SanaSpec():
            return {"shift": [0.0], "scale": [spec.vae.config["scaling_factor"]]}
        case _:
            return {}


def _encoders(
    config: Config, shape: tuple[int, int, int] | None, names: list[str]
) -> tuple[str, int | None, ClassSpec | TextSpec]:
    """The name of what encodes, its tokens of a prompt, and its spec: a teacher's, or that of one still to be made."""
    match config.method:
        case Pretrain(sana=SanaSize() as sizes):
            if shape is None:
                raise UserError("data.kind: a new teacher learns from pictures, of which conditions_only has none")
            if sizes.text_encoder is None:
                raise UserError("method.sana.text_encoder: missing; embeddings are of one that is trained already")
            return f"{sizes.autoencoder} with {sizes.text_encoder}", sizes.max_length, sana_spec(sizes, shape)
        case _:
            spec = load_teacher(config, shape, names)[1]
            assert config.teacher is not None
            return config.teacher.path, config.teacher.tokens, spec


def main(options: Options, keys: Sequence[str] = ()) -> None:
    if min(options.batch, options.per_shard, 1 if options.count is None else options.count) < 1:
        raise UserError("--batch, --per-shard and --count must be at least 1")
    config = check(override(read_values(options.config), list(keys)), str(options.config))
    if config.teacher is not None:
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache": None})})
    source, shape, names = _source(config)
    teacher, tokens, spec = _encoders(config, shape, names)
    if isinstance(spec, TextSpec) and spec.control is not None:
        raise UserError(f"teacher.path: {teacher} follows lines, which are drawn from pictures in training")
    if isinstance(spec, ClassSpec) and shape is None:
        raise UserError(f"data.kind: {teacher} knows classes, of which there is nothing to encode")
    facts = {
        "teacher": teacher,
        "tokens": tokens,
        "scaling": _scaling(spec),
        "dtype": options.dtype,
        "count": min(len(source), options.count or len(source)),
        "per_shard": options.per_shard,
        "batch": options.batch,
        "data": config.data.model_dump(mode="json"),
        "classes": config.classes,
        "source": told(config.data, source),
    }
    state, device = stored.processes()
    random = isinstance(config.data, ImageFolderData | HFData) and config.data.caption == "random"
    if state.is_main_process and isinstance(spec, TextSpec) and random:
        print("data.caption: random: one caption of each picture is kept, always the same", file=sys.stderr)
    if isinstance(spec, SanaSpec):  # convolutions of a CPU take a third less time so
        cast(nn.Module, spec.vae).to(memory_format=torch.channels_last)
    stored.run(stored.Writer(options.output, spec, source, facts, device, options.verify), state)
    if state.is_main_process:
        print(f"{options.output}: {facts['count']} samples of {teacher} in {options.dtype}")


if __name__ == "__main__":
    run_command(lambda: main(*tyro.cli(Options, args=sys.argv[1:], return_unknown_args=True)))
