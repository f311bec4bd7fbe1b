"""How near a scene's fake score is to the exact one.

VSD's critic learns the mean of x0 given x_t among the particles' pictures from a camera (arXiv 2305.16213, Sec. 3.2).
Particles are few, so that mean has a closed form: here the trained critic's distance to it is divided by that of the
untrained one, which is the teacher without guidance.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.errors import UserError
from models.scene import saved
from models.scene.cameras import Camera, camera_to_world
from models.scene.critic import LoRACritic
from models.scene.particles import Views, posterior_mean
from models.scene.surface import draw
from models.seeds import Draws, mix
from models.teachers import load
from models.teachers.base import TextSpec
from models.yaml_text import read_yaml

BINS = 5
"""Of noise levels, equal parts of those that the critic was trained at."""
CAMERAS, BACKDROPS, DRAWS = 6, 4, 2
"""Cameras around, random backdrops that the closed form is over, and noisy pictures for each camera and bin."""


@dataclass(frozen=True)
class Errors:
    """Mean squared distances to the exact posterior mean, by bin, least noise first.

    ratios (BINS,): sigma / alpha in the middle of the bins.
    """

    ratios: Tensor
    untrained: Tensor
    trained: Tensor

    @property
    def relative(self) -> float:
        """Of all bins together; 1 is what no training gives."""
        return float(self.trained.sum() / self.untrained.sum())

    def summary(self) -> list[dict[str, float]]:
        """A row for each bin."""
        rows = zip(self.ratios.tolist(), self.untrained.tolist(), self.trained.tolist(), strict=True)
        return [{"sigma_over_alpha": r, "untrained": u, "trained": v, "relative": v / u} for r, u, v in rows]


def critic_file(stage: Path) -> Path | None:
    """The critic's weights in a stage's last checkpoint that has one; None without any."""
    found = [path for path in stage.glob("checkpoints/step-*/critic/model.safetensors")]
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.parent.parent.name)), default=None)


def settings_of(stage: Path) -> dict[str, Any]:
    """A stage's config.yaml; UserError if it is not that of text to 3D."""
    try:
        config = read_yaml((stage / "config.yaml").read_text())
        config["settings"] = next(s for s in config["method"]["stages"] if s["name"] == config["method"]["stage"])
        return config
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{stage}/config.yaml is not that of a stage of text to 3D: {error}") from error


def _networks(config: dict[str, Any], sentence: str, device: torch.device | str) -> tuple[LoRACritic, TextSpec]:
    """A new critic as the settings say, and the teacher's spec."""
    teacher, own = config["teacher"], config["method"]["critic"]
    denoiser, spec = load(teacher["path"], teacher["size"], teacher["tokens"], teacher["config"])
    base, its_spec, process = denoiser, spec, None
    if own["path"] is not None:
        (base, its_spec), process = load(own["path"]), denoiser.process
    if not isinstance(spec, TextSpec) or not isinstance(its_spec, TextSpec):
        raise UserError(f"teacher {teacher['path']} is not asked for prompts")
    prompt = its_spec.to(device).text([sentence])
    critic = LoRACritic(base.to(device).requires_grad_(False), prompt, own["rank"], process)
    return critic.to(device), spec.to(device)


def _pictures(stage: Path, config: dict[str, Any], camera: Camera, noise: Tensor) -> Tensor:
    """(n M, 3, H, W) in [-1, 1]: every particle over every backdrop of ``noise`` (M, 4), as the stage trained on."""
    settings = config["settings"]
    size = settings["resolutions"][-1][1]
    scene, tensors = saved.read(stage / "student")
    particles = [p for p in range(scene.particles) for _ in noise]
    views = Views([camera] * len(particles), particles, size, noise.repeat(scene.particles, 1))
    if "mesh.0.vertices" not in tensors:
        return saved.load_fields(stage / "student")[1](views).images
    _, meshes, fields = saved.load_meshes(stage / "student")
    return draw(meshes, fields.all(), fields.backdrop, views, settings["picture"]).images


def _times(config: dict[str, Any], critic: LoRACritic) -> Tensor:
    """(BINS,): the middles of the bins, of the levels that the critic was trained at where those are a grid."""
    matching = config["settings"]["matching"]
    levels = matching["critic_noise_levels"] or matching["noise_levels"]
    low, high = (levels["low"], levels["high"]) if levels["kind"] == "grid" else (0.02, 0.98)
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    return critic.process.spaced(low + (high - low) * middle).float()


@torch.no_grad()
def _answers(critic: LoRACritic, cases: Sequence[tuple[Tensor, Tensor, Condition, Tensor]]) -> Tensor:
    """(BINS,): mean squared distance of the critic's answers to the exact ones."""
    errors = [(critic(x_t, t, cond) - exact).square().flatten(1).mean(1) for x_t, t, cond, exact in cases]
    return torch.stack(errors).view(-1, BINS).mean(0).cpu()


@torch.no_grad()
def fake_score_errors(stage: Path, device: torch.device | str = "cpu") -> Errors | None:
    """Of a stage with ``fake: lora``; None for another, and where its checkpoints are gone.

    The particles are those that the stage left, drawn at its last resolution; a closed form over a few random backdrops
    stands for that over all. UserError if the teacher or the critic cannot be read.
    """
    config, weights = settings_of(stage), critic_file(stage)
    if config["settings"]["fake"] != "lora" or weights is None:
        return None
    scene = saved.read(stage / "student")[0]
    critic, spec = _networks(config, scene.sentence, device)
    process, times = critic.process, _times(config, critic).to(device)
    cases: list[tuple[Tensor, Tensor, Condition, Tensor]] = []
    for index, camera in enumerate(scene.orbit.turntable(CAMERAS, 180 / CAMERAS)):
        uniforms = Draws([mix(index, b) for b in range(BACKDROPS)])
        noise = torch.stack([uniforms.uniform() for _ in range(4)], 1)
        images = _pictures(stage, config, camera, noise).to(device)
        if images.shape[1:] != spec.picture:
            images = F.interpolate(images, spec.picture[1:], mode="bilinear", antialias=True)
        x0 = spec.encode(images)
        cond = Condition(camera=camera_to_world([camera] * BINS).flatten(1)).to(device)
        for draw_ in range(DRAWS):
            draws = Draws([mix(index, draw_, b) for b in range(BINS)], device)
            chosen = x0[(draws.uniform() * len(x0)).long()]
            x_t = process.add_noise(chosen, draws.normal(*spec.shape), times)
            every = x0.expand(BINS, *x0.shape)
            cases.append((x_t, times, cond, posterior_mean(x_t, every, process.alpha(times), process.sigma(times))))
    untrained = _answers(critic, cases)
    try:
        critic.load_state_dict(load_file(weights, str(device)))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"{weights} is not the critic that {stage}/config.yaml describes") from error
    return Errors(process.ratio(times).cpu(), untrained, _answers(critic, cases))
