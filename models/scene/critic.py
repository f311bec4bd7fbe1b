"""The fake score of VSD: the teacher with low-rank adapters and a camera embedding (arXiv 2305.16213, Sec. 3.2).

The adapters are forward hooks on the frozen network's own layers, so teacher and critic are one network in memory: the
hooks add nothing but while the critic itself is asked. Nothing switches ``requires_grad``.
"""

import math
import re

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError

TARGETS = r"\.to_(q|k|v|out\.0)$"
"""Layers with adapters: the projections of every self- and cross-attention."""


class LoRACritic(nn.Module):
    """``critic(x_t, t, cond) -> x0`` with the camera in ``cond.camera`` (B, 16); zeros are 'no camera'.

    Whatever words for a view ``cond`` has, the text is ``prompt``, a Condition of one row. Its parameters are the adapters and the camera embedding alone; before any training it is the base denoiser.
    """

    def __init__(self, base: Denoiser, prompt: Condition, rank: int = 4):
        super().__init__()
        self._base = (base,)  # a tuple: no submodule, whose parameters would be trained and saved
        self._camera: Tensor | None = None
        self._prompt = prompt
        self._active = False
        layers = {name: layer for name, layer in base.network.named_modules() if re.search(TARGETS, f".{name}")}
        layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        times = [layer for layer in base.network.modules() if isinstance(layer, TimestepEmbedding)]
        if not layers or not times:
            raise UserError("method.critic: this teacher has no attention or no time embedding that an adapter fits")
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in layers.items():
            key = name.replace(".", "/")
            self.down[key] = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
            self.up[key] = nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(self._adapter(key))
        width = times[0].linear_2.out_features
        self.camera = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.camera[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.camera[2].bias)  # type: ignore[arg-type]
        times[0].register_forward_hook(self._camera_hook)

    def _adapter(self, key: str):
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            return output + F.linear(F.linear(inputs[0], self.down[key]), self.up[key])

        return add

    def _camera_hook(self, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._camera is None:
            return None
        return output + self.camera(self._camera.to(output.dtype))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The mean of x0 (B, C, H, W) among the particles' pictures from that camera."""
        own = Condition.cat([self._prompt] * len(x_t)).to(x_t.device)
        self._active, self._camera = True, cond.camera
        try:
            return self._base[0].denoise(x_t, t, own)
        finally:
            self._active, self._camera = False, None
