"""The density ratio ``r = q_t / p_t`` from a discriminator's logits, and the two stages that normalise ``h(r)``."""

import torch
from torch import Tensor, nn

from distill.divergences import Divergence
from distill.losses import bin_index, bin_sums
from distill.reduce import sum_over_processes


class Ratio(nn.Module):
    """r and the scale of ``h(r)``, without gradient (f-distill, arXiv 2502.15681, Sec. 4.2 and Appendix).

    ``r = exp(logit)`` with the logit clamped to +-10 and r to ``clip``. Stage 1 divides r by its moving average within
    the bin of its noise level: ``E_p[r] = 1`` at every t, so this only removes the discriminator's miscalibration.
    Stage 2 divides h by its mean over the batch, which fixes the gradient's scale. Both averages are over all
    processes.

    bins are uniform in u, the variable that the noise level is drawn by, so each is equally populated; a bin that has
    seen nothing yet takes its first batch's mean, the others move by ``1 - decay``.
    """

    means: Tensor
    seen: Tensor

    def __init__(
        self,
        divergence: Divergence,
        bins: int = 10,
        decay: float = 0.9,
        clip: tuple[float, float] = (0.1, 20.0),
        stages: tuple[bool, bool] = (True, True),
    ):
        super().__init__()
        self.divergence, self.bins, self.decay, self.clip, self.stages = divergence, bins, decay, clip, stages
        self.register_buffer("means", torch.ones(bins))
        self.register_buffer("seen", torch.zeros(bins))

    @torch.no_grad()
    def ratio(self, logit: Tensor) -> Tensor:
        """``logit`` (B,) to the clipped density ratio (B,)."""
        return logit.clamp(-10, 10).exp().clamp(*self.clip)

    @torch.no_grad()
    def forward(self, ratio: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 1 and stage 2 for ratios (B,) at noise levels ``u`` (B,) in [0, 1); updates the moving averages.

        Returns the calibrated ratio (B,) and the mean of h over the batch (scalar), by which a row's k's are divided.
        """
        if self.stages[0]:
            total, count = bin_sums(ratio.float(), u, self.bins)
            total, count = sum_over_processes(torch.stack([total, count]))
            batch_mean = total / count.clamp(min=1)
            moved = torch.where(self.seen > 0, self.decay * self.means + (1 - self.decay) * batch_mean, batch_mean)
            usable = (count > 0) & batch_mean.isfinite()  # one bad logit must not stay in the averages for ever
            self.means.copy_(torch.where(usable, moved, self.means))
            self.seen.copy_(torch.maximum(self.seen, usable.to(self.seen)))
            ratio = ratio / (self.means[bin_index(u, self.bins)].to(ratio) + 1e-6)
        if not self.stages[1]:
            return ratio, ratio.new_ones(())
        h = self.divergence.h(ratio)
        total, count = sum_over_processes(torch.stack([h.sum(), torch.full_like(h.sum(), len(h))]))
        return ratio, total / count + 1e-6
