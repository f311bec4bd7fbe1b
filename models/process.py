"""Noise processes: ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps ~ N(0, I)``.

Every process maps a time to ``(alpha, sigma)`` and back from the noise-to-signal ratio ``sigma / alpha``, which is what
two processes have in common: equal ratios are equal noise levels, and converting between processes is an exact change
of variables (SANA-Sprint, arXiv 2503.09641, Prop. 3.1). Times are float32 or float64, never lower.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand_to(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions to ``values`` (B,) until it broadcasts against ``like`` (B, ...)."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def clamp_keeping_slope(values: Tensor, low: float, high: float) -> Tensor:
    """``clamp`` whose derivative is 1 everywhere: a time at the end of its range must not lose its tangent."""
    return values.detach().clamp(low, high) + (values - values.detach())


class Process(ABC):
    """A Gaussian noise process. All methods take and return tensors of shape (B,) unless said otherwise.

    ``t_min`` and ``t_max`` bound the times at which a network trained under this process may be asked.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at time ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at time ``t``."""

    @abstractmethod
    def time_from_ratio(self, ratio: Tensor) -> Tensor:
        """The time whose ``sigma / alpha`` equals ``ratio``; inverse of ``ratio``."""

    @abstractmethod
    def spaced(self, u: Tensor) -> Tensor:
        """Time at position ``u`` in [0, 1] of the process's customary grid: 0 gives ``t_min``, 1 gives ``t_max``."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio ``sigma(t) / alpha(t)``; its square is 1 / SNR."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha(t) x0 + sigma(t) noise`` for ``x0``, ``noise`` (B, ...) and ``t`` (B,)."""
        alpha, sigma = expand_to(self.alpha(t), x0), expand_to(self.sigma(t), x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)


class EDM(Process):
    """Variance exploding, time equals sigma (Karras et al. 2022, arXiv 2206.00364): ``x_t = x0 + t eps``."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.t_min, self.t_max, self.rho = sigma_min, sigma_max, rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_from_ratio(self, ratio: Tensor) -> Tensor:
        return ratio

    def spaced(self, u: Tensor) -> Tensor:
        """Eq. 5 of the paper, ascending."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho


class DiscreteVP(Process):
    """Variance preserving with a table of ``alphas_cumprod`` (N,), as DDPM and Stable Diffusion have it.

    Time is the table's index, 0 to N-1, and may lie between entries: ``log(sigma / alpha)`` is interpolated linearly
    there, so the map is differentiable and its inverse exact.
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = alphas_cumprod.detach().to(torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod must be a vector of at least two values strictly between 0 and 1")
        self.log_ratios = 0.5 * (torch.log1p(-table) - table.log())
        if not bool((self.log_ratios.diff() > 0).all()):
            raise ValueError("alphas_cumprod must fall strictly from entry to entry")
        self.t_min, self.t_max = 0.0, float(len(table) - 1)

    def log_ratio(self, t: Tensor) -> Tensor:
        """``log(sigma / alpha)`` at index ``t``."""
        table = self.log_ratios.to(t.device)
        t = clamp_keeping_slope(t, self.t_min, self.t_max)
        low = t.detach().floor().clamp(max=self.t_max - 1).long()
        return (table[low] + (t - low) * (table[low + 1] - table[low])).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self.log_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.log_ratio(t)).sqrt()

    def time_from_ratio(self, ratio: Tensor) -> Tensor:
        table = self.log_ratios.to(ratio.device)
        target = ratio.double().log()
        low = (torch.searchsorted(table, target.detach()) - 1).clamp(0, len(table) - 2)
        t = low + (target - table[low]) / (table[low + 1] - table[low])
        return clamp_keeping_slope(t, self.t_min, self.t_max).to(ratio.dtype)

    def spaced(self, u: Tensor) -> Tensor:
        return u * self.t_max


class RectifiedFlow(Process):
    """Straight paths: ``x_t = (1 - t) x0 + t eps``, t in [0, 1].

    ``shift`` bends the customary grid towards noise, ``t = s u / (1 + (s - 1) u)`` (SD3, arXiv 2403.03206, Eq. 23); the
    process itself does not depend on it.
    """

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3, t_max: float = 0.999):
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift, self.t_min, self.t_max = shift, t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_from_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def spaced(self, u: Tensor) -> Tensor:
        bent = self.shift * u / (1 + (self.shift - 1) * u)
        return self.t_min + (self.t_max - self.t_min) * bent


class TrigFlow(Process):
    """``x_t = cos(t) k x0 + sin(t) z`` with ``z ~ N(0, sigma_data^2)`` (sCM, arXiv 2410.11081, Sec. 3).

    In this file's notation ``alpha = k cos t`` and ``sigma = sigma_data sin t``. ``data_scale`` k makes the standard
    deviation of the scaled data ``k x0`` equal to sigma_data. Two conventions are in use: k = 1 where the data have
    that deviation by themselves (EDM, FastGen), and k = sigma_data where theirs is 1, as latents' (SANA).
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        t_min: float = 1e-3,
        t_max: float = math.pi / 2 - 1e-4,
        data_scale: float = 1.0,
    ):
        if sigma_data <= 0 or data_scale <= 0:
            raise ValueError(f"sigma_data and data_scale must be positive, got {sigma_data} and {data_scale}")
        self.sigma_data, self.t_min, self.t_max, self.data_scale = sigma_data, t_min, t_max, data_scale

    def alpha(self, t: Tensor) -> Tensor:
        return self.data_scale * t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.sin()

    def time_from_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio * (self.data_scale / self.sigma_data))

    def spaced(self, u: Tensor) -> Tensor:
        return self.t_min + (self.t_max - self.t_min) * u
