"""GenEval's own detector, Mask2Former on COCO, through transformers; and the way from mmdet's checkpoint to its format.

    python -m eval.geneval.mask2former mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth FOLDER

Input sizes, padding and what becomes of the logits are mmdet 2.27's, not those of transformers' image processor, which
works at 384 x 384 and gives other scores and boxes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging

from eval.features import file_digest
from eval.geneval.coco import CLASSES
from eval.geneval.judge import Detection
from models.errors import UserError, run_command
from models.folders import replace_folder

PUBLISHED = "743b7d99"
"""First digits of the SHA-256 of the checkpoint that GenEval's published scores were made with."""
ORIGIN = "origin.json"
MEAN, STD, PAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 128.0


# ------------------------------------------------------------------------------------------------------ detection


@dataclass(frozen=True)
class Input:
    """A picture as the network takes it, ``pixels`` (1, 3, H, W); ``inside`` (h, w) of it is no padding."""

    pixels: Tensor
    inside: tuple[int, int]


def prepare(image: Tensor, short: int = 800, long: int = 1333) -> Input:
    """uint8 (3, h, w) enlarged or reduced to ``short`` or at most ``long``, gray to multiples of 32, normalised.

    Bilinear without antialiasing and rounded to whole numbers, as OpenCV does it.
    """
    h, w = image.shape[1:]
    scale = min(short / min(h, w), long / max(h, w))
    inside = int(h * scale + 0.5), int(w * scale + 0.5)
    pixels = F.interpolate(image[None].float(), inside, mode="bilinear", align_corners=False).round()
    pixels = F.pad(pixels, (0, -inside[1] % 32, 0, -inside[0] % 32), value=PAD)
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return Input((pixels - mean) / std, inside)


