"""Train a teacher: denoising score matching with EDM's weighting (arXiv 2206.00364)."""

import torch
from torch import Tensor, nn

from distill.losses import denoising_loss
from distill.methods.base import Logs, Turn
from distill.settings import Pretrain
from models.condition import NULL_CLASS, Condition
from models.denoiser import Denoiser
from models.student import heun


class Pretraining:
    """The network named "student" is the denoiser itself: one forward and backward pass per turn, no critic."""

    def __init__(self, settings: Pretrain, denoiser: Denoiser):
        self.settings, self.denoiser = settings, denoiser
        self.networks: dict[str, nn.Module] = {"student": denoiser}
        self.buffers: dict[str, nn.Module] = {}
        self.frozen: list[nn.Module] = []
        self.critic_turns = 0
        self.pictures = {"student"}

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert turn.real is not None
        x0, cond, draws = turn.real.images, turn.real.cond, turn.draws
        if cond.class_ids is not None:
            keep = draws.uniform() >= self.settings.drop_condition
            cond = Condition(class_ids=torch.where(keep, cond.class_ids, NULL_CLASS))
        process = self.denoiser.process
        t = self.settings.noise_levels.times(draws.uniform(), process)
        x_t = process.add_noise(x0, draws.normal(*x0.shape[1:]), t)
        predicted = self.networks["student"](x_t, t, cond)
        loss = denoising_loss(predicted, x0, process.ratio(t), self.settings.sigma_data).mean()
        return loss, {"loss": loss.detach()}

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        raise NotImplementedError("pretraining has no critic turns")

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        return heun(self.denoiser, z, cond, steps=18)

    def reference(self, z: Tensor, cond: Condition, steps: int) -> None:
        return None

    def exported(self) -> nn.Module:
        return self.denoiser.network
