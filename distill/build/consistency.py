"""Continuous-time consistency with an adversarial term."""

import copy
import math
from pathlib import Path
from typing import cast

from distill.build.data import Shape
from distill.build.networks import check_kind, trainable
from distill.build.teacher import load_teacher
from distill.consistency_losses import nu_floor
from distill.methods.base import Method
from distill.methods.consistency import ConsistencyDistillation
from distill.settings import Config, Consistency
from models.denoiser import Denoiser
from models.discriminator import TokenDiscriminator, feature_channels
from models.errors import UserError
from models.teachers import base, load, sana
from models.teachers.base import ClassSpec, TextSpec
from models.teachers.sana import SanaNetwork
from models.trigflow import FlowStudent, LogVariance, TrigFlowView


def _other_start(config: Config, path: Path, teacher: Denoiser, spec: ClassSpec | TextSpec) -> Denoiser:
    """A student's network to go on from, with a copy of the teacher's control branch if it has none."""
    if config.lora is not None:
        raise UserError("method.start: not with lora; its adapters start at the teacher")
    run = path / "student"
    denoiser, own = load(run if run.is_dir() else path)
    check_kind(path, own, spec)
    if isinstance(denoiser.network, SanaNetwork) and denoiser.network.control is None:
        denoiser.network.control = copy.deepcopy(cast(SanaNetwork, teacher.network).control)
    return denoiser.train()


def build_consistency(
    config: Config, settings: Consistency, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
    """The student as a TrigFlow network with its discriminator, and the spec of the exported student; UserError where
    settings, teacher and data do not fit each other."""
    teacher, spec = load_teacher(config, shape, class_names)
    if config.teacher is not None and config.teacher.guidance != 1:
        raise UserError("teacher.guidance: `consistency` takes its scales from method.guidance; remove the key")
    if shape is None:
        raise UserError("data.kind: `consistency` needs pictures, conditions_only has none")
    discriminator = None
    if settings.ladd is not None and settings.ladd.weight > 0:
        channels = feature_channels(teacher, settings.ladd.taps, spec.shape, spec.preview(1))
        discriminator = TokenDiscriminator(channels, settings.ladd.width)
    teacher.requires_grad_(False)
    if settings.start is None:
        student = trainable(config, teacher, "student")
    else:
        student = _other_start(config, settings.start, teacher, spec)
    network = student.network
    told = isinstance(network, SanaNetwork) and settings.guidance != [1.0]
    if told and isinstance(network, SanaNetwork):
        network.transformer = sana.with_guidance(network.transformer)
    elif len(settings.guidance) > 1 or (isinstance(spec, ClassSpec) and settings.guidance != [1.0]):
        known = "one scale alone" if isinstance(spec, TextSpec) else "[1.0]"
        raise UserError(f"method.guidance: this student's network embeds no guidance scale: give {known}")
    scale_data = settings.sigma_data if settings.scale_data else 1.0
    view = TrigFlowView(student.requires_grad_(True), settings.sigma_data, scale_data)
    floor = nu_floor(settings.tangent_norm, math.prod(spec.shape))
    nu = LogVariance(floor) if settings.adaptive_weight else None
    scales = sorted(settings.guidance)
    own = spec.begun_flow(view, scales[len(scales) // 2])
    flow, first = FlowStudent(view, nu), own.one_step(student)
    return ConsistencyDistillation(settings, teacher, flow, discriminator, told=told, one_step=first), own
