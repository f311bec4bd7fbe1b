"""Discriminator heads on features of a frozen network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError


class Head(nn.Module):
    """Logits from one feature map (B, C, H, W): a small convolutional network, its output map averaged to (B,)."""

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
def feature_channels(denoiser: Denoiser, taps: Sequence[str], shape: tuple[int, int, int]) -> list[int]:
    """Channels of each tapped feature, in order of execution, found by one pass with a picture of ``shape``."""
    try:
        time = torch.full((1,), denoiser.process.t_max)
        features = denoiser.features(torch.zeros(1, *shape), time, Condition(class_ids=torch.zeros(1).long()), taps)
    except ValueError as error:
        raise UserError(f"method.gan.taps: {error}") from error
    return [feature.shape[1] for feature in features]
