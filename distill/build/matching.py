"""The methods of the distribution-matching family."""

import random
from dataclasses import replace
from typing import Any, cast

from distill import checkpoint, rows
from distill.build.data import Shape, all_texts
from distill.build.networks import check_kind, load_weights, trainable
from distill.build.teacher import load_teacher
from distill.data import Captions, Classes
from distill.divergences import DIVERGENCES, Divergence, alpha
from distill.methods.base import Method
from distill.methods.distribution_matching import DistributionMatching
from distill.pairs import Pairs
from distill.ratio import Ratio
from distill.settings import (
    DMD2,
    GAN,
    SDS,
    SIM,
    ConditionsOnly,
    Config,
    DiffInstruct,
    DivergenceMatching,
    FDistill,
    HFData,
    ImageFolderData,
    MatchingMethod,
    PrecomputedData,
    SiD,
    SiDA,
    SolidsData,
    UniInstruct,
)
from distill.stored import Stored
from models.denoiser import Denoiser, Guided
from models.discriminator import Discriminator, feature_channels
from models.errors import UserError
from models.prompts import read_prompts
from models.scene import captions
from models.student import OneStepStudent
from models.teachers import base, load
from models.teachers.base import ClassSpec, TextSpec
from models.teachers.embedded import Spec


def _divergence(settings: DivergenceMatching) -> Divergence:
    return alpha(settings.order) if settings.divergence == "alpha" else DIVERGENCES[settings.divergence]


def build_row(settings: MatchingMethod) -> rows.Row:
    """The method's row of the table."""
    match settings:
        case SDS():
            return rows.sds()
        case DiffInstruct() | DMD2():
            return rows.reverse_kl()
        case FDistill():
            return rows.f_distill(_divergence(settings))
        case SIM():
            return rows.sim(settings.huber)
        case SiD() | SiDA():
            return rows.sid(settings.alpha)
        case UniInstruct():
            return rows.uni_instruct(_divergence(settings))


def build_ratio(settings: MatchingMethod) -> Ratio | None:
    """The density ratio's part, for rows with a divergence other than reverse KL."""
    if not isinstance(settings, DivergenceMatching) or settings.divergence == "reverse_kl":
        return None
    stages = (settings.normalize_ratio, settings.normalize_weight)
    return Ratio(_divergence(settings), settings.bins, settings.ratio_decay, settings.ratio_clip, stages)


def _check_start(settings: MatchingMethod, own: Spec, spec: Spec) -> None:
    """UserError if a student to start from is not of this teacher's kind."""
    if own.student_of_class is not None:
        raise UserError(f"method.start: {settings.start} holds several students; name the run of one, student-K/STAGE")
    if own.sigma_init not in (None, settings.sigma_init):
        raise UserError(
            f"method.start: {settings.start} has sigma_init {own.sigma_init}, this run {settings.sigma_init}"
        )
    if (own.channels, own.size, own.num_classes) != (spec.channels, spec.size, spec.num_classes):
        raise UserError(
            f"method.start: {settings.start} makes {own.channels} x {own.size} x {own.size} of {own.num_classes} "
            f"classes, the teacher {spec.channels} x {spec.size} x {spec.size} of {spec.num_classes}"
        )


def _start(
    config: Config, settings: MatchingMethod, teacher: Denoiser, spec: ClassSpec | TextSpec
) -> tuple[Denoiser, ClassSpec | TextSpec, Denoiser]:
    """The student's network and spec at step 0, and the critic's network."""
    critic = trainable(config, teacher, "critic")
    if settings.start is None:
        return trainable(config, teacher, "student"), spec, critic
    run = settings.start if (settings.start / "student").is_dir() else None
    if config.lora is not None:
        if run is None or not checkpoint.list_steps(run / "checkpoints"):
            raise UserError(f"method.start: with lora it is a run folder with checkpoints, {settings.start} is none")
        student = trainable(config, teacher, "student")
        load_weights(OneStepStudent(student, 0.0), run, "student")
        load_weights(critic, run, "critic")
        return student, spec, critic
    denoiser, own = load(settings.start / "student" if run else settings.start)
    if isinstance(own, Spec) and isinstance(spec, Spec):
        _check_start(settings, own, spec)
    check_kind(settings.start, own, spec)
    if run:
        load_weights(critic, run, "critic")
    if isinstance(own, TextSpec) and isinstance(spec, TextSpec) and spec.texts is not None:
        known = replace(cast(Any, own), examples=spec.examples)
        own = known.without_encoders(spec.texts, isinstance(config.data, PrecomputedData | ConditionsOnly))
    return denoiser.train(), own, critic


def build_matching(
    config: Config, settings: MatchingMethod, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
    """Student, critic and discriminator of a row of the table, and the spec of the exported student; UserError where
    settings, teacher and data do not fit each other."""
    denoiser, spec = load_teacher(config, shape, class_names)
    assert config.teacher is not None
    if isinstance(spec, TextSpec) and spec.control is not None:
        raise UserError(f"method.kind: prompts have no lines for {config.teacher.path} to follow: choose consistency")
    conditions = _conditions(config, spec)
    gan: GAN | None = getattr(settings, "gan", None)
    density_ratio = build_ratio(settings)
    if density_ratio is not None and gan is None:
        raise UserError("method.gan: a divergence other than reverse_kl needs the discriminator's density ratio")
    discriminator = None
    if gan is not None:
        if shape is None:
            raise UserError(
                f"data.kind: {settings.kind} has a discriminator and needs pictures; conditions_only has none"
            )
        discriminator = Discriminator(feature_channels(denoiser, gan.taps, spec.shape, spec.preview(1)), gan.width)
    if not isinstance(spec, Spec) and (settings.regression or settings.clip_samples):
        raise UserError("method: regression and clip_samples are for students of classes in pixel space")
    pairs = None
    if settings.regression is not None:
        pairs = Pairs(settings.regression.path, spec.shape, settings.regression.every, denoiser)
    row = build_row(settings)
    denoiser.requires_grad_(False)
    network, own, critic = _start(config, settings, denoiser, spec)
    own = own.begun(denoiser.process, settings.sigma_init)
    t_init, unit = own.beginning(denoiser.process)
    student = OneStepStudent(network.requires_grad_(True), t_init, settings.clip_samples, unit)
    method = DistributionMatching(
        settings,
        row,
        Guided(denoiser, config.teacher.guidance),
        student,
        critic.requires_grad_(True) if row.critic else None,
        conditions,
        spec.shape,
        discriminator,
        density_ratio,
        pairs,
        own.later(settings.student_steps),
    )
    return method, own


def _conditions(config: Config, spec: ClassSpec | TextSpec) -> Classes | Captions:
    """What the student is asked for in training."""
    data = config.data
    file = data.prompts if isinstance(data, ConditionsOnly | HFData) else None
    if isinstance(spec, ClassSpec):
        if file is not None:
            raise UserError("data.prompts: this teacher is asked for classes, not prompts; remove the key")
        return Classes(spec.num_classes, config.classes)
    if file is not None:
        return Captions.of(read_prompts(file), spec)
    match data:
        case PrecomputedData():
            stored = Stored(data.path)
            return Captions(len(stored), stored.texts)
        case SolidsData():
            drawn = {captions.draw(random.Random(i))["prompt"] for i in range(20000)}
            return Captions.of(sorted(drawn - captions.held_out()), spec)
        case ImageFolderData():
            return Captions.of(all_texts(data), spec)
        case HFData() if not data.streaming and data.caption_column:
            return Captions.of(all_texts(data), spec)
    raise UserError("data.prompts: missing; a text file with a prompt in each line")
