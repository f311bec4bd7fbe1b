"""GenEval's detector: post-processing against mmdet's own answers, conversion against mmdet's own rules."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from eval.geneval.mask2former import (
    MEAN,
    PAD,
    STD,
    Mask2Former,
    Options,
    config_of,
    convert,
    converted,
    instances,
    merged_in_transformers_order,
    prepare,
)
from models.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mask2former_post_golden.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_instances_are_mmdets(case: dict[str, Any]):
    found = instances(
        torch.tensor(case["class_logits"]),
        torch.tensor(case["mask_logits"]),
        tuple(case["padded_input"]),
        tuple(case["image_in_it"]),
        tuple(case["original"]),
        case["max_per_image"],
    )
    assert len(found.scores) == len(case["expected"])
    for label, score, box, mask, expected in zip(
        found.labels, found.scores, found.boxes, found.masks, case["expected"], strict=True
    ):
        assert (int(label), box.tolist()) == (expected["label"], expected["box"])
        assert float(score) == pytest.approx(expected["score"], abs=2e-6)
        assert int(mask.sum()) == expected["area"]


def test_pictures_are_given_as_mmdet_gives_them():
    image = torch.randint(0, 256, (3, 50, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = prepare(image, short=70, long=120)
    assert given.inside == (60, 120) and given.pixels.shape == (1, 3, 64, 128)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = given.pixels[0] * std + mean
    assert torch.allclose(pixels[:, 60:], torch.tensor(PAD), atol=1e-3)
    assert torch.allclose(pixels[:, :, 120:], torch.tensor(PAD), atol=1e-3)
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)
    assert prepare(image).inside == (667, 1333)
    same = prepare(torch.full((3, 64, 64), 9, dtype=torch.uint8), 64, 64)
    assert torch.allclose(same.pixels * std + mean, torch.tensor(9.0), atol=1e-3)


# ---------------------------------------------------------------------------------------- a checkpoint of mmdet

WIDTHS, HEADS, WINDOW, HIDDEN, QUERIES = (8, 16, 32, 64), (1, 1, 2, 2), 7, 32, 5


def mmdet_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names that mmdet 2.27 gives a small Mask2Former with a Swin backbone."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = 0.1 * torch.randn(*shape, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def raw(name: str, *shape: int) -> None:
        state[name] = 0.1 * torch.randn(*shape, generator=generator)

    add("backbone.patch_embed.projection", WIDTHS[0], 3, 4, 4)
    add("backbone.patch_embed.norm", WIDTHS[0])
    for stage, (width, heads) in enumerate(zip(WIDTHS, HEADS, strict=True)):
        block = f"backbone.stages.{stage}.blocks.0"
        add(f"{block}.norm1", width)
        raw(f"{block}.attn.w_msa.relative_position_bias_table", (2 * WINDOW - 1) ** 2, heads)
        state[f"{block}.attn.w_msa.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.long)
        add(f"{block}.attn.w_msa.qkv", 3 * width, width)
        add(f"{block}.attn.w_msa.proj", width, width)
        add(f"{block}.norm2", width)
        add(f"{block}.ffn.layers.0.0", 4 * width, width)
        add(f"{block}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            add(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            add(f"backbone.stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        add(f"backbone.norm{stage}", width)
    pixel = "panoptic_head.pixel_decoder"
    for level, width in enumerate(reversed(WIDTHS[1:])):
        add(f"{pixel}.input_convs.{level}.conv", HIDDEN, width, 1, 1)
        add(f"{pixel}.input_convs.{level}.gn", HIDDEN)
    add(f"{pixel}.lateral_convs.0.conv", HIDDEN, WIDTHS[0], 1, 1, bias=False)
    add(f"{pixel}.lateral_convs.0.gn", HIDDEN)
    add(f"{pixel}.output_convs.0.conv", HIDDEN, HIDDEN, 3, 3, bias=False)
    add(f"{pixel}.output_convs.0.gn", HIDDEN)
    add(f"{pixel}.mask_feature", HIDDEN, HIDDEN, 1, 1)
    raw(f"{pixel}.level_encoding.weight", 3, HIDDEN)
    layer = f"{pixel}.encoder.layers.0"
    for name, size in (("sampling_offsets", 48), ("attention_weights", 24), ("value_proj", 32), ("output_proj", 32)):
        add(f"{layer}.attentions.0.{name}", size, HIDDEN)
    head = "panoptic_head.transformer_decoder"
    for index in range(2):
        for which in range(2):
            raw(f"{head}.layers.{index}.attentions.{which}.attn.in_proj_weight", 3 * HIDDEN, HIDDEN)
            raw(f"{head}.layers.{index}.attentions.{which}.attn.in_proj_bias", 3 * HIDDEN)
            add(f"{head}.layers.{index}.attentions.{which}.attn.out_proj", HIDDEN, HIDDEN)
    for block, norms in ((layer, 2), (f"{head}.layers.0", 3), (f"{head}.layers.1", 3)):
        add(f"{block}.ffns.0.layers.0.0", 48, HIDDEN)
        add(f"{block}.ffns.0.layers.1", HIDDEN, 48)
        for norm in range(norms):
            add(f"{block}.norms.{norm}", HIDDEN)
    add(f"{head}.post_norm", HIDDEN)
    for name, rows in (("query_embed", QUERIES), ("query_feat", QUERIES), ("level_embed", 3)):
        raw(f"panoptic_head.{name}.weight", rows, HIDDEN)
    add("panoptic_head.cls_embed", 81, HIDDEN)
    for index in (0, 2, 4):
        add(f"panoptic_head.mask_embed.{index}", HIDDEN, HIDDEN)
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmdet") / "tiny.pth"
    torch.save({"meta": {"CLASSES": ("person",)}, "state_dict": mmdet_state()}, path)
    return path.rename(path.with_name(f"tiny-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


def test_every_weight_finds_its_place(checkpoint: Path, tmp_path: Path):
    convert(Options(checkpoint, tmp_path / "folder"))
    network = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "folder")
    state, mine = mmdet_state(), dict(network.named_parameters())
    assert sum(value.numel() for value in mine.values()) - 2 * WIDTHS[-1] == sum(
        value.numel() for value in state.values() if value.is_floating_point()
    )
    detector = Mask2Former(tmp_path / "folder", short=64, long=96)
    assert detector.name == f"geneval (mmdet {checkpoint.stem.split('-')[1]} weights)"
    pictures = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, again = detector(pictures), detector(pictures[1:])
    assert [d.score for d in found[1]] == [d.score for d in again[0]] and len(found[0]) == 100
    assert found[0][0].mask is not None and found[0][0].mask.shape == (40, 60)


def test_patches_are_merged_as_mmdet_merges_them():
    """mmdet: nn.Unfold, norm, reduction; here Swin's own module gets the converted weights."""
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    channels, side = 5, 6
    norm, reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, channels, side, side)
    expected = reduction(norm(nn.Unfold(2, stride=2)(x).transpose(1, 2)))
    swin: Any = SwinPatchMerging(channels)
    swin.norm.load_state_dict({k: merged_in_transformers_order(v) for k, v in norm.state_dict().items()})
    swin.reduction.load_state_dict({"weight": merged_in_transformers_order(reduction.weight)})
    assert torch.allclose(swin(x.flatten(2).transpose(1, 2), (side, side)), expected, atol=1e-6)


