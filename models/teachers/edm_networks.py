"""The U-Nets of EDM (Karras et al., arXiv 2206.00364): DDPM++, NCSN++ and ADM. Needs torch and diffusers, nothing else.

Parameters have the names that published checkpoints give them. Calls are those of diffusers' UNet2DModel.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F


class ResampledConv(nn.Module):
    """A resolution halved or doubled by a separable filter, then a convolution; ``kernel`` 0: no convolution.

    ``fused``: the convolution comes first, at the full resolution and with one border for both, as NCSN++ has it.
    """

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, up: bool, taps: Sequence[float], fused: bool = False
    ) -> None:
        super().__init__()
        self.up, self.fused, self.channels = up, fused, outputs if fused else inputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if kernel else None
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, math.sqrt(5))
        line = torch.tensor(taps, dtype=torch.float32)
        line = line / line.sum()
        self.register_buffer("resample_filter", line.outer(line)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, 2 H, 2 W) or (B, outputs, H / 2, W / 2)."""
        taps = self.resample_filter.to(x.dtype).expand(self.channels, -1, -1, -1)
        border = (taps.shape[-1] - 1) // 2
        resample = partial(F.conv2d, weight=taps, stride=2, groups=self.channels)
        if self.up:
            resample = partial(F.conv_transpose2d, weight=4 * taps, stride=2, groups=self.channels)
        if self.weight is None:
            return resample(x, padding=border)
        around = self.weight.shape[-1] // 2
        if self.fused:
            return resample(F.conv2d(x, self.weight, self.bias, padding=around + border))
        return F.conv2d(resample(x, padding=border), self.weight, self.bias, padding=around)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class UNetBlock(nn.Module):
    """A residual block with an embedding, then self-attention where it has ``heads``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        heads: int | None,
        dropout: float,
        skip_scale: float,
        eps: float,
        taps: Sequence[float],
        project: bool,
        scale_shift: bool,
        resample: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.skip_scale, self.scale_shift = dropout, skip_scale, scale_shift
        self.heads = (outputs // 64 if heads is None else heads) if attention else 0

        def conv(kernel: int) -> nn.Module:
            if resample is None:
                return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            return ResampledConv(inputs, outputs, kernel, resample == "up", taps)

        self.norm0, self.conv0 = group_norm(inputs, eps), conv(3)
        self.affine = nn.Linear(embedding, outputs * (2 if scale_shift else 1))
        self.norm1, self.conv1 = group_norm(outputs, eps), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = None
        if resample is not None or inputs != outputs:
            self.skip = conv(1 if project or inputs != outputs else 0)
        if self.heads:
            self.norm2 = group_norm(outputs, eps)
            self.qkv, self.proj = nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, inputs, H, W), ``emb`` (B, embedding)."""
        h = self.conv0(F.silu(self.norm0(x)))
        added = self.affine(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = added.chunk(2, 1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + added)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if not self.heads:
            return x
        q, k, v = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4).transpose(2, 4).unbind(3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return (self.proj(mixed) + x) * self.skip_scale


class FourierEmbedding(nn.Module):
    """Random frequencies, stored with the weights."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, t: Tensor) -> Tensor:
        return 2 * math.pi * self.freqs.to(t.dtype)


class PositionalEmbedding(nn.Module):
    """Frequencies from 1 down to 1 / 10000; ``endpoint``: the last one is that."""

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.count, self.endpoint = channels // 2, endpoint

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.count, dtype=t.dtype, device=t.device)
        return (1 / 10000) ** (steps / (self.count - self.endpoint))


def one_hot(labels: Tensor | None, count: int, like: Tensor) -> Tensor:
    """Class ids (B,) to (B, count); one outside of 0 .. count - 1, or None, is no class: a row of zeros."""
    if labels is None:
        return like.new_zeros(len(like), count)
    return (labels[:, None] == torch.arange(count, device=labels.device)).to(like.dtype)


class _UNet(ModelMixin, ConfigMixin):
    """What both have: the encoder, the decoder, and how they are run."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def _build(
        self,
        block: Callable[..., UNetBlock],
        resolution: int,
        inputs: int,
        first: int,
        widths: Sequence[int],
        num_blocks: int,
        attends: Callable[[int, bool], bool],
        residual: Sequence[float] | None = None,
    ) -> int:
        """Fills ``enc`` and ``dec``; returns the channels of the last block.

        ``attends(resolution, last)``: whether a decoder block has attention, an encoder block being always ``last``.
        ``residual``: filter of a shrinking copy of the input that is added at each level.
        """
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, copy, skips = first, inputs, []
        for level, channels in enumerate(widths):
            side = resolution >> level
            name = f"{side}x{side}"
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(inputs, first, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = block(width, width, resample="down")
                if residual:
                    self.enc[f"{name}_aux_residual"] = ResampledConv(copy, width, 3, False, residual, fused=True)
                    copy = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(width, channels, attention=attends(side, True))
                width = channels
                skips.append(width)
        for level, channels in reversed(list(enumerate(widths))):
            side = resolution >> level
            name = f"{side}x{side}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, resample="up")
            for i in range(num_blocks + 1):
                attention = attends(side, i == num_blocks)
                self.dec[f"{name}_block{i}"] = block(width + skips.pop(), channels, attention=attention)
                width = channels
        return width

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, emb)  # type: ignore[operator]
        return block(x, emb)

    def _body(self, x: Tensor, emb: Tensor) -> Tensor:
        """Encoder and decoder, without the last normalisation and convolution."""
        skips, copy = [], x
        for name, block in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = copy = (x + block(copy)) / math.sqrt(2)
            else:
                x = block(x) if name.endswith("_conv") else self._run(block, x, emb)
                skips.append(x)
        for name, block in self.dec.items():
            if "_aux_" in name:
                break
            x = self._run(block, torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x


class SongUNet(_UNet):
    """DDPM++ (``positional``, ``standard``, [1, 1]) and NCSN++ (``fourier``, ``residual``, [1, 3, 3, 1]).

    Arguments are those of the checkpoints. ``augment_dim``: size of augmentation labels, which are zero here.
    ``label_dropout`` is only kept: who trains drops conditions.
    """

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        if embedding_type not in ("positional", "fourier"):
            raise ValueError(f"embedding_type {embedding_type}: published checkpoints have positional or fourier")
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise ValueError(f"encoder {encoder_type}, decoder {decoder_type}: no published checkpoint has these")
        noise, emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise, endpoint=True) if positional else FourierEmbedding(noise)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        block = partial(
            UNetBlock,
            embedding=emb,
            heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            taps=resample_filter,
            project=True,
            scale_shift=False,
        )
        last = self._build(
            block,
            img_resolution,
            in_channels,
            model_channels,
            [model_channels * m for m in channel_mult],
            num_blocks,
            lambda side, final: final and side in attn_resolutions,
            resample_filter if encoder_type == "residual" else None,
        )
        name = f"{img_resolution}x{img_resolution}"
        self.dec[f"{name}_aux_norm"] = group_norm(last, 1e-6)
        self.dec[f"{name}_aux_conv"] = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """``sample`` (B, C, H, W), ``timestep`` (B,) = 250 ln(sigma), ``class_labels`` (B,) ids or none."""
        t = timestep / 1000
        angles = t[:, None] * self.map_noise(t)
        emb = torch.cat([angles.sin(), angles.cos()], 1).to(sample.dtype)
        if self.map_label is not None:
            count = self.map_label.in_features
            emb = emb + self.map_label(one_hot(class_labels, count, emb) * math.sqrt(count))
        if self.map_augment is not None:  # its weights take part in every step, as data-parallel training wants it
            emb = emb + self.map_augment(emb.new_zeros(len(emb), self.map_augment.in_features))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        norm, conv = list(self.dec.values())[-2:]
        return UNet2DOutput(sample=conv(F.silu(norm(self._body(sample, emb)))))


