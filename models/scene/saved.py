"""Scenes in folders: what a stage leaves behind, and how it is read again."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.condition import Condition
from models.errors import UserError
from models.folders import replace_folder
from models.scene.backdrops import Backdrop, Learned, Plain, Studio
from models.scene.cameras import Orbit
from models.scene.fields import Blob, Box, FieldSizes
from models.scene.mesh import Mesh
from models.scene.particles import Fields, Generator
from models.teachers.base import Spec

BackdropKind = Literal["studio", "learned", "random", "white", "black", "grey"]


def new_backdrop(kind: BackdropKind) -> Backdrop:
    """One with random weights, if it has any."""
    match kind:
        case "studio":
            return Studio()
        case "learned":
            return Learned()
        case "random":
            return Plain(None)
        case "white" | "black" | "grey":
            level = {"white": 1.0, "black": 0.0, "grey": 0.5}[kind]
            return Plain((level, level, level))


@dataclass(frozen=True)
class Scene:
    """What a scene is but for its weights; ``sentence`` is what the teacher was asked for."""

    prompt: str
    sentence: str
    particles: int
    orbit: Orbit
    box: Box
    blob: Blob
    field: FieldSizes
    backdrop: BackdropKind
    samples: int

    def new(self) -> Fields:
        """Radiance fields with random weights."""
        fields = [self.field.new(self.box, self.blob) for _ in range(self.particles)]
        return Fields(fields, new_backdrop(self.backdrop), self.samples)


def _read(values: dict[str, Any]) -> Scene:
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    inner = {"orbit": Orbit, "box": Box, "blob": Blob, "field": FieldSizes}
    for key, kind in inner.items():
        tuples[key] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[key].items()})
    return Scene(**tuples)


def save(folder: Path, scene: Scene, tensors: dict[str, Tensor], card: str) -> None:
    """``scene.json``, ``scene.safetensors`` and ``README.md``, through a temporary folder. Fused encodings are saved as
    plain ones, which any machine can read."""
    plain = replace(scene, field=replace(scene.field, fused=False))
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    for name in [name for name in kept if name.endswith(".encoding.params")]:
        kept[f"{name.removesuffix('params')}table"] = kept.pop(name).view(-1, 2)
    with replace_folder(folder) as temporary:
        (temporary / "scene.json").write_text(json.dumps(asdict(plain), indent=2) + "\n")
        save_file(kept, temporary / "scene.safetensors")
        (temporary / "README.md").write_text(card)


def read(folder: Path) -> tuple[Scene, dict[str, Tensor]]:
    """What :func:`save` wrote; UserError if there is nothing that can be read."""
    try:
        return _read(json.loads((folder / "scene.json").read_text())), load_file(folder / "scene.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no scene that can be read: {' '.join(str(error).split())[:160]}") from error


def load_fields(folder: Path) -> tuple[Scene, Fields]:
    """The radiance fields of a volume stage, in evaluation mode."""
    scene, tensors = read(folder)
    fields = scene.new()
    try:
        fields.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{folder} holds other networks than its scene.json says") from error
    return scene, fields.eval()


def load_meshes(folder: Path) -> tuple[Scene, list[Mesh], Fields]:
    """The surfaces that a geometry or texture stage left, and the fields that colour them."""
    scene, tensors = read(folder)
    if "mesh.0.vertices" not in tensors:
        raise UserError(f"{folder} holds radiance fields and no mesh: run the geometry stage first")
    kept = {key: value for key, value in tensors.items() if not key.startswith("mesh.")}
    whole = scene.new()
    whole.load_state_dict(kept)
    meshes = [Mesh(tensors[f"mesh.{i}.vertices"], tensors[f"mesh.{i}.faces"]) for i in range(scene.particles)]
    return scene, meshes, whole


@dataclass(frozen=True)
class SceneSpec:
    """What the training loop knows of a scene: pictures of ``picture`` come from it, and ``teacher`` comes along."""

    scene: Scene
    picture: tuple[int, int, int]
    teacher: Spec
    student: bool = field(default=True)
    usage: str = field(default="python -m models.scene.export PATH OUT")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.picture

    @property
    def summary(self) -> str:
        return f"Text to 3D: {self.scene.prompt}."

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def preview(self, _count: int) -> Condition:
        return Condition()

    def to(self, device: torch.device | str) -> "SceneSpec":
        return SceneSpec(self.scene, self.picture, self.teacher.to(device))

    def parts(self) -> list[nn.Module]:
        return self.teacher.parts()

    def save(self, folder: Path, network: nn.Module, card: str) -> None:
        save(folder, self.scene, cast(Generator, network).tensors(), card)
