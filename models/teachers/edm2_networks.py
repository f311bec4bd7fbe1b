"""The U-Net of EDM2 (Karras et al., arXiv 2312.02696), which keeps magnitudes. Needs torch and diffusers, nothing else.

Parameters have the names that published checkpoints give them. Calls are those of diffusers' UNet2DModel. Equation
numbers are the paper's.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F


def normalize(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """``x`` over its root mean square along ``dim``, plus 1e-4."""
    size = math.prod(x.shape[d] for d in ([dim] if isinstance(dim, int) else dim))
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + length / math.sqrt(size)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU with the variance of its input (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b`` with the variance of its inputs (Eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of both, which then weigh 1 - t and t whatever their number (Eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n) * a, scale * t / math.sqrt(m) * b], 1)


class MPFourier(nn.Module):
    """Random features of a number, stored with the weights (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, channels)."""
        return math.sqrt(2) * (t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)).cos()


class MPConv(nn.Module):
    """A convolution, or a linear layer with ``kernel`` 0, whose weights have unit length (Eqs. 47 and 66)."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *([kernel, kernel] if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = list(range(1, self.weight.ndim))
        if self.training:
            # Past autograd, which would take it for a change between two forward passes and their backward pass, and
            # past forward-mode differentiation, which refuses to write.
            with torch._C._DisableFuncTorch():
                self.weight.data.copy_(normalize(self.weight.detach(), dims))
        weight = normalize(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        if weight.ndim == 2:
            return x @ weight.to(x.dtype).T
        return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """A residual block with an embedding, then self-attention (Fig. 21); ``decoder``: of the decoder."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        decoder: bool,
        channels_per_head: int,
        dropout: float,
        res_balance: float,
        attn_balance: float,
        clip_act: float | None,
        resample: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.decoder, self.resample, self.dropout, self.clip_act = decoder, resample, dropout, clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.heads = outputs // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(inputs if decoder else outputs, outputs, 3)
        self.emb_linear = MPConv(embedding, outputs, 0)
        self.conv_res1 = MPConv(outputs, outputs, 3)
        self.conv_skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = MPConv(outputs, 3 * outputs, 1) if self.heads else None
        self.attn_proj = MPConv(outputs, outputs, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, inputs, H, W), ``emb`` (B, embedding)."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), 1)
        scale = self.emb_linear(emb, self.emb_gain) + 1
        h = mp_silu(self.conv_res0(mp_silu(x)) * scale[:, :, None, None])
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            parts = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)
            q, k, v = normalize(parts, 2).transpose(2, 4).unbind(3)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
            x = mp_sum(x, self.attn_proj(mixed), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


class EDM2UNet(ModelMixin, ConfigMixin):
    """Arguments are those of the checkpoints, whose class is called UNet."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        if list(resample_filter) != [1, 1]:
            raise ValueError(f"resample_filter {list(resample_filter)}: published checkpoints have [1, 1]")
        widths = [model_channels * m for m in channel_mult]
        noise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = MPFourier(noise), MPConv(noise, emb, 0)
        self.emb_label = MPConv(label_dim, emb, 0) if label_dim else None
        block = partial(
            Block,
            embedding=emb,
            channels_per_head=channels_per_head,
            dropout=dropout,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, skips = widths[0], []
        for level, channels in enumerate(widths):
            side = img_resolution >> level
            name = f"{side}x{side}"
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(img_channels + 1, width, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, decoder=False, resample="down")
            skips.append(width)
            for i in range(num_blocks):
                attention = side in attn_resolutions
                self.enc[f"{name}_block{i}"] = block(width, channels, decoder=False, attention=attention)
                width = channels
                skips.append(width)
        for level, channels in reversed(list(enumerate(widths))):
            side = img_resolution >> level
            name = f"{side}x{side}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(width, width, decoder=True, attention=True)
                self.dec[f"{name}_in1"] = block(width, width, decoder=True)
            else:
                self.dec[f"{name}_up"] = block(width, width, decoder=True, resample="up")
            for i in range(num_blocks + 1):
                inputs, attention = width + skips.pop(), side in attn_resolutions
                self.dec[f"{name}_block{i}"] = block(inputs, channels, decoder=True, attention=attention)
                width = channels
        self.out_conv = MPConv(width, img_channels, 3)

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, emb)  # type: ignore[operator]
        return block(x, emb)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """``sample`` (B, C, H, W), ``timestep`` (B,) = 250 ln(sigma), ``class_labels`` (B,) ids or none.

        An id outside of 0 .. label_dim - 1 is no class: zeros, as the checkpoints have it.
        """
        emb = self.emb_noise(self.emb_fourier(timestep / 1000).to(sample.dtype))
        if self.emb_label is not None:
            if class_labels is None:
                class_labels = timestep.new_full((len(sample),), -1, dtype=torch.long)
            hot = (class_labels[:, None] == torch.arange(self.label_dim, device=sample.device)).to(emb.dtype)
            emb = mp_sum(emb, self.emb_label(hot * math.sqrt(self.label_dim)), self.label_balance)
        emb = mp_silu(emb)
        x, skips = torch.cat([sample, torch.ones_like(sample[:, :1])], 1), []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("_conv") else self._run(block, x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = self._run(block, mp_cat(x, skips.pop(), self.concat_balance) if "_block" in name else x, emb)
        return UNet2DOutput(sample=self.out_conv(x, self.out_gain))
