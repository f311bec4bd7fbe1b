"""Any teacher as a TrigFlow network: its own prediction turned into F, exactly and without training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser, Guided, Reparameterized
from models.process import Process, TrigFlow, clamp_keeping_slope, expand_to


def trigflow_for(inner: Process, sigma_data: float = 0.5, data_scale: float = 1.0) -> TrigFlow:
    """TrigFlow at the noise levels that ``inner`` has.

    A discrete process ends at some finite sigma / alpha, 14.6 for Stable Diffusion, hence at ``t_max = atan(14.6)``
    with data_scale = sigma_data; behind it the network would be asked what it never learnt.
    """
    trig = TrigFlow(sigma_data, data_scale=data_scale)
    ends = inner.ratio(torch.tensor([inner.t_min, inner.t_max], dtype=torch.float64))
    first, last = trig.time_from_ratio(ends).tolist()
    return TrigFlow(sigma_data, max(trig.t_min, first), min(trig.t_max, last), data_scale)


class TrigFlowView(Reparameterized):
    """``F(x_t, t)`` with ``dx_t/dt = sigma_data F`` from a network of any kind, by the exact change of variables.

    With the teacher at ``y = L x_t`` of equal sigma / alpha, ``F = cos t eps - sin t (k / sigma_data) x0`` of what it
    says there; for a flow and k = sigma_data that is Prop. 3.1 of SANA-Sprint (arXiv 2503.09641),
    ``F = (1 - 2s) u + lambda v(lambda u, s)``, u = x_t / sigma_data. It holds for wrong predictions too: the solutions
    of both equations are the same curves.

    ``x_t = cos t k x0 + sin t z`` as :class:`models.process.TrigFlow` says, with ``data_scale`` k; x0 is in the units
    of the data. Differentiable by forward mode. The network is never asked outside its own noise levels: times behind
    ``process.t_max`` (so pi / 2) are that one, and F before ``process.t_min`` is that of t_min.
    """

    process: TrigFlow

    def __init__(self, denoiser: Denoiser | Guided, sigma_data: float = 0.5, data_scale: float = 1.0):
        super().__init__(denoiser, trigflow_for(denoiser.process, sigma_data, data_scale))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """F (B, C, H, W) at ``x_t`` (B, C, H, W) and ``t`` (B,), float32 or float64; lower times raise TypeError."""
        t = self._times(t).double()
        y, s = self._within(x_t, t)
        share = self.process.data_scale / self.process.sigma_data
        return self.denoiser.combination(y, s, cond, -share * t.sin(), t.cos())

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0 = (cos t x_t - sin t sigma_data F) / k in the units of the data; x_t / k at t = 0."""
        return self.x0_from(self.velocity(x_t, t, cond), x_t, t)

    def x0_from(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that F stands for: sCM's consistency function (arXiv 2410.11081, Eq. 5), in the units of the data."""
        t = clamp_keeping_slope(t.double(), 0, self.process.t_max)
        on_x, on_f = t.cos(), self.process.sigma_data * t.sin()
        x0 = expand_to(on_x, x_t).to(x_t.dtype) * x_t - expand_to(on_f, x_t).to(x_t.dtype) * velocity
        return x0 / self.process.data_scale

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str]) -> list[Tensor]:
        """As :meth:`Denoiser.features`."""
        return super().features(x_t, self._times(t), cond, taps)

    forward = denoise

    def _times(self, t: Tensor) -> Tensor:
        """In bfloat16 there is no time between 1.5625 and pi / 2: noise levels would be wrong by factors."""
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"times are float32 or float64, got {t.dtype}")
        return clamp_keeping_slope(t, self.process.t_min, self.process.t_max)


class LogVariance(nn.Module):
    """``nu(t)`` of sCM's adaptive weighting ``w e^-nu |.|^2 + nu`` (arXiv 2410.11081, Sec. 4.2), bounded below.

    At its optimum ``e^nu = w E|g|^2``, so as the student improves the weight would grow without end and keep the
    gradient's size: the training never settles. ``floor`` ends that; ``distill.consistency_losses.nu_floor`` gives it.
    A smooth function of log tan t, 0 at first.
    """

    WAVES = 16

    def __init__(self, floor: float):
        super().__init__()
        self.floor = floor
        self.linear = nn.Linear(self.WAVES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) for times (B,) between 0 and pi / 2."""
        place = (t.tan().log().clamp(-8, 8) + 8) / 16
        waves = (math.pi * place[:, None] * torch.arange(1, self.WAVES + 1, device=t.device)).cos()
        return self.floor + nn.functional.softplus(self.linear(waves.to(self.linear.weight.dtype))[:, 0] - self.floor)


class FlowStudent(nn.Module):
    """What a consistency run trains: F of a TrigFlow view, and ``nu`` if the weighting is adaptive."""

    def __init__(self, view: TrigFlowView, log_variance: LogVariance | None = None):
        super().__init__()
        self.view, self.log_variance = view, log_variance

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """F (B, C, H, W) and nu (B,) or None."""
        return self.view.velocity(x_t, t, cond), self.log_variance(t) if self.log_variance else None
