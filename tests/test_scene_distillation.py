"""VSD against its closed forms: exact scores, the critic, and a teacher that is known exactly."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from distill.methods.base import Turn
from distill.methods.scene_distillation import Prompts
from distill.workshop.exact_scene import distillation, new_fields, sds
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.errors import UserError
from models.process import EDM, expand_to
from models.scene import captions, solids
from models.scene.cameras import Camera, camera_to_world
from models.scene.critic import LoRACritic
from models.scene.particles import posterior_mean
from models.seeds import Draws, mix
from models.student import heun
from models.teachers import load
from models.teachers.base import TextSpec
from models.teachers.sana import SanaSpec
from tests.tiny import save_sana


def gradient(fake: str, particles: int, weights: tuple[float, float] = (1.0, 0.0)) -> Tensor:
    fields = new_fields(particles)
    loss, _ = distillation(fake, fields, particles, weights=weights).student_loss(Turn(0, Draws([3, 4]), None))
    loss.backward()
    return torch.cat([cast(Tensor, p.grad).flatten() for p in fields.parameters()])


def test_exact_vsd_of_one_particle_is_sds():
    """The score of a single particle is that of its own sample, bit for bit; of two it is not."""
    assert torch.equal(gradient("noise", 1), gradient("exact", 1))
    assert not torch.equal(gradient("noise", 2), gradient("exact", 2))


def test_every_particle_has_a_gradient_whichever_are_drawn():
    """As DDP needs it; of those that no view drew it is zero."""
    fields = new_fields(3)
    loss, _ = distillation("noise", fields, 3).student_loss(Turn(0, Draws([3]), None))
    loss.backward()
    norms = [sum(float(cast(Tensor, p.grad).norm()) for p in field.parameters()) for field in fields.all()]
    assert sorted(norm > 0 for norm in norms) == [False, False, True]


def test_in_pixels_sds_is_the_same_in_latents_and_in_pictures():
    """Where nothing is encoded; the weights add. In pictures highlights beyond 1 are cut off."""
    latents = gradient("noise", 1)
    for weights, scale in (((0.0, 1.0), 1), ((0.5, 0.5), 1), ((0.0, 3.0), 3)):
        difference = gradient("noise", 1, weights) - scale * latents
        assert difference.norm() < 1e-3 * scale * latents.norm(), weights


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
    """Silhouettes from views in between, and PSNR. `python -m distill.workshop.exact_scene` says what it costs."""
    found = sds()
    assert found.silhouette_iou > 0.9 and found.psnr > 20, found


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


def test_a_critic_of_another_process_is_asked_at_the_same_noise(tmp_path: Path):
    denoiser, spec = load(save_sana(tmp_path / "sana"))
    assert isinstance(spec, SanaSpec)
    critic = LoRACritic(denoiser, spec.text(["a cube"]), rank=2, process=EDM())
    cond = replace(spec.text(["a red cube"] * 2), camera=camera_to_world([Camera(), Camera(90)]).flatten(1))
    x, t = torch.randn(2, *spec.shape), torch.tensor([0.3, 0.7])
    its_x, its_t = x / expand_to(denoiser.process.alpha(t), x), denoiser.process.ratio(t)
    torch.testing.assert_close(critic(its_x, its_t, cond), denoiser.denoise(x, t, spec.text(["a cube"] * 2)))


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
            pictures.append(solids.render([scene], spec.picture[1], camera).images)
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


def test_a_scene_that_has_vanished_says_what_to_change():
    fields = new_fields(1)
    fields.occupancy[0].cells.zero_()
    method = distillation("noise", fields, 1)
    method.progress.steps += 1
    with pytest.raises(UserError, match=r"nothing is left.*step 1: .*sparsity"):
        method.student_loss(Turn(0, Draws([3, 4]), None))


def test_all_micro_batches_of_a_step_are_of_one_size_and_annealed_alike():
    method = distillation("noise", new_fields(), steps=2)
    method.stage = method.stage.model_copy(update={"resolutions": [(0.0, 8), (0.5, 16)]})
    seen: list[tuple[int, float]] = []
    method.generator.register_forward_pre_hook(
        lambda _fields, inputs: seen.append((inputs[0].size, method.progress.share))
    )
    for micro in (0, 1, 0, 1):
        method.student_loss(Turn(micro, Draws([3]), None))
    assert seen == [(8, 0.0), (8, 0.0), (16, 0.5), (16, 0.5)] and int(method.progress.steps) == 2


def test_words_for_views():
    cameras = [Camera(0, 10), Camera(98, 10), Camera(-173, 10), Camera(180, 70)]
    assert [camera.seen for camera in cameras] == [
        ("front view", "seen from 0 degrees"),
        ("side view", "seen from 105 degrees"),
        ("back view", "seen from 180 degrees"),
        ("overhead view", "seen from 180 degrees"),
    ]
    text = lambda value: Condition(text=torch.full((1, 2, 3), float(value)))
    for words, expected in (
        ({}, [0, 0, 0, 0]),
        ({"front view": 1, "side view": 2, "back view": 3}, [1, 2, 3, 0]),
        ({"seen from 105 degrees": 4, "seen from 180 degrees": 5}, [0, 4, 5, 5]),
    ):
        prompts = Prompts(text(0), {view: text(value) for view, value in words.items()})
        asked = prompts.teacher(cameras).text
        assert asked is not None and asked[:, 0, 0].tolist() == expected


def test_the_embedded_teacher_knows_from_where_it_is_asked_to_see():
    """A torus that stands in front of the camera is broad, and narrow from the side; on the same noise."""
    denoiser, spec = load("embedded:solids")
    assert isinstance(spec, TextSpec)
    cond = spec.text([f"a photo of an orange torus, seen from {angle} degrees" for angle in (0, 90)])
    noise = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    with torch.no_grad():
        images = spec.decode(heun(Guided(denoiser, 1.5), noise, cond, 6))
    coloured = images.amax(1) - images.amin(1) > 0.5
    front, side = coloured.any(1).sum(1).tolist()
    assert front > 1.6 * side > 0