@dataclass(frozen=True)
class Instances:
    """Objects of one picture, best first, those of equal score by class.

    ``labels`` (N,) are class indices, ``boxes`` (N, 4) x1, y1, x2, y2, ``masks`` (N, H, W) bool.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    inside: tuple[int, int],
    original: tuple[int, int],
    limit: int = 100,
) -> Instances:
    """What the logits of Q queries, (Q, C + 1) with "no object" last and (Q, h, w), say of a picture.

    Masks go bilinearly to the ``padded`` input, lose the padding, and go to the ``original`` size (each height, width).
    The ``limit`` best pairs of query and class count; a score is the class's probability times the mean probability of
    the mask's pixels. A box ends one pixel after the mask's last; that of an empty mask is 0, 0, 0, 0.
    """
    classes = class_logits.shape[1] - 1
    best, index = class_logits.softmax(1)[:, :-1].flatten().topk(min(limit, len(class_logits) * classes))
    resize = lambda masks, size: F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    logits = resize(resize(mask_logits, padded)[:, : inside[0], : inside[1]], original)[index // classes]
    masks = logits > 0
    sure = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    rows, columns = masks.any(2), masks.any(1)
    first = lambda hits: hits.int().argmax(1)
    end = lambda hits: hits.shape[1] - hits.flip(1).int().argmax(1)
    boxes = torch.stack([first(columns), first(rows), end(columns), end(rows)], 1).float()
    boxes[~masks.flatten(1).any(1)] = 0
    by_class = (index % classes).argsort(stable=True)
    order = by_class[(best * sure)[by_class].argsort(descending=True, stable=True)]
    return Instances((index % classes)[order], (best * sure)[order], boxes[order], masks[order])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights: :func:`convert` sees to those that detecting needs."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class Mask2Former:
    """``detector(images)`` finds COCO's objects, by GenEval's names, in uint8 pictures.

    ``name`` says whose weights these are: scores by other weights than the published ones do not compare with papers.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", short: int = 800, long: int = 1333):
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"--detector: {folder} has no model.safetensors: convert mmdet's checkpoint with this module"
            )
        try:
            with _quiet():
                self.network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                    folder, use_safetensors=True, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--detector: {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if self.network.config.num_labels != len(CLASSES):
            raise UserError(f"--detector: {folder} knows {self.network.config.num_labels} classes, not COCO's 80")
        self.network.eval().to(device)
        self.device, self.short, self.long, self.sha256 = device, short, long, file_digest(weights)
        origin = folder / ORIGIN
        source = json.loads(origin.read_text())["sha256"] if origin.is_file() else None
        if source is None:
            self.name = "geneval-hf (meta weights)"
        else:
            self.name = f"geneval ({'mmdet' if source.startswith(PUBLISHED) else f'mmdet {source[:8]}'} weights)"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """The objects in each of ``images`` (B, 3, H, W) uint8, best first, the 100 best of each."""
        return [self._detect(image) for image in images.to(self.device)]

    def _detect(self, image: Tensor) -> list[Detection]:
        given = prepare(image, self.short, self.long)
        out = self.network(given.pixels)
        logits = out.class_queries_logits[0].float(), out.masks_queries_logits[0].float()
        height, width = given.pixels.shape[2:]
        found = instances(*logits, (height, width), given.inside, (image.shape[1], image.shape[2]))
        values = zip(*(v.cpu() for v in (found.labels, found.boxes, found.scores, found.masks)), strict=True)
        return [
            Detection(CLASSES[int(label)], (box[0], box[1], box[2], box[3]), float(score), mask.numpy())
            for label, box, score, mask in ((label, box.tolist(), score, mask) for label, box, score, mask in values)
        ]


# ----------------------------------------------------------------------------------------------------- conversion

ENCODER, DECODER = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
QUERIES = "model.transformer_module"
NAMES: list[tuple[str, str]] = [
    (r"backbone\.patch_embed\.projection", f"{ENCODER}.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", f"{ENCODER}.embeddings.norm"),
    (r"backbone\.norm(\d)", ENCODER + r".hidden_states_norms.stage\1"),
    (r"backbone\.stages\.(\d+)\.downsample", ENCODER + r".encoder.layers.\1.downsample"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)", ENCODER + r".encoder.layers.\1.blocks.\2"),
    (r"\.attn\.w_msa\.relative_position_bias_table", ".attention.self.relative_position_bias_table"),
    (r"\.attn\.w_msa\.proj", ".attention.output.dense"),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0", r"\1.intermediate.dense"),
    (r"(blocks\.\d+)\.ffn\.layers\.1", r"\1.output.dense"),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", f"{DECODER}.level_embed"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv", DECODER + r".input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn", DECODER + r".input_projections.\1.1"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", f"{DECODER}.adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", f"{DECODER}.adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", f"{DECODER}.layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", f"{DECODER}.layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", f"{DECODER}.mask_projection"),
    (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0", DECODER + r".encoder.layers.\1.self_attn"),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0",
        DECODER + r".encoder.layers.\1.self_attn_layer_norm",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1",
        DECODER + r".encoder.layers.\1.final_layer_norm",
    ),
    (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)", DECODER + r".encoder.layers.\1"),
    (r"panoptic_head\.transformer_decoder\.post_norm", f"{QUERIES}.decoder.layernorm"),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn",
        QUERIES + r".decoder.layers.\1.cross_attn",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn",
        QUERIES + r".decoder.layers.\1.self_attn",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0",
        QUERIES + r".decoder.layers.\1.cross_attn_layer_norm",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1",
        QUERIES + r".decoder.layers.\1.self_attn_layer_norm",
    ),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2", QUERIES + r".decoder.layers.\1.final_layer_norm"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)", QUERIES + r".decoder.layers.\1"),
    (r"\.ffns\.0\.layers\.0\.0", ".fc1"),
    (r"\.ffns\.0\.layers\.1", ".fc2"),
    (r"panoptic_head\.query_embed", f"{QUERIES}.queries_embedder"),
    (r"panoptic_head\.query_feat", f"{QUERIES}.queries_features"),
    (r"panoptic_head\.level_embed", f"{QUERIES}.level_embed"),
    (r"panoptic_head\.cls_embed", "class_predictor"),
    *(
        (rf"panoptic_head\.mask_embed\.{2 * i}", f"{QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0")
        for i in range(3)
    ),
]
"""mmdet's names and transformers' in its files, applied one after the other."""


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    if "_norms.stage" in name:  # mmdet counts stages from 0
        name = re.sub(r"stage(\d)", lambda match: f"stage{int(match[1]) + 1}", name)
    return name


