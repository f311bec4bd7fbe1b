"""The teacher, checked against the data and the method."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from distill.build.data import Shape, all_texts, has_classes, is_folder
from distill.class_names import KnownClasses
from distill.settings import (
    ConditionsOnly,
    Config,
    Consistency,
    FashionMNISTData,
    HFData,
    ImageFolderData,
    PrecomputedData,
    SolidsData,
    Teacher,
)
from distill.stored import Stored, cached
from models.denoiser import Denoiser
from models.errors import UserError
from models.prompts import read_prompts
from models.teachers import load
from models.teachers.base import ClassSpec, Texts, TextSpec
from models.teachers.class_pipeline import ClassPipelineSpec
from models.teachers.embedded import Spec
from models.teachers.pipeline import PipelineSpec


def load_teacher(
    config: Config, shape: Shape | None = None, class_names: Sequence[str] = ()
) -> tuple[Denoiser, ClassSpec | TextSpec]:
    """The teacher's denoiser; UserError if there is none, or if it makes other pictures or classes than the data's."""
    teacher = config.teacher
    if teacher is None:
        raise UserError(
            f"teacher: missing; {config.method.kind} distils one, e.g. teacher: {{path: embedded:fashion_mnist}}"
        )
    denoiser, spec = load(teacher.path, teacher.size, teacher.tokens, teacher.config)
    if spec.student:
        raise UserError(f"teacher.path: {teacher.path} is a one-step student: name the teacher that it was made from")
    if isinstance(spec, PipelineSpec | ClassPipelineSpec):
        spec = replace(spec, offload=teacher.offload)
    if teacher.distilled is not None:
        if not isinstance(spec, PipelineSpec):
            raise UserError(f"teacher.distilled: only for stock text-to-image pipelines, which {teacher.path} is not")
        spec = spec.known_distilled(teacher.distilled)
    if shape is not None and shape != spec.picture:
        raise UserError(f"data: pictures of shape {shape}, but the teacher {teacher.path} makes {spec.picture}")
    if isinstance(spec, TextSpec):
        if class_names or config.classes is not None or has_classes(config):
            hint = ": put captions beside them, name.txt or metadata.jsonl" if is_folder(config) else ""
            raise UserError(f"data: pictures of classes, but the teacher {teacher.path} is asked for prompts{hint}")
        scales = {teacher.guidance, *(config.method.guidance if isinstance(config.method, Consistency) else [])}
        if not spec.guidable and scales != {1.0}:
            raise UserError(
                f"guidance: {teacher.path} is a distilled teacher without an unconditional answer ({spec.unguided}): "
                "give 1, or teacher.distilled: false if that is wrong"
            )
        return denoiser, _without_encoders(config, teacher, spec)
    if teacher.cache is not None:
        raise UserError(f"teacher.cache: {teacher.path} knows classes, which need no text encoder: remove the key")
    if isinstance(config.data, PrecomputedData):
        Stored(config.data.path).check(spec, teacher.path)
    told = isinstance(config.data, HFData) and config.data.caption_column is not None
    if told or isinstance(config.data, SolidsData):
        raise UserError(f"data: pictures with captions, but the teacher {teacher.path} knows classes")
    if shape is not None and not class_names and is_folder(config):
        raise UserError(
            f"data: pictures with captions, but the teacher {teacher.path} knows classes: data.captions_from: none"
        )
    if spec.num_classes == 1 and teacher.guidance != 1:
        raise UserError(f"teacher.guidance: {teacher.path} knows no classes, hence no guidance: give 1")
    if len(class_names) > spec.num_classes:
        raise UserError(f"data: {len(class_names)} classes, but the teacher {teacher.path} knows {spec.num_classes}")
    if isinstance(config.data, FashionMNISTData | PrecomputedData):
        KnownClasses(spec.class_names, teacher.path).check_places(class_names)
    if config.classes is not None and not set(config.classes) <= set(range(spec.num_classes)):
        raise UserError(f"classes: {config.classes} are not among the teacher's 0 to {spec.num_classes - 1}")
    return denoiser, spec


def _without_encoders(config: Config, teacher: Teacher, spec: TextSpec) -> TextSpec:
    """The spec without the encoders that this run will not ask, if there is somewhere else to take embeddings from."""
    if isinstance(config.data, PrecomputedData):
        if spec.control is not None:
            raise UserError(
                f"data.kind: {teacher.path} follows lines, which are drawn from pictures; precomputed has none"
            )
        Stored(config.data.path).check(spec, teacher.path)
        known = spec.text(spec.examples)
        return spec.without_encoders(Texts(spec.examples, lambda indices: known[torch.tensor(indices)]), True)
    if teacher.cache is None:
        return spec
    match config.data:
        case ConditionsOnly(prompts=file) | HFData(streaming=False, prompts=file):
            prompts = [] if file is None else read_prompts(file)
        case ImageFolderData():
            prompts = []
        case _:
            raise UserError("teacher.cache: the captions of these data cannot be listed: use distill.precompute")
    if isinstance(config.data, HFData | ImageFolderData):
        prompts += all_texts(config.data)
    known = cached(teacher.cache, spec, [*prompts, *spec.examples], teacher.path, teacher.tokens)
    return spec.without_encoders(known, isinstance(config.data, ConditionsOnly))


def class_teacher(config: Config, shape: Shape | None = None, class_names: Sequence[str] = ()) -> tuple[Denoiser, Spec]:
    """As :func:`load_teacher`, of one like the embedded teacher of classes."""
    denoiser, spec = load_teacher(config, shape, class_names)
    if isinstance(spec, TextSpec):
        raise UserError(f"method.kind: {config.method.kind} distils teachers of classes, this one is asked for prompts")
    if not isinstance(spec, Spec):
        raise UserError(f"method.kind: {config.method.kind} distils the project's own U-Nets alone")
    return denoiser, spec
