"""The one-step student and its one-to-four-step sampler; the many-step sampler of its teacher."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.denoiser import Denoiser
from models.process import Process, expand_to


class Denoises(Protocol):
    """Anything that can be sampled from: a Denoiser, a guided or a reparameterised one."""

    @property
    def process(self) -> Process: ...

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...


class _Clip(torch.autograd.Function):
    """``clamp(x, -1, 1)`` that lets a gradient through where it leads back into the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outwards = ((x > 1) & (grad < 0)) | ((x < -1) & (grad > 0))  # a descent goes against the gradient
        return grad.masked_fill(outwards, 0)


class OneStepStudent(nn.Module):
    """``x0 = denoise(sigma(t_init) z, t_init, cond)`` with ``z ~ N(0, I)``.

    ``t_init`` need not be the process's last time: a lower one (EDM: sigma 2.5 instead of 80, as in SiD, arXiv
    2404.04057) starts the student nearer to its goal.

    ``clip``: samples are pictures in [-1, 1] and are clipped to it, as a viewer will. Half of the noise that one step
    leaves on a black background then vanishes, and the student can hide the other half by aiming below black.

    ``unit_noise``: the network sees z itself in the place of ``sigma(t_init) z``, as stock schedulers begin.
    """

    def __init__(self, denoiser: Denoiser, t_init: float, clip: bool = False, unit_noise: bool = False):
        super().__init__()
        self.denoiser, self.t_init, self.clip, self.unit_noise = denoiser, t_init, clip, unit_noise

    def forward(self, x: Tensor, cond: Condition, t: Tensor | None = None) -> Tensor:
        """Unit noise ``x`` (B, C, H, W) to samples of that shape; with times ``t`` (B,), pictures noised to them."""
        if t is None:
            t = torch.full((len(x),), self.t_init, dtype=torch.float32, device=x.device)
            x = x if self.unit_noise else expand_to(self.denoiser.process.sigma(t), x) * x
        x0 = self.denoiser.denoise(x, t, cond)
        return _Clip.apply(x0) if self.clip else x0  # type: ignore[no-any-return]

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
            x0 = self(self.denoiser.process.add_noise(x0, fresh, t), cond, t)
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