def merged_in_transformers_order(value: Tensor) -> Tensor:
    """Weights over merged patches (..., 4 C): from mmdet's channel-major order to four slices of C channels.

    mmdet unfolds: channel c, then the pixels (0, 0), (0, 1), (1, 0), (1, 1) of a 2 x 2 square. Swin concatenates the
    channels of the pixels (0, 0), (1, 0), (0, 1), (1, 1).
    """
    return value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet 2.x's Mask2Former with a Swin backbone under transformers' names; UserError for a name without a place."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):  # a constant
            continue
        if ".downsample." in name:
            value = merged_in_transformers_order(value)
        if match := re.fullmatch(r"(.*)\.attn\.w_msa\.qkv\.(weight|bias)", name):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{_renamed(match[1])}.attention.self.{part}.{match[2]}"] = piece.contiguous()
            continue
        target = _renamed(name)
        if match := re.fullmatch(r"(.*self_attn)\.in_proj_(weight|bias)", target):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{match[1]}.{part}_proj.{match[2]}"] = piece.contiguous()
            continue
        if target == name:
            raise UserError(f"no Mask2Former of mmdet 2.x with a Swin backbone: it has '{name}'")
        found[target] = value.contiguous()
    return found


def config_of(state: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The architecture that mmdet's weights are of, read from their shapes."""
    count = lambda pattern: len({match[1] for name in state if (match := re.match(pattern, name))})
    stages = count(r"backbone\.stages\.(\d+)\.")
    table = lambda stage: state[f"backbone.stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table"]
    pixel, head = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder.layers"
    swin: dict[str, Any] = dict(
        embed_dim=state["backbone.patch_embed.projection.weight"].shape[0],
        depths=[count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        num_heads=[table(stage).shape[1] for stage in range(stages)],
        window_size=(round(table(0).shape[0] ** 0.5) + 1) // 2,
        out_features=[f"stage{stage + 1}" for stage in range(stages)],
    )
    backbone = SwinConfig(**swin)
    levels, points = state[f"{pixel}.level_encoding.weight"].shape[0], 4
    offsets = state[f"{pixel}.encoder.layers.0.attentions.0.sampling_offsets.weight"].shape[0]
    queries, width = state["panoptic_head.query_feat.weight"].shape
    sizes: dict[str, Any] = dict(
        backbone_config=backbone,
        feature_size=width,
        mask_feature_size=state[f"{pixel}.mask_feature.weight"].shape[0],
        hidden_dim=width,
        encoder_feedforward_dim=state[f"{pixel}.encoder.layers.0.ffns.0.layers.0.0.weight"].shape[0],
        dim_feedforward=state[f"{head}.0.ffns.0.layers.0.0.weight"].shape[0],
        encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        decoder_layers=1 + count(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\."),
        num_attention_heads=offsets // (2 * levels * points),
        num_queries=queries,
        num_labels=state["panoptic_head.cls_embed.weight"].shape[0] - 1,
    )
    return Mask2FormerConfig(**sizes)


@dataclass(frozen=True)
class Options:
    """Write mmdet's Mask2Former checkpoint as a folder that transformers loads."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """mmdet's .pth file; the eight digits before the suffix must be its SHA-256's first."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""


def convert(options: Options) -> None:
    """Check the file against its own name, convert, and see that every weight of the network was there."""
    source = options.checkpoint
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    digest = file_digest(source)
    if (named := re.search(r"-([0-9a-f]{8})\.pth$", source.name)) and not digest.startswith(named[1]):
        raise UserError(f"{source} is damaged: its SHA-256 begins {digest[:8]}, not {named[1]}")
    try:
        stored = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{source} cannot be read without running code from it: {type(error).__name__}") from error
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    try:
        config = config_of(state)
    except KeyError as error:
        raise UserError(f"{source} is no Mask2Former of mmdet 2.x with a Swin backbone: no {error}") from error
    weights = converted(state)
    with replace_folder(options.output) as temporary:
        config.architectures = ["Mask2FormerForUniversalSegmentation"]
        config.save_pretrained(temporary)
        save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        (temporary / ORIGIN).write_text(json.dumps({"file": source.name, "sha256": digest}, indent=2) + "\n")
        with _quiet():
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                temporary, use_safetensors=True, output_loading_info=True
            )
        _, info = loaded
        # the backbone's last norm and the loss's class weights are no part of detecting
        missing = [n for n in info["missing_keys"] if not n.endswith(("swin.layernorm.weight", "swin.layernorm.bias"))]
        missing = [n for n in missing if n != "criterion.empty_weight"]
        if missing or info["unexpected_keys"] or info["mismatched_keys"]:
            raise UserError(f"{source} lacks {missing[:3]}, or has {list(info['unexpected_keys'])[:3]} too many")
    print(f"{options.output}: {sum(v.numel() for v in weights.values()):,} weights, from {digest[:8]}")


if __name__ == "__main__":
    run_command(lambda: convert(tyro.cli(Options)))
