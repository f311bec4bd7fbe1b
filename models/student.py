"""The one-step student and its one-to-four-step sampler; the many-step sampler of its teacher."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser
from models.process import Process, expand_to


class Denoises(Protocol):
    """Anything that can be sampled from: a Denoiser, a guided or a reparameterised one."""

    process: Process

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...


class OneStepStudent(nn.Module):
    """``x0 = denoise(sigma(t_init) z, t_init, cond)`` with ``z ~ N(0, I)``.

    ``t_init`` need not be the process's last time: a lower one (EDM: sigma 2.5 instead of 80, as in SiD, arXiv
    2404.04057) starts the student nearer to its goal.
    """

    def __init__(self, denoiser: Denoiser, t_init: float):
        super().__init__()
        self.denoiser, self.t_init = denoiser, t_init

    def forward(self, z: Tensor, cond: Condition) -> Tensor:
        """Noise ``z`` (B, C, H, W) to samples of the same shape."""
        t = torch.full((len(z),), self.t_init, dtype=torch.float32, device=z.device)
        return self.denoiser.denoise(expand_to(self.denoiser.process.sigma(t), z) * z, t, cond)

    def generate(
        self, z: Tensor, cond: Condition, times: Sequence[float] = (), noise: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """One step, then one more for each of ``times``: noise the sample to that time afresh and denoise it.

        ``noise()`` gives fresh noise of z's shape (default: the global generator). ``times`` must fall.
        """
        ladder = [self.t_init, *times]
        if any(later >= earlier for earlier, later in zip(ladder, times, strict=False)):
            raise ValueError(f"step times must fall from t_init = {self.t_init}: got {list(times)}")
        x0 = self(z, cond)
        for time in times:
            t = torch.full((len(z),), time, dtype=torch.float32, device=z.device)
            fresh = noise() if noise else torch.randn_like(z)
            x0 = self.denoiser.denoise(self.denoiser.process.add_noise(x0, fresh, t), t, cond)
        return x0


@torch.no_grad()
def heun(denoiser: Denoises, z: Tensor, cond: Condition, steps: int) -> Tensor:
    """Heun's second-order sampler on the process's own grid (arXiv 2206.00364, Algorithm 1 without churn).

    ``z`` (B, C, H, W) is unit noise; ``2 steps - 1`` network calls; one step is a plain denoising at the highest noise.
    Written for any process through ``y = x / alpha`` as a function of ``rho = sigma / alpha``, where the ODE is
    ``dy/d rho = (y - x0) / rho``.
    """
    process = denoiser.process
    u = (
        torch.linspace(1, 0, steps, dtype=torch.float64, device=z.device)
        if steps > 1
        else torch.ones(1, device=z.device)
    )
    times = process.spaced(u.double())
    rhos = torch.cat([process.ratio(times), torch.zeros(1, dtype=torch.float64, device=z.device)])

    def slope(y: Tensor, index: int) -> Tensor:
        t = times[index].expand(len(y)).float()
        x0 = denoiser.denoise((process.alpha(times[index]) * y).float(), t, cond)
        return (y - x0) / rhos[index]

    y = rhos[0] * z.double()
    for i in range(steps):
        step = rhos[i + 1] - rhos[i]
        first = slope(y, i)
        proposal = y + step * first
        y = proposal if i == steps - 1 else y + step * (first + slope(proposal, i + 1)) / 2
    return y.to(z.dtype)
