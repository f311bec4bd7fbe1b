"""Training, small: the production method on a mixture of two Gaussians in the plane, with an exact teacher.

From one of the two modes, forward KL (f-distill) has to reach the other one too; reverse KL (Diff-Instruct) with the
same start, networks, noise levels and number of steps has to stay. From a broad Gaussian around both, every row of the
table has to converge. Critic and discriminator are small networks that learn as they would in a run; nothing but the
teacher is exact.
"""

import copy
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from distill.build import build_ratio, build_row
from distill.data import Batch, Classes
from distill.losses import denoising_loss
from distill.methods.base import Turn
from distill.methods.distribution_matching import DistributionMatching
from distill.noise_levels import LogUniform
from distill.settings import DMD2, GAN, SDS, SIM, DiffInstruct, FDistill, MatchingMethod, SiD, SiDA, UniInstruct
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import EDM
from models.seeds import Draws, mix
from models.student import OneStepStudent
from tests.analytic import ExactNetwork, Mixture, vector

SHAPE = (2, 1, 1)
STEPS, BATCH, SIGMA_INIT, SIGMA_DATA = 450, 256, 2.5, 1.0
LEVELS = LogUniform(low=0.1, high=0.5)
MODES = Mixture(vector(0.5, 0.5), torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=torch.float64), vector(0.35, 0.35))
FIRST = Mixture(vector(1.0), MODES.means[:1], MODES.stds[:1])
BROAD = Mixture(vector(1.0), torch.zeros(1, 2, dtype=torch.float64), vector(1.0))


def layers(inputs: int, outputs: int, width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


class Critic(nn.Module):
    """A small network for EDM's preconditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(4, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None], t[:, None] ** 2], 1)).reshape(x.shape)


class Generator(nn.Module):
    """Predicts x0 from ``x_t = sigma z``: at first exactly the Gaussian ``m + std z``, plus a residual of zero."""

    def __init__(self, start: Mixture) -> None:
        super().__init__()
        self.mean, self.std = start.means.float(), start.stds.float()
        self.layers = layers(2, 2)
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        z = x.flatten(1) / t[:, None]
        return (self.mean + self.std * z + self.layers(z)).reshape(x.shape)


class FlatDiscriminator(nn.Module):
    """A logit from the teacher's tapped features (B, 3): the scaled x_t and the log of the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(3, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers(features[0]).squeeze(1)


def pictures(mixture: Mixture, generator: torch.Generator) -> Tensor:
    return mixture.samples(BATCH, generator).float().reshape(BATCH, *SHAPE)


class BatchDraws(Draws):
    """One generator for the whole batch: a generator a row would cost more than these networks do."""

    def __init__(self, *seed: int) -> None:
        super().__init__([mix(*seed)])

    def normal(self, *shape: int) -> Tensor:
        return super().normal(BATCH, *shape)[0]

    def uniform(self) -> Tensor:
        return torch.rand(BATCH, generator=self._generators[0])


@cache
def first_critic(broad: bool, low: float, high: float) -> Denoiser:
    """A critic that knows the student's start, at noise levels log-uniform between two."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    critic = Denoiser(Critic(), EDM(), "edm", SIGMA_DATA)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(300):
        x0 = pictures(BROAD if broad else FIRST, generator)
        t = LogUniform(low=low, high=high).times(torch.rand(BATCH, generator=generator), critic.process)
        x_t = critic.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        optimizer.zero_grad()
        denoising_loss(critic.denoise(x_t, t, Condition()), x0, t, SIGMA_DATA).mean().backward()
        optimizer.step()
    return critic


def build(settings: MatchingMethod, broad: bool = False) -> DistributionMatching:
    torch.manual_seed(2)
    process = EDM()
    teacher = Guided(Denoiser(ExactNetwork(MODES, process), process, "x0", SIGMA_DATA), 1.0)
    student = OneStepStudent(Denoiser(Generator(BROAD if broad else FIRST), process, "x0", SIGMA_DATA), SIGMA_INIT)
    row = build_row(settings)
    assert isinstance(settings.noise_levels, LogUniform)
    low, high = settings.noise_levels.low, settings.noise_levels.high
    critic = copy.deepcopy(first_critic(broad, low, high)) if row.critic else None
    discriminator = FlatDiscriminator() if getattr(settings, "gan", None) else None
    ratio = build_ratio(settings)
    return DistributionMatching(settings, row, teacher, student, critic, Classes(1), SHAPE, discriminator, ratio)


def train(settings: MatchingMethod, seed: int, steps: int = STEPS, broad: bool = False) -> DistributionMatching:
    """The plain loop: one student turn, then the critic's, Adam for both."""
    method = build(settings, broad)
    student = torch.optim.Adam(method.networks["student"].parameters(), 5e-4, betas=(0.5, 0.99))
    others = [p for name, network in method.networks.items() if name != "student" for p in network.parameters()]
    critic = torch.optim.Adam(others, 2e-3, betas=(0.5, 0.99)) if others else student
    generator = torch.Generator().manual_seed(3)
    cond = Condition(class_ids=torch.zeros(BATCH).long())
    for step in range(steps):
        for index in range(1 + method.critic_turns):
            draws = BatchDraws(seed, step, index)
            optimizer = critic if index else student
            optimizer.zero_grad()
            if index:
                real = Batch(pictures(MODES, generator), cond) if "critic" in method.pictures else None
                loss, _ = method.critic_loss(Turn(0, draws, real))
            else:
                loss, _ = method.student_loss(Turn(0, draws, None))
            loss.backward()
            optimizer.step()
    return method


def samples(method: DistributionMatching) -> Tensor:
    """(4000, 2)"""
    z = torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(4))
    return method.sample(z, Condition(class_ids=torch.zeros(4000).long())).flatten(1)


