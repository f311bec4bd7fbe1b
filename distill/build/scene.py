"""From settings to one stage of text to 3D, and from one command to all of them."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState

from distill.build.matching import build_ratio, build_row
from distill.build.teacher import load_teacher
from distill.data import Batch
from distill.methods.base import Method
from distill.methods.scene_distillation import Prompts, SceneDistillation
from distill.settings import Config, SceneStage
from distill.settings import SceneDistillation as Settings
from models.condition import Condition
from models.denoiser import Denoiser, Guided
from models.discriminator import feature_channels
from models.errors import UserError
from models.folders import replace_text
from models.scene import saved
from models.scene.cameras import Orbit, camera_to_world
from models.scene.captions import SEEN, VIEWS
from models.scene.critic import CameraDiscriminator, CameraFeatures, LoRACritic
from models.scene.fields import Blob, Box, FieldSizes, HashGrid
from models.scene.memory import fitting_samples, free_bytes
from models.scene.particles import Fields, Generator
from models.scene.surface import Geometry, Texture, find_threshold
from models.seeds import Draws, mix
from models.student import heun
from models.teachers import base, load
from models.teachers.base import TextSpec


def slug(prompt: str) -> str:
    """A short name of a folder for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "scene"


def folder(config: Config) -> Path:
    """Where a prompt's stages and files lie."""
    assert isinstance(config.method, Settings)
    return config.output / slug(config.method.prompt)


def check(config: Config) -> None:
    """UserError for settings that scenes have no use for."""
    if config.data.kind != "conditions_only":
        raise UserError("data.kind: scene_distillation learns from its teacher alone: choose conditions_only")
    if config.teacher is not None and config.teacher.cache is not None:
        raise UserError("teacher.cache: a scene's few prompts are encoded once anyway: remove the key")
    if config.lora is not None:
        raise UserError("lora: a scene is no network; its critic's adapters are method.critic.rank: remove the key")
    if config.evaluation.num_images:
        raise UserError("evaluation.num_images: `python -m eval.scene` judges scenes: set it to 0")


def runs(config: Config, settings: Settings) -> list[Config]:
    """One run for each stage, in order; each starts from the one before and knows of no other stage, so that what comes
    later can be changed without training anew. The scene's files alone are uploaded."""
    check(config)
    plan: list[Config] = []
    done, share = 0, 0.0
    for stage in settings.stages:
        share += stage.share
        steps, done = round(share * config.train.steps) - done, round(share * config.train.steps)
        if steps < 1:
            raise UserError(f"train.steps: of {config.train.steps} steps none is left for the stage {stage.name}")
        start = plan[-1].output if plan else None
        own = {"stage": stage.name, "stages": [stage.model_copy(update={"share": 1.0})], "only": None}
        changes = {
            "output": folder(config) / stage.name,
            "method": settings.model_copy(update=own | {"start": start}),
            "student": stage.student or config.student,
            "critic": stage.critic or config.critic,
            "train": config.train.model_copy(update={"steps": steps}),
            "push_to_hub": None,
        }
        plan.append(config.model_copy(update=changes))
    return plan


def scene_of(settings: Settings) -> saved.Scene:
    """The part of the settings that a scene's folder remembers."""
    return saved.Scene(
        prompt=settings.prompt,
        sentence=settings.sentence,
        particles=settings.particles,
        orbit=Orbit(**settings.cameras.model_dump(exclude={"view_words"})),
        box=Box(settings.box_centre, settings.box_half),
        blob=Blob(settings.blob_strength, settings.blob_radius, settings.blob_centre),
        field=FieldSizes(**settings.field.model_dump()),
        backdrop=settings.backdrop,
        samples=settings.stages[0].samples,
    )


