"""Sketches as a condition: edges of pictures, and the branch that tells a Sana transformer of them.

After ControlNet (arXiv 2302.05543) and Sana's (diffusers' SanaControlNetModel, which has neither QK norm nor a guidance
embedding and so holds no copy of a one-step student's blocks). The lines enter by folding their pixels into channels,
not through the autoencoder: nothing of them is lost, and a frame saves a pass.
"""

import copy
import inspect
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, SanaTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from models.seeds import Draws

NOTHING = -1.0
"""Value of an empty canvas; lines are 1."""


def _grow(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask, 3, 1, 1)


@torch.no_grad()
def edges(pictures: Tensor, low: float = 0.08, high: float = 0.2) -> Tensor:
    """Lines (B, 1, H, W), 1 on -1, one pixel wide, where pictures (B, C, H, W) in [-1, 1] change.

    Canny's: blur, Scharr's gradient of the colour channel that changes most, thinning across the edge, and hysteresis:
    gradients above ``high`` of a picture's own largest (in its 99.5th percentile) and what hangs on to them above
    ``low``. A picture without contrast has no lines.
    """
    b, c, h, w = pictures.shape
    binomial = pictures.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    scharr, smooth = pictures.new_tensor([-0.5, 0.0, 0.5]), pictures.new_tensor([3.0, 10.0, 3.0]) / 16
    x = F.pad(pictures.reshape(b * c, 1, h, w).float(), (3, 3, 3, 3), "replicate")
    x = F.conv2d(F.conv2d(x, binomial.view(1, 1, 1, 5)), binomial.view(1, 1, 5, 1))
    across = F.conv2d(F.conv2d(x, scharr.view(1, 1, 1, 3)), smooth.view(1, 1, 3, 1)).view(b, c, h, w)
    down = F.conv2d(F.conv2d(x, smooth.view(1, 1, 1, 3)), scharr.view(1, 1, 3, 1)).view(b, c, h, w)
    strongest = (across.square() + down.square()).argmax(1, keepdim=True)
    gx, gy = across.gather(1, strongest), down.gather(1, strongest)
    size = (gx.square() + gy.square()).sqrt()

    # thinning: a line is where the gradient is at least that of both neighbours in its own direction, in 8 directions
    padded = F.pad(size, (1, 1, 1, 1))
    at = lambda dy, dx: padded[..., 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]
    sector = ((torch.atan2(gy, gx) / (torch.pi / 4)).round().long()) % 4
    ahead = torch.stack([at(0, 1), at(1, 1), at(1, 0), at(1, -1)]).gather(0, sector[None])[0]
    behind = torch.stack([at(0, -1), at(-1, -1), at(-1, 0), at(-1, 1)]).gather(0, sector[None])[0]
    thin = (size > ahead) & (size >= behind)

    largest = size.flatten(1).quantile(0.995, dim=1).clamp_min(0.05).view(b, 1, 1, 1)
    weak, line = (thin & (size > low * largest)).float(), (thin & (size > high * largest)).float()
    for _ in range(max(h, w) // 4):
        grown = _grow(line) * weak
        if torch.equal(grown, line):
            break
        line = grown
    return 2 * line - 1


def roughened(control: Tensor, draws: Draws) -> Tensor:
    """Lines as a hand draws them: some thicker, some with a gap, some canvases empty. For training."""
    b, _, h, w = control.shape
    thick, gap, empty = (draws.uniform().view(-1, 1, 1, 1) for _ in range(3))
    control = torch.where(thick < 0.5, _grow(control), control)
    centre_y, centre_x, radius = (draws.uniform().view(-1, 1, 1) for _ in range(3))
    y, x = torch.meshgrid(
        torch.linspace(0, 1, h, device=control.device), torch.linspace(0, 1, w, device=control.device), indexing="ij"
    )
    hole = (y - centre_y).square() + (x - centre_x).square() < (0.15 * radius).square()
    control = control.masked_fill(hole.view(b, 1, h, w) & (gap < 0.5), NOTHING)
    return control.masked_fill(empty < 0.1, NOTHING)


class SanaControlBranch(ModelMixin, ConfigMixin):
    """Copies of a transformer's first blocks, which see the lines too; their outputs are added to those of its own.

    Projections in and out start at zero: at first the transformer says what it said without the branch.

    blocks:  number of copied blocks
    factor:  pixels of the lines to a token, in each direction
    block:   arguments of SanaTransformerBlock
    """

    @register_to_config
    def __init__(self, blocks: int, factor: int, block: dict[str, Any]):
        super().__init__()
        width = block["dim"]
        self.enter = nn.Linear(factor * factor, width)
        self.copies = nn.ModuleList(SanaTransformerBlock(**block) for _ in range(blocks))
        self.leave = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        for linear in (self.enter, *self.leave):
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def of(cls, transformer: SanaTransformer2DModel, blocks: int, factor: int) -> "SanaControlBranch":
        """A branch for ``transformer``; ValueError if it has not more than ``blocks`` blocks."""
        own = transformer.config
        if not 0 < blocks < own["num_layers"]:
            raise ValueError(
                f"a branch of {blocks} blocks needs a transformer of more, this one has {own['num_layers']}"
            )
        names = set(inspect.signature(SanaTransformerBlock).parameters) & set(own)
        width = own["num_attention_heads"] * own["attention_head_dim"]
        branch = cls(blocks, factor * own["patch_size"], {"dim": width} | {name: own[name] for name in sorted(names)})
        for mine, theirs in zip(branch.copies, transformer.transformer_blocks, strict=False):  # type: ignore[arg-type]
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        return branch

    def forward(
        self,
        transformer: SanaTransformer2DModel,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        control: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the blocks of ``transformer`` are to add, with its own embeddings of ``x`` (B, C, H, W), time and text.

        control: (B, 1, factor H, factor W)
        """
        parts: Any = transformer
        factor = self.config["factor"]
        height, width = x.shape[-2] // parts.config.patch_size, x.shape[-1] // parts.config.patch_size
        if control.shape[1:] != (1, factor * height, factor * width):
            raise ValueError(f"control of {tuple(control.shape[1:])}, not {(1, factor * height, factor * width)}")
        tokens = parts.patch_embed(x)
        told: dict[str, Any] = {"batch_size": len(x)} if guidance is None else {"guidance": guidance}
        modulation, _ = parts.time_embed(timestep, hidden_dtype=tokens.dtype, **told)
        text = parts.caption_norm(parts.caption_projection(text))
        bias = ((1 - text_mask.to(x.dtype)) * -10000.0).unsqueeze(1)
        lines = F.pixel_unshuffle((control.to(x.dtype) + 1) / 2, factor).flatten(2).transpose(1, 2)
        tokens = tokens + self.enter(lines)
        outputs = []
        for block, leave in zip(self.copies, self.leave, strict=True):
            tokens = block(tokens, None, text, bias, modulation, height, width)
            outputs.append(leave(tokens))
        return tuple(outputs)


class BranchAlone(nn.Module):
    """A denoiser of which only the control branch is trained: no other parameter is this module's."""

    def __init__(self, denoiser: nn.Module, branch: SanaControlBranch):
        super().__init__()
        self.branch = branch
        self._denoiser = (denoiser,)

    def forward(self, *args: Any) -> Tensor:
        return self._denoiser[0](*args)