def share_of_second_mode(x: Tensor) -> float:
    return float((x[:, 0] > 0).float().mean())


def share_near(x: Tensor, mode: Tensor) -> float:
    """Share of the samples within three standard deviations of a mode; the small network leaves a bridge between."""
    return float(((x - mode).norm(dim=1) < 3 * MODES.stds[0]).float().mean())


def f_distill(divergence: Literal["forward_kl", "reverse_kl"]) -> FDistill:
    """The discriminator serves the ratio alone (weight 0), so that h(r) is all that can bring the second mode."""
    gan = GAN(weight=0.0, taps=["features"])
    return FDistill(divergence=divergence, noise_levels=LEVELS, normalizer="none", gan=gan, ratio_clip=(0.01, 100.0))


def test_the_student_starts_as_the_first_mode() -> None:
    x = samples(build(DiffInstruct(noise_levels=LEVELS)))
    assert share_of_second_mode(x) == 0
    assert torch.allclose(x.mean(0), FIRST.means[0].float(), atol=0.03)
    assert torch.allclose(x.std(0), FIRST.stds.float(), atol=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_forward_kl_covers_both_modes(seed: int) -> None:
    """Measured: 0.44 beyond the middle; near the modes 0.45 and 0.25 (teacher: 0.5 of each)."""
    x = samples(train(f_distill("forward_kl"), seed))
    assert 0.3 < share_of_second_mode(x) < 0.6
    near = [share_near(x, mode) for mode in MODES.means.float()]
    assert min(near) > 0.15 and sum(near) > 0.6


@pytest.mark.parametrize("settings", [DiffInstruct(noise_levels=LEVELS), f_distill("reverse_kl")], ids=lambda s: s.kind)
def test_reverse_kl_stays_with_its_mode(settings: MatchingMethod) -> None:
    """Measured 0.0005. The second case has forward KL's discriminator and ratio and differs in h alone."""
    x = samples(train(settings, 0))
    assert share_of_second_mode(x) < 0.05
    assert torch.allclose(x.mean(0), FIRST.means[0].float(), atol=0.15)
    assert torch.allclose(x.std(0), FIRST.stds.float(), atol=0.15)


# ------------------------------------------------------------------------------------------------------- every row


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|``, 0 for equal distributions."""
    mean = lambda a, b: torch.cdist(a, b).mean()
    return float(2 * mean(x, y) - mean(x, x) - mean(y, y))


WIDE = {"noise_levels": LogUniform(low=0.1, high=3.0), "normalizer": "none"}
WHOLE = {"noise_levels": LogUniform(low=0.1, high=20.0)}
RATIO, BOTH = {"gan": GAN(weight=0.0, taps=["features"])}, {"gan": GAN(weight=0.1, taps=["features"])}
CLIP = {"ratio_clip": (0.01, 100.0)}
ROWS: list[tuple[MatchingMethod, float]] = [
    (DiffInstruct(**WIDE), 0.018),
    (DMD2(**WIDE, **BOTH), 0.016),
    (FDistill(**WIDE, **BOTH, **CLIP), 0.017),
    (FDistill(**WIDE, **BOTH, **CLIP, divergence="jensen_shannon"), 0.017),
    (SIM(**WIDE), 0.018),
    (SIM(**WIDE, huber=0.1), 0.018),
    (SiD(**WIDE), 0.024),
    (SiDA(**WIDE, **BOTH), 0.015),
    (UniInstruct(**WHOLE, **RATIO, **CLIP), 0.087),
    (UniInstruct(**WIDE | {"normalizer": "dmd"}, **BOTH, **CLIP, time_weight="denoiser"), 0.022),
]
"""Each with the energy distance that was measured after 1,000 steps from 0.236; three seeds of six rows
differed by 16 % at most. Uni-Instruct's exact weight g^2/2 is
the slowest: it counts the lowest noise levels most, where the learned networks are worst. (With reverse KL instead,
not in the table, one mode took over: 0.14 after 450 steps, 0.29 after 1,000.)"""


@pytest.mark.parametrize(("settings", "measured"), ROWS, ids=lambda value: getattr(value, "kind", str(value)))
def test_every_row_converges_from_the_same_start(settings: MatchingMethod, measured: float) -> None:
    """Both modes, each with about half of the samples; the distance is at most twice what was measured."""
    target = MODES.samples(4000, torch.Generator().manual_seed(9)).float()
    assert energy_distance(samples(build(settings, broad=True)), target) == pytest.approx(0.236, abs=0.02)
    x = samples(train(settings, 0, 1000, broad=True))
    assert energy_distance(x, target) < 2 * measured
    assert abs(share_of_second_mode(x) - 0.5) < 0.06


def test_sds_collapses_for_want_of_entropy() -> None:
    """Measured: standard deviations 0.03 and 0.01 about one mode, where the other rows keep 1.5 and 0.36."""
    x = samples(train(SDS(noise_levels=WIDE["noise_levels"]), 0, 1000, broad=True))
    assert float(x.std(0).max()) < 0.2
