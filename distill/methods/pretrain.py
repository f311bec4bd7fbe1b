"""Train a denoiser on pictures (arXiv 2206.00364), or on a teacher's answers (MSD's TSM, arXiv 2410.23274)."""

import torch
from torch import Tensor, nn

from distill.losses import denoising_loss
from distill.methods.base import Logs, Turn
from distill.settings import Pretrain
from eval.binding import Binding
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.student import heun


class Pretraining:
    """The network named "student" is the denoiser itself: one forward and backward pass per turn, no critic.

    With a ``teacher`` its denoising of the noised real picture is the target in the place of the picture itself.
    ``part`` calls the denoiser and has those of its parameters that are trained; None: all are.
    ``binding`` measures whether it heeds which word of a caption belongs to which.
    """

    def __init__(
        self,
        settings: Pretrain,
        denoiser: Denoiser,
        teacher: Guided | None = None,
        part: nn.Module | None = None,
        binding: Binding | None = None,
    ):
        self.settings, self.denoiser, self.teacher, self.binding = settings, denoiser, teacher, binding
        self.networks: dict[str, nn.Module] = {"student": part or denoiser}
        self.buffers: dict[str, nn.Module] = {}
        self.frozen: list[nn.Module] = [module for module in (teacher, part and denoiser) if module]
        self.critic_turns = 0
        self.pictures = {"student"}

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        assert turn.real is not None
        x0, cond, draws = turn.real.images, turn.real.cond, turn.draws
        cond = cond.dropped(draws.uniform() >= self.settings.drop_condition)
        process = self.denoiser.process
        t = self.settings.noise_levels.times(draws.uniform(), process)
        x_t = process.add_noise(x0, draws.normal(*x0.shape[1:]), t)
        target = x0
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher.denoise(x_t, t, cond)
        predicted = self.networks["student"](x_t, t, cond)
        loss = denoising_loss(predicted, target, process.ratio(t), self.settings.sigma_data).mean()
        return loss, {"loss": loss.detach()}

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        raise NotImplementedError("pretraining has no critic turns")

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        return heun(self.denoiser, z, cond, steps=18)

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor | None:
        return heun(self.teacher, z, cond, steps) if self.teacher else None

    def diagnose(self) -> Logs:
        if self.binding is None:
            return {}
        rises = self.binding.rises(self.denoiser)
        return {f"binding/{name}": (values, torch.ones_like(values)) for name, values in rises.items()}

    def exported(self) -> nn.Module:
        return self.denoiser.network
