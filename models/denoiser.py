"""A teacher is a denoiser: ``denoise(x_t, t, cond) -> x0``, whatever its network predicts and however it was noised."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from models.condition import Condition
from models.parameterization import Prediction, to_x0
from models.process import Process, expand_to


class StopForward(Exception):
    """Ends a network's forward pass once the last tapped block has run."""


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
        if self.prediction != "edm":
            return to_x0(self.prediction, self.network(x_t, t, cond), x_t, alpha, sigma).to(x_t.dtype)
        # The preconditioning is written for alpha = 1; x / alpha at sigma / alpha is that same noise level.
        x, ratio = x_t / alpha, sigma / alpha
        total = ratio**2 + self.sigma_data**2
        prediction = self.network(x / total.sqrt(), ratio.flatten().log() / 4, cond)
        x0 = self.sigma_data**2 / total * x + ratio * self.sigma_data / total.sqrt() * prediction
        return x0.to(x_t.dtype)

    forward = denoise

    @contextmanager
    def _tapped(self, taps: Sequence[str], after_last: Callable[[], None]) -> Iterator[list[Tensor]]:
        """Collect the outputs of the named blocks in order of execution; call ``after_last`` behind the last one."""
        modules = dict(self.network.named_modules())
        unknown = [name for name in taps if name not in modules]
        if unknown or not taps:
            blocks = [name for name in modules if name.endswith("mid_block") or name.split(".")[-1].isdigit()]
            raise ValueError(f"no block named {unknown} in this network; taps may be {blocks}")
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            features.append(output if isinstance(output, Tensor) else output[0])
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
    """Classifier-free guidance ``x0(null) + scale (x0(cond) - x0(null))`` (arXiv 2207.12598), in one batched call."""

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__()
        self.denoiser, self.scale, self.process = denoiser, scale, denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As :meth:`Denoiser.denoise`."""
        if self.scale == 1.0:
            return self.denoiser.denoise(x_t, t, cond)
        return self._combine(self.denoiser.denoise(*self._doubled(x_t, t, cond)))

    def denoise_and_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[str], through: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`Denoiser.denoise_and_features`; the features are those of the conditional half."""
        if self.scale == 1.0:
            return self.denoiser.denoise_and_features(x_t, t, cond, taps, through)
        both, features = self.denoiser.denoise_and_features(*self._doubled(x_t, t, cond), taps, through)
        return self._combine(both), [feature[: len(x_t)] for feature in features]

    forward = denoise

    def _doubled(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        return torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([cond, cond.null()])

    def _combine(self, both: Tensor) -> Tensor:
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


class Reparameterized(nn.Module):
    """``denoiser`` seen as one of another process: the exact change of variables at equal ``sigma / alpha``."""

    def __init__(self, denoiser: Denoiser | Guided, process: Process):
        super().__init__()
        self.denoiser, self.process = denoiser, process

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        inner = self.denoiser.process
        s = inner.time_from_ratio(self.process.ratio(t))
        scale = expand_to(inner.alpha(s) / self.process.alpha(t), x_t)
        return self.denoiser.denoise((scale * x_t).to(x_t.dtype), s, cond)

    forward = denoise