class DhariwalUNet(_UNet):
    """ADM (Dhariwal and Nichol, arXiv 2105.05233). Arguments as of :class:`SongUNet`."""

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0,
    ) -> None:
        super().__init__()
        emb = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        block = partial(
            UNetBlock,
            embedding=emb,
            heads=None,
            dropout=dropout,
            skip_scale=1.0,
            eps=1e-5,
            taps=(1, 1),
            project=False,
            scale_shift=True,
        )
        widths = [model_channels * m for m in channel_mult]
        attends = lambda side, _final: side in attn_resolutions
        last = self._build(block, img_resolution, in_channels, widths[0], widths, num_blocks, attends)
        self.out_norm, self.out_conv = group_norm(last, 1e-5), nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """As :meth:`SongUNet.forward`."""
        t = timestep / 1000
        angles = t[:, None] * self.map_noise(t)
        emb = torch.cat([angles.cos(), angles.sin()], 1).to(sample.dtype)
        if self.map_augment is not None:
            emb = emb + self.map_augment(emb.new_zeros(len(emb), self.map_augment.in_features))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(one_hot(class_labels, self.map_label.in_features, emb))
        return UNet2DOutput(sample=self.out_conv(F.silu(self.out_norm(self._body(sample, F.silu(emb))))))
