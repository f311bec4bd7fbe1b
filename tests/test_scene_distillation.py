"""VSD against its closed forms: exact scores, the critic, and a teacher that is known exactly."""

import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from distill import rows
from distill.methods.base import Turn
from distill.methods.scene_distillation import Prompts, SceneDistillation, view_word
from distill.settings import DiffInstruct, SceneStage
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.process import Process, RectifiedFlow, expand_to
from models.scene import captions, solids
from models.scene.backdrops import Plain
from models.scene.cameras import Camera, Orbit, camera_to_world
from models.scene.critic import LoRACritic
from models.scene.fields import Blob, Box, FieldSizes
from models.scene.particles import Fields, Views, posterior_mean
from models.seeds import Draws, mix
from models.teachers import load
from models.teachers.sana import SanaSpec
from tests.tiny import save_sana

SIZE = 32
ORBIT = Orbit(elevation=(-10.0, 45.0), radius=(4.0, 4.0))
BACK = 1.0
PROMPT = Prompts(Condition(), {})


def true_solid() -> solids.Scene:
    solid = solids.Solid("cube", "red", (0.0, 0.0, 0.0), 0.8, yaw=20.0)
    return solids.Scene((solid,), Camera(), captions.parse("a photo of a red cube"), 0.5, 0.0)


def true_views(cameras: list[Camera]) -> tuple[Tensor, Tensor]:
    """Pictures of the solid in its bare colour on white, and its masks."""
    drawn = solids.render([true_solid()] * len(cameras), SIZE, cameras)
    inside = (drawn.index >= 0).float()[:, None]
    colour = torch.tensor(solids.RGB["red"]).view(1, 3, 1, 1)
    return (colour * inside + BACK * (1 - inside)) * 2 - 1, inside[:, 0]


class ExactTeacher(nn.Module):
    """The optimal denoiser where pictures from a camera are N(true render, spread^2)."""

    def __init__(self, spread: float = 0.1):
        super().__init__()
        self.process: Process = RectifiedFlow()
        self.spread, self.sigma_data = spread, 0.5
        self.denoiser = self

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        matrices = cast(Tensor, cond.camera).view(-1, 4, 4)
        back = matrices[:, :3, 2]
        cameras = [
            Camera(math.degrees(math.atan2(b[0], b[2])), math.degrees(math.asin(b[1])), float(m[:3, 3].norm()))
            for b, m in zip(back, matrices, strict=True)
        ]
        mean, alpha = true_views(cameras)[0], expand_to(self.process.alpha(t), x_t)
        sigma2, s2 = expand_to(self.process.sigma(t), x_t) ** 2, self.spread**2
        return (s2 * alpha * x_t + sigma2 * mean) / (alpha**2 * s2 + sigma2)


def method(fake: str, fields: Fields, particles: int = 1, steps: int = 100) -> SceneDistillation:
    matching = DiffInstruct.model_validate({"noise_levels": {"kind": "grid", "low": 0.02, "high": 0.98}})
    stage = SceneStage.model_validate(
        {"name": "volume", "kind": "volume", "share": 1.0, "fake": fake, "matching": matching, "samples": 40}
        | {"resolutions": [(0.0, SIZE)], "anneal": {"at": 0.4, "to": 0.5}}
    )
    shape = (3, SIZE, SIZE)
    teacher = cast(Guided, ExactTeacher())
    prompts = Prompts(Condition(class_ids=torch.zeros(1).long()), {})
    encode = lambda pictures: pictures
    return SceneDistillation(
        stage, rows.reverse_kl(), teacher, fields, None, prompts, ORBIT, particles, shape, shape, encode, steps
    )


def new_fields(particles: int = 1) -> Fields:
    torch.manual_seed(0)
    sizes = FieldSizes(side=32)
    return Fields([sizes.new(Box(), Blob()) for _ in range(particles)], Plain((BACK, BACK, BACK)), 40)


def gradient(fake: str, particles: int) -> Tensor:
    fields = new_fields(particles)
    loss, _ = method(fake, fields, particles).student_loss(Turn(0, Draws([3, 4]), None))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in fields.parameters() if p.grad is not None])


def test_exact_vsd_of_one_particle_is_sds():
    """The score of a single particle is that of its own sample, bit for bit; of two it is not."""
    assert torch.equal(gradient("noise", 1), gradient("exact", 1))
    assert not torch.equal(gradient("noise", 2), gradient("exact", 2))


def test_posterior_mean_is_the_denoiser_of_an_even_mixture():
    """Its slope is that of the log-density: sigma^2 grad log p = alpha x0hat - x_t."""
    torch.manual_seed(0)
    x0, x_t = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = torch.tensor([0.8, 0.5]).double(), torch.tensor([0.6, 0.9]).double()
    x_t.requires_grad_()
    distance = ((x_t[:, None] - alpha.view(2, 1, 1, 1, 1) * x0) ** 2).flatten(2).sum(2)
    log_p = (-distance / (2 * sigma[:, None] ** 2)).logsumexp(1).sum()
    (score,) = torch.autograd.grad(log_p, x_t)
    mean = posterior_mean(x_t.detach(), x0, alpha, sigma)
    expected = (alpha.view(2, 1, 1, 1) * mean - x_t.detach()) / sigma.view(2, 1, 1, 1) ** 2
    torch.testing.assert_close(score, expected)


