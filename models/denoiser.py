"""A teacher is a denoiser: ``denoise(x_t, t, cond) -> x0``, whatever its network predicts and however it was noised."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.parameterization import Prediction, combination_of_both, to_x0
from models.process import Process, expand_to


class StopForward(Exception):
    """Ends a network's forward pass once the last tapped block has run."""


class CoreNetwork(nn.Module, ABC):
    """A network of diffusers, ``core``, called as ``network(x, t, cond)``."""

    @property
    @abstractmethod
    def core(self) -> Any: ...

    def apart(self) -> list[nn.Module]:
        """Parts of the core's blocks that the core calls by itself too, outside of their block."""
        return []


class Denoiser(nn.Module):
    """A network with its noise process and the kind of its prediction.

    ``network(x, t, cond)`` takes ``x`` (B, C, H, W), ``t`` (B,) and a Condition and returns (B, C, H, W). With
    ``prediction="edm"`` the network is wrapped in the preconditioning of Karras et al. (arXiv 2206.00364, Table 1):
    it sees ``c_in x_t`` and ``ln(sigma) / 4``, and its output is scaled and added to ``c_skip x_t``. With any other
    kind it sees ``x_t`` and ``t`` as they are.
    """

    def __init__(
        self, network: nn.Module, process: Process, prediction: Prediction | Literal["edm"], sigma_data: float = 0.5
    ):
        super().__init__()
        self.network, self.process, self.sigma_data = network, process, sigma_data
        self.prediction: Prediction | Literal["edm"] = prediction

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The mean of x0 given ``x_t`` (B, C, H, W) at times ``t`` (B,); returns (B, C, H, W) in the dtype of x_t."""
        alpha, sigma = expand_to(self.process.alpha(t), x_t), expand_to(self.process.sigma(t), x_t)
        prediction = self._predict(x_t, t, cond)
        if self.prediction != "edm":
            return to_x0(self.prediction, prediction, x_t, alpha, sigma).to(x_t.dtype)
        # The preconditioning is written for alpha = 1; x / alpha at sigma / alpha is that same noise level.
        x, ratio = x_t / alpha, sigma / alpha
        total = ratio**2 + self.sigma_data**2
        x0 = self.sigma_data**2 / total * x + ratio * self.sigma_data / total.sqrt() * prediction
        return x0.to(x_t.dtype)

    def combination(self, x_t: Tensor, t: Tensor, cond: Condition, on_x0: Tensor, on_eps: Tensor) -> Tensor:
        """``on_x0 x0 + on_eps eps`` (B, C, H, W) of one prediction, without going through x0; weights (B,).

        The derivative of x_t along the flow is such a combination. ``t`` and weights are best given in float64.
        """
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        a, b = combination_of_both(self.prediction, alpha, sigma, on_x0, on_eps, self.sigma_data)
        a, b = expand_to(a, x_t).to(x_t.dtype), expand_to(b, x_t).to(x_t.dtype)
        return (a * x_t + b * self._predict(x_t, t, cond)).to(x_t.dtype)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the network itself says; it is given times in float32, or float64 with an x_t of float64."""
        precision = torch.promote_types(x_t.dtype, torch.float32)
        if self.prediction != "edm":
            return self.network(x_t, t.to(precision), cond)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        total = (sigma**2 + (self.sigma_data * alpha) ** 2).sqrt()
        return self.network(x_t / expand_to(total, x_t).to(x_t.dtype), ((sigma / alpha).log() / 4).to(precision), cond)

    forward = denoise

    @contextmanager
    def _tapped(self, taps: Sequence[str], after_last: Callable[[], None]) -> Iterator[list[Tensor]]:
        """Collect the outputs of the named blocks in order of execution; call ``after_last`` behind the last one."""
        modules = dict(self.network.named_modules())
        unknown = [name for name in taps if name not in modules]
        if unknown or not taps:
            blocks = [name for name in modules if re.search(r"(mid_block|\.\d+|_block\d+)$", name)]
            raise ValueError(f"no block named {unknown} in this network; taps may be {blocks}")
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            # (picture, skipped ones) of a U-Net's block, (text, picture) of a joint transformer's
            features.append(output if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)][-1])
            if len(features) == len(taps):
                after_last()

        handles = [modules[name].register_forward_hook(keep) for name in taps]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str]) -> list[Tensor]:
        """Outputs of the blocks named in ``taps``, each (B, C, H, W) or (B, N, C); no block behind the last is run."""

        def stop() -> None:
            raise StopForward

        with self._tapped(taps, stop) as features, suppress(StopForward):
            self.denoise(x_t, t, cond)
        return features

    def denoise_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str], through: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """x0 and the tapped features, in a single forward pass.

        Features carry gradients. x0 does only if ``through``; otherwise nothing is recorded behind the last tap.
        """
        if through:
            with self._tapped(taps, lambda: None) as features:
                return self.denoise(x_t, t, cond), features
        was_enabled = torch.is_grad_enabled()
        try:
            with self._tapped(taps, lambda: torch._C._set_grad_enabled(False)) as features:
                x0 = self.denoise(x_t, t, cond)
        finally:
            torch._C._set_grad_enabled(was_enabled)
        return x0.detach(), features