def prompts_of(settings: Settings, sentence: str, spec: TextSpec) -> Prompts:
    """The sentence embedded, plain and with each view's words; UserError for words that the teacher does not know."""
    cameras = settings.cameras
    sides = [f"{view} view" for view in (*VIEWS, *(("overhead",) if cameras.elevation[1] > 60 else ()))]
    by_kind = {"none": [], "sides": sides, "degrees": SEEN[len(VIEWS) :]}
    asked = {view: f"{sentence}, {view}" for view in by_kind[cameras.view_words]}
    for key, texts in (("prompt", [sentence]), ("cameras.view_words", asked.values())):
        if unknown := dict.fromkeys(word for text in texts for word in spec.unknown_words(text)):
            raise UserError(f"method.{key}: the teacher does not know the words: {', '.join(unknown)}")
    return Prompts(spec.text([sentence]), {view: spec.text([text]) for view, text in asked.items()})


def _critic(settings: Settings, teacher: Denoiser, spec: TextSpec, prompt: Condition) -> LoRACritic:
    path = settings.critic.path
    if path is None:
        return LoRACritic(teacher, prompt, settings.critic.rank)
    other, its_spec = load(path)
    if not isinstance(its_spec, TextSpec) or not _same_latents(spec, its_spec):
        raise UserError(f"method.critic.path: {path} works in other latents than the teacher")
    prompt = its_spec.text([settings.sentence])
    return LoRACritic(other.requires_grad_(False), prompt, settings.critic.rank, teacher.process)


@torch.no_grad()
def _same_latents(one: TextSpec, other: TextSpec) -> bool:
    """Whether both encode a picture alike, to within 1 %."""
    if one.picture != other.picture or one.shape != other.shape:
        return False
    picture = Draws([0]).normal(*one.picture).clamp(-1, 1)
    x0, its_x0 = one.encode(picture), other.encode(picture)
    return float((its_x0 - x0).norm()) < 0.01 * float(x0.norm())


def build_stage(config: Config, settings: Settings) -> tuple[Method, base.Spec]:
    """The method of one stage and the spec of what it leaves behind."""
    stage = next(stage for stage in settings.stages if stage.name == settings.stage)
    denoiser, spec = load_teacher(config)
    if not isinstance(spec, TextSpec):
        raise UserError("method.kind: scene_distillation needs a teacher that is asked for prompts")
    assert config.teacher is not None
    if not spec.guidable and stage.guidance not in (None, 1.0):
        raise UserError(
            f"method.stages.{stage.name}.guidance: {config.teacher.path} is a distilled teacher without an "
            f"unconditional answer ({spec.unguided}): give 1"
        )
    teacher = denoiser.requires_grad_(False)
    scene = scene_of(settings)
    prompts = prompts_of(settings, scene.sentence, spec)
    critic = _critic(settings, teacher, spec, prompts.plain) if stage.fake == "lora" else None
    ratio, gan = build_ratio(stage.matching), getattr(stage.matching, "gan", None)
    if ratio is not None and gan is None:
        raise UserError("method.stages: a divergence other than reverse_kl needs `gan`, whose discriminator it reads")
    discriminator = None
    if gan is not None:
        channels = feature_channels(teacher, gan.taps, spec.shape, spec.preview(1))
        discriminator = CameraDiscriminator(channels, gan.width)
        teacher = CameraFeatures(teacher.network, teacher.process, teacher.prediction, teacher.sigma_data)
    guided = Guided(teacher, config.teacher.guidance if stage.guidance is None else stage.guidance)
    if stage.kind == "volume":
        scene = replace(scene, samples=_samples(config, stage, scene))
    generator, samples = _generator(settings, stage, scene)
    scene = replace(scene, samples=samples)
    method = SceneDistillation(
        stage,
        build_row(stage.matching),
        guided,
        generator,
        critic,
        prompts,
        scene.orbit,
        settings.particles,
        spec.shape,
        spec.picture,
        spec.encode,
        spec.decode,
        config.train.steps,
        settings.critic.camera_dropout,
        discriminator,
        ratio,
        None if discriminator is None else partial(teacher_samples, guided, prompts, scene.orbit, spec.shape),
    )
    return method, saved.SceneSpec(scene, spec.picture, spec)