def test_sds_with_the_exact_teacher_finds_the_solid():
    """400 steps of one view: silhouettes from views in between, and PSNR."""
    fields, steps = new_fields(), 400
    distillation = method("noise", fields, steps=steps)
    optimizer = torch.optim.AdamW(fields.parameters(), 2e-3, (0.9, 0.99), 1e-15, weight_decay=0.0)
    for step in range(steps):
        loss, _ = distillation.student_loss(Turn(0, Draws([mix(0, step)]), None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cameras = [Camera(a + 11.0, e, 4.0) for a in range(0, 360, 60) for e in (0.0, 30.0)]
    with torch.no_grad():
        drawn = fields(Views.plain(cameras, 0, SIZE))
    truth, mask = true_views(cameras)
    own, mask = drawn.opacity[:, 0] > 0.5, mask > 0.5
    overlap = (own & mask).sum((1, 2)) / (own | mask).sum((1, 2))
    psnr = -10 * ((drawn.images - truth) / 2).square().mean((1, 2, 3)).log10()
    assert float(overlap.mean()) > 0.9 and float(psnr.mean()) > 20, (overlap.mean(), psnr.mean())


# ---------------------------------------------------------------------------------------------------- the critic


def tiny_critic(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoRACritic, Denoiser, SanaSpec]:
    denoiser, spec = load(save_sana(tmp_path_factory.mktemp("teacher") / "sana"))
    assert isinstance(spec, SanaSpec)
    torch.manual_seed(0)
    return LoRACritic(denoiser.requires_grad_(False), spec.text(["a cube"]), rank=2), denoiser, spec


def test_the_critic_starts_as_the_teacher_and_every_matrix_moves(tmp_path_factory: pytest.TempPathFactory):
    critic, denoiser, spec = tiny_critic(tmp_path_factory)
    cond = replace(spec.text(["a red cube, front view"] * 2), camera=camera_to_world([Camera(), Camera(90)]).flatten(1))
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.7])
    before = denoiser.denoise(x, t, spec.text(["a cube"] * 2))
    torch.testing.assert_close(critic(x, t, cond), before)
    names = dict(critic.named_parameters())
    assert sum(".adapter." in name for name in names) == 2 * 16  # to_q, to_k, to_v, to_out of four attentions
    start = {name: value.detach().clone() for name, value in names.items()}
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(3):  # the first step moves what is behind the zeros, the next what is before them
        optimizer.zero_grad()
        (critic(x, t, cond) - 1).square().mean().backward()
        with torch.no_grad():
            denoiser.denoise(x, t, cond)  # the teacher in between
        optimizer.step()
    still = [name for name, value in names.items() if torch.equal(value, start[name])]
    assert not still
    torch.testing.assert_close(denoiser.denoise(x, t, spec.text(["a cube"] * 2)), before)
    assert all(not p.requires_grad for name, p in denoiser.named_parameters() if "lora_" not in name)
    assert {"camera.0.weight", "camera.2.bias"} < set(critic.state_dict())
    front, side = (replace(cond, camera=cond.camera[[i, i]]) for i in (0, 1))  # type: ignore[index]
    assert not torch.allclose(critic(x, t, front), critic(x, t, side))


def test_the_trained_critic_approaches_the_exact_score():
    """Two particles of two colours, a real teacher: the distance to the exact denoiser falls to less than a third."""
    denoiser, spec = load("embedded:solids")
    assert isinstance(spec, SanaSpec)
    torch.manual_seed(0)
    critic = LoRACritic(denoiser.requires_grad_(False), spec.text(["a photo of a red cube"]), rank=4)
    camera = [Camera(30, 20, 4.0)]
    with torch.no_grad():
        pictures = []
        for colour in ("red", "blue"):
            solid = solids.Solid("cube", colour, (0.0, -0.3, 0.0), 0.8, yaw=10.0)
            scene = solids.Scene((solid,), camera[0], captions.parse("a photo of a cube"), 0.5, 0.0)
            pictures.append(solids.render([scene], 64, camera).images)
        x0 = spec.encode(torch.cat(pictures))
    process, count = denoiser.process, 4
    cond = Condition(camera=camera_to_world(camera * count).flatten(1))

    def noised(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        draws = Draws([mix(seed, i) for i in range(count)])
        t = 0.4 + 0.5 * draws.uniform()
        chosen = x0[(draws.uniform() < 0.5).long()]
        return chosen, process.add_noise(chosen, draws.normal(*spec.shape), t), t

    @torch.no_grad()
    def distance() -> float:
        total = 0.0
        for seed in range(1000, 1006):
            _, x_t, t = noised(seed)
            exact = posterior_mean(x_t, x0.expand(count, *x0.shape), process.alpha(t), process.sigma(t))
            total += float((critic(x_t, t, cond) - exact).square().mean())
        return total

    start = distance()
    optimizer = torch.optim.AdamW(critic.parameters(), 5e-3, (0.9, 0.99))
    for step in range(120):
        chosen, x_t, t = noised(step)
        optimizer.zero_grad()
        (critic(x_t, t, cond) - chosen).square().mean().backward()
        optimizer.step()
    assert distance() < start / 3


def test_words_for_views():
    assert [view_word(Camera(a, e)) for a, e in ((0, 10), (90, 10), (180, 10), (180, 70))] == [
        "front", "side", "back", "overhead",
    ]  # fmt: skip