class Guided(nn.Module):
    """Classifier-free guidance ``x0(null) + scale (x0(cond) - x0(null))`` (arXiv 2207.12598), in one batched call.

    ``scale`` None: each sample's own, ``cond.guidance`` (B,), which the network itself then is not given.
    """

    def __init__(self, denoiser: Denoiser, scale: float | None):
        super().__init__()
        self.denoiser, self.scale, self.process = denoiser, scale, denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As :meth:`Denoiser.denoise`."""
        if self.scale == 1.0:
            return self.denoiser.denoise(x_t, t, cond)
        return self._combine(self.denoiser.denoise(*self._doubled(x_t, t, cond)), cond)

    def denoise_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str], through: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`Denoiser.denoise_and_features`; the features are those of the conditional half."""
        if self.scale == 1.0:
            return self.denoiser.denoise_and_features(x_t, t, cond, taps, through)
        both, features = self.denoiser.denoise_and_features(*self._doubled(x_t, t, cond), taps, through)
        return self._combine(both, cond), [feature[: len(x_t)] for feature in features]

    def combination(self, x_t: Tensor, t: Tensor, cond: Condition, on_x0: Tensor, on_eps: Tensor) -> Tensor:
        """As :meth:`Denoiser.combination`: guidance is linear, so it does not matter of what the two answers are."""
        if self.scale == 1.0:
            return self.denoiser.combination(x_t, t, cond, on_x0, on_eps)
        weights = torch.cat([on_x0, on_x0]), torch.cat([on_eps, on_eps])
        return self._combine(self.denoiser.combination(*self._doubled(x_t, t, cond), *weights), cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str]) -> list[Tensor]:
        """As :meth:`Denoiser.features`, of the condition alone."""
        return self.denoiser.features(x_t, t, cond, taps)

    forward = denoise

    def _doubled(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        if self.scale is None:
            cond = replace(cond, guidance=None)
        return torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([cond, cond.null()])

    def _combine(self, both: Tensor, cond: Condition) -> Tensor:
        conditional, unconditional = both.chunk(2)
        if self.scale is not None:
            return unconditional + self.scale * (conditional - unconditional)
        if cond.guidance is None:
            raise ValueError("guidance by sample: the condition has no guidance scales")
        return torch.lerp(unconditional, conditional, expand_to(cond.guidance, both).to(both.dtype))


class Reparameterized(nn.Module):
    """``denoiser`` seen as one of another process: the exact change of variables at equal ``sigma / alpha``.

    models.trigflow.TrigFlowView is the one for TrigFlow, which knows the flow's velocity too.
    """

    def __init__(self, denoiser: Denoiser | Guided, process: Process):
        super().__init__()
        self.denoiser, self.process = denoiser, process

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The mean of x0 given ``x_t`` (B, C, H, W) of ``self.process`` at times ``t`` (B,)."""
        return self.denoiser.denoise(*self._within(x_t, t), cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str]) -> list[Tensor]:
        """As :meth:`Denoiser.features`."""
        return self.denoiser.features(*self._within(x_t, t), cond, taps)

    forward = denoise

    def _within(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The same point in the denoiser's own process: its x (B, C, H, W), and its time (B,) in the dtype of t."""
        precise, inner = t.double(), self.denoiser.process
        s = inner.time_from_ratio(self.process.ratio(precise))
        scale = expand_to(inner.alpha(s) / self.process.alpha(precise), x_t)
        return scale.to(x_t.dtype) * x_t, s.to(t.dtype)