def _samples(config: Config, stage: SceneStage, scene: saved.Scene) -> int:
    """Samples a ray that fit into memory at the stage's largest resolution; says so where that is fewer."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    views = config.train.batch_size // (state.num_processes * config.train.gradient_accumulation_steps)
    size = max(size for _, size in stage.resolutions)
    samples = fitting_samples(scene.field, views, size, stage.samples, free_bytes(torch.device(state.device or "cpu")))
    if samples < stage.samples and state.is_main_process:
        print(f"{stage.name}: {samples} samples a ray in the place of {stage.samples}, so that {size} x {size} fits")
    return samples


def enlarge(method: SceneDistillation) -> int:
    """Let a new stage draw at the largest size of its schedule from the start, for an estimate; returns that size."""
    size = max(size for _, size in method.stage.resolutions)
    method.stage = method.stage.model_copy(update={"resolutions": [(0.0, size)]})
    return size


@torch.no_grad()
def teacher_samples(
    teacher: Guided, prompts: Prompts, orbit: Orbit, shape: tuple[int, int, int], count: int = 64, steps: int = 18
) -> Batch:
    """``count`` of the teacher's own x0, in Heun steps, with the views that they were asked for."""
    draws = Draws([mix(7, index) for index in range(count)])
    cameras = [orbit.camera(row) for row in torch.stack([draws.uniform() for _ in range(6)], 1).tolist()]
    cond = replace(prompts.teacher(cameras), camera=camera_to_world(cameras).flatten(1))
    z = draws.normal(*shape)
    device = next(teacher.parameters()).device
    parts = (slice(first, first + 16) for first in range(0, count, 16))
    made = torch.cat([heun(teacher, z[p].to(device), cond[p].to(device), steps) for p in parts])
    return Batch(made, cond.to(device))


def _generator(settings: Settings, stage: SceneStage, scene: saved.Scene) -> tuple[Generator, int]:
    """The particles at step 0, new fields or what the stage before left, and the fields' samples a ray."""
    if settings.start is None:
        if stage.kind == "volume":
            return scene.new(), scene.samples
        raise UserError(f"method.start: the stage {stage.name} needs the run folder of the stage before")
    before = settings.start / "student"
    if stage.kind == "volume":
        fields = _fused(settings, saved.load_fields(before)[1].train())
        fields.samples = scene.samples
        return fields, fields.samples
    if stage.kind == "texture":
        _, meshes, fields = saved.load_meshes(before)
        _fused(settings, fields)
        return Texture(meshes, fields, stage.picture), fields.samples
    if "mesh.0.vertices" in saved.read(before)[1]:
        raise UserError(f"method.stages: {stage.name} is of kind geometry and starts from a stage of kind volume")
    _, fields = saved.load_fields(before)
    threshold = settings.export.threshold
    levels = [threshold or find_threshold(fields, index, scene.orbit) for index in range(scene.particles)]
    return Geometry(fields, levels, stage.tetrahedra, stage.picture), fields.samples


def _fused(settings: Settings, fields: Fields) -> Fields:
    """With tiny-cuda-nn's kernels, if the settings want them: folders have plain fields."""
    for field in fields.all():
        if settings.field.fused and isinstance(field, HashGrid):
            field.fuse()
    return fields


def write_files(config: Config, settings: Settings) -> Path:
    """The scene's files with the card of the last stage that has run, which they are made from; their folder."""
    from models.scene.export import Sizes, export
    from models.scene.surface import Picture

    done = [run for run in runs(config, settings) if (run.output / "student" / "scene.json").is_file()]
    last = cast(Settings, done[-1].method)
    picture: Picture = next(stage.picture for stage in last.stages if stage.name == last.stage)
    output = folder(config) / "student"
    stage = done[-1].output / "student"
    export(stage, output, Sizes(**settings.export.model_dump()), picture)
    replace_text(output / "README.md", (stage / "README.md").read_text())
    print(f"scene: {output}")
    return output
