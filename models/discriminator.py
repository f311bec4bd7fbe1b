"""Discriminator heads on features of a frozen network."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError


class Head(nn.Module):
    """Logits from one feature map: a small convolutional network, its output map averaged to (B,).

    The map is (B, C, H, W), or the tokens (B, N, C) of a square one; of any other number they are one long line.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        groups = max(1, width // 8)  # of 8 channels: on a 1 x 1 map a group of one channel would be a constant
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        if feature.ndim == 3:
            side = math.isqrt(feature.shape[1])
            height = side if side**2 == feature.shape[1] else feature.shape[1]
            feature = feature.transpose(1, 2).unflatten(2, (height, -1))
        return self.layers(feature).mean((1, 2, 3))


class Discriminator(nn.Module):
    """One head per tapped feature; the logit is the heads' mean, at its optimum ``log q_t(x_t) / p_t(x_t)``.

    Text and noise level enter through the frozen network whose features these are (DMD2, arXiv 2405.14867, Sec. 4.3;
    f-distill, arXiv 2502.15681, Sec. 4).
    """

    def __init__(self, channels: Sequence[int], width: int = 128):
        super().__init__()
        self.heads = nn.ModuleList(Head(c, width) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, one (B, C_i, H_i, W_i) per head, to logits (B,) in float32 or better."""
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0).to(torch.promote_types(logits[0].dtype, torch.float32))


@torch.no_grad()
def feature_channels(
    denoiser: Denoiser, taps: Sequence[str], shape: tuple[int, int, int], cond: Condition | None = None
) -> list[int]:
    """Channels of each tapped feature, in order of execution, found by one pass with an x0 of ``shape``.

    ``cond`` is one condition; None: class 0.
    """
    cond = Condition(class_ids=torch.zeros(1).long()) if cond is None else cond
    try:
        time = torch.full((1,), denoiser.process.t_max)
        features = denoiser.features(torch.zeros(1, *shape), time, cond, taps)
    except ValueError as error:
        raise UserError(f"method.gan.taps: {error}") from error
    return [feature.shape[1 if feature.ndim == 4 else 2] for feature in features]


class TokenHead(nn.Module):
    """Logits (B, N) from tokens (B, N, C) or a map (B, C, H, W) read row by row: LADD's head as in SANA-Sprint.

    One-dimensional convolutions with spectral norm, as in StyleGAN-T; normalised by groups within a sample, not over
    virtual batches, so that a picture's logits do not depend on its neighbours, the batch size or the processes.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        conv = lambda inputs, outputs, size: spectral_norm(
            nn.Conv1d(inputs, outputs, size, padding=size // 2, padding_mode="circular")
        )
        block = lambda inputs, size: nn.Sequential(
            conv(inputs, width, size), nn.GroupNorm(max(1, width // 8), width), nn.LeakyReLU(0.2)
        )
        self.enter, self.residual, self.leave = block(channels, 1), block(width, 9), conv(width, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        x = self.enter(feature.flatten(2) if feature.ndim == 4 else feature.transpose(1, 2))
        return self.leave((x + self.residual(x)) / math.sqrt(2)).squeeze(1)


class TokenDiscriminator(nn.Module):
    """One :class:`TokenHead` per tapped feature: logits (B, K) of all heads and places, K the number of tokens in all.

    Text and noise level enter through the frozen network whose features these are (SANA-Sprint, arXiv 2503.09641,
    Sec. 3.3). ``width`` None: as wide as the feature.
    """

    def __init__(self, channels: Sequence[int], width: int | None = None):
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(c, width or c) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, one (B, N_i, C_i) or (B, C_i, H_i, W_i) per head; float32 or better."""
        logits = torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
