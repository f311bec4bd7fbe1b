"""The fake score of VSD: the teacher with low-rank adapters and a camera embedding (arXiv 2305.16213, Sec. 3.2); and a
discriminator that knows the camera, for the divergences that need a density ratio."""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from models.adapters import Adapted
from models.condition import Condition
from models.denoiser import Denoiser, Reparameterized
from models.discriminator import Discriminator
from models.errors import UserError
from models.process import Process


class LoRACritic(nn.Module):
    """``critic(x_t, t, cond) -> x0`` with the camera in ``cond.camera`` (B, 16); zeros are 'no camera'.

    Whatever words for a view ``cond`` has, the text is ``prompt``, a Condition of one row. Its parameters are the
    adapters and the camera embedding alone, which is added to that of the time; before any training it is the base
    denoiser. ``base`` stays in use as the teacher. x_t and t are of ``process``, None: the base's own.
    """

    def __init__(self, base: Denoiser, prompt: Condition, rank: int = 4, process: Process | None = None):
        super().__init__()
        times = [layer for layer in base.network.modules() if isinstance(layer, TimestepEmbedding)]
        if not times:
            raise UserError("method.critic: this teacher has no time embedding that a camera's could be added to")
        self.adapted = Adapted(base.network, "camera", rank)
        own = Denoiser(self.adapted, base.process, base.prediction, base.sigma_data)
        self.process = process or base.process
        self._denoiser = own, own if process is None else Reparameterized(own, process)  # not sub-modules
        self._prompt, self._camera = prompt, torch.empty(0)
        width = times[0].linear_2.out_features
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.camera = nn.Sequential(nn.Linear(16, width), nn.SiLU(), last)
        times[0].register_forward_hook(self._add_camera)

    @property
    def base(self) -> Denoiser:
        """The network with the adapters, frozen but for them."""
        return self._denoiser[0]

    def _add_camera(self, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Of the time embedding; nothing while the teacher is asked."""
        return output + self.camera(self._camera).to(output.dtype) if len(self._camera) else None

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The mean of x0 (B, C, H, W) among the particles' pictures from that camera."""
        if cond.camera is None:
            raise ValueError("this critic is conditional on the camera: the condition has none")
        prompt = Condition.cat([self._prompt] * len(x_t)).to(x_t.device)
        self._camera = cond.camera
        try:
            return self._denoiser[1].denoise(x_t, t, prompt)
        finally:
            self._camera = torch.empty(0)


class CameraFeatures(Denoiser):
    """A denoiser whose features end with the condition's camera (B, 16)."""

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str]) -> list[Tensor]:
        return [*super().features(x_t, t, cond, taps), self._camera(cond)]

    def denoise_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str], through: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x0, features = super().denoise_and_features(x_t, t, cond, taps, through)
        return x0, [*features, self._camera(cond)]

    @staticmethod
    def _camera(cond: Condition) -> Tensor:
        if cond.camera is None:
            raise ValueError("the condition has no camera")
        return cond.camera


class CameraDiscriminator(Discriminator):
    """Heads on a teacher's features and, by projection (arXiv 1802.05637), on the camera.

    At its optimum the logit (B,) is ``log q_t(x_t | view's words) / p_t(x_t | camera)``. Reads what
    :class:`CameraFeatures` gives.
    """

    def __init__(self, channels: Sequence[int], width: int = 64):
        super().__init__(channels, width)
        self.projections = nn.ModuleList(nn.Linear(16, c) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *features, camera = features
        logits = super().forward(features)
        for feature, projection in zip(features, self.projections, strict=True):
            pooled = feature.flatten(2).mean(2) if feature.ndim == 4 else feature.mean(1)
            logits = logits + (projection(camera) * pooled).mean(1) / len(features)
        return logits