def test_queries_keys_and_values_keep_their_order():
    state, found = mmdet_state(), converted(mmdet_state())
    qkv = state["backbone.stages.1.blocks.0.attn.w_msa.qkv.weight"]
    own = "model.pixel_level_module.encoder.encoder.layers.1.blocks.0.attention.self"
    assert all(
        torch.equal(found[f"{own}.{name}.weight"], qkv[16 * i : 16 * (i + 1)])
        for i, name in enumerate(("query", "key", "value"))
    )
    # mmdet's second attention of a layer is that of the queries among themselves
    packed = state["panoptic_head.transformer_decoder.layers.1.attentions.1.attn.in_proj_bias"]
    own = "model.transformer_module.decoder.layers.1.self_attn"
    assert torch.equal(torch.cat([found[f"{own}.{name}_proj.bias"] for name in "qkv"]), packed)
    config = config_of(state)
    assert (config.num_attention_heads, config.decoder_layers, config.backbone_config.window_size) == (2, 3, 7)


def test_other_files_are_refused(checkpoint: Path, tmp_path: Path):
    renamed = tmp_path / "tiny-00000000.pth"
    renamed.write_bytes(checkpoint.read_bytes())
    with pytest.raises(UserError, match="damaged"):
        convert(Options(renamed, tmp_path / "out"))
    torch.save({"state_dict": mmdet_state() | {"roi_head.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"roi_head\.weight"):
        convert(Options(tmp_path / "other.pth", tmp_path / "out"))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="no Mask2Former of mmdet"):
        convert(Options(tmp_path / "resnet.pth", tmp_path / "out"))
    incomplete = mmdet_state()
    del incomplete["panoptic_head.cls_embed.bias"]
    torch.save(incomplete, tmp_path / "incomplete.pth")
    with pytest.raises(UserError, match=r"class_predictor\.bias"):
        convert(Options(tmp_path / "incomplete.pth", tmp_path / "out"))
    torch.save({"state_dict": Path}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="without running code"):
        convert(Options(tmp_path / "code.pth", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Mask2Former(tmp_path)
