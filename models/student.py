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
    For any process: x moves with alpha and sigma, ``dx = x0 d alpha + eps d sigma``, which for EDM is the paper's own
    step and stays finite where alpha goes to 0.
    """
    process = denoiser.process
    times = process.spaced(torch.linspace(1, 0, steps, dtype=torch.float64, device=z.device))
    end = times.new_ones(1)
    alphas = torch.cat([process.alpha(times), end])
    sigmas = torch.cat([process.sigma(times), 0 * end])

    def parts(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """x0 and eps at the i-th time."""
        x0 = denoiser.denoise(x.to(z.dtype), times[i].expand(len(x)).float(), cond).double()
        return x0, (x - alphas[i] * x0) / sigmas[i]

    x = sigmas[0] * z.double()
    for i in range(steps):
        x0, eps = parts(x, i)
        if i == steps - 1:
            return (alphas[i + 1] * x0).to(z.dtype)
        later_x0, later_eps = parts(alphas[i + 1] * x0 + sigmas[i + 1] * eps, i + 1)
        x = x + (alphas[i + 1] - alphas[i]) * (x0 + later_x0) / 2 + (sigmas[i + 1] - sigmas[i]) * (eps + later_eps) / 2
    raise ValueError(f"steps must be at least 1, got {steps}")
