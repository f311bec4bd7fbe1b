"""From settings to objects: the one place where the kinds of data and method are told apart."""

import copy
from typing import Any

import torch

from distill.data import (
    Classes,
    FashionMNIST,
    HFPictures,
    ImageFolder,
    Pictures,
    ShuffledStream,
    Stream,
    StreamedPictures,
)
from distill.divergences import DIVERGENCES, alpha
from distill.methods.base import Method
from distill.methods.distribution_matching import DistributionMatching, DistributionSettings
from distill.methods.pretrain import Pretraining
from distill.pairs import Pairs
from distill.ratio import RatioWeight
from distill.settings import (
    DMD2,
    ConditionsOnly,
    Config,
    DiffInstruct,
    FashionMNISTData,
    FDistill,
    HFData,
    ImageFolderData,
    Pretrain,
)
from models.denoiser import Denoiser, Guided
from models.discriminator import Discriminator, feature_channels
from models.errors import UserError
from models.process import EDM
from models.student import OneStepStudent
from models.teachers import load
from models.teachers.embedded import PatchUNet, Spec

Shape = tuple[int, int, int]


def hf_dataset(data: HFData, rank: int, world: int) -> Any:
    """The data set of ``data``; an iterable one is split over processes."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError("data.kind hf_dataset needs the library `datasets`: pip install -e '.[data]'") from error
    try:
        dataset: Any = datasets.load_dataset(
            data.path, data_files=data.data_files, split=data.split, streaming=data.streaming
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"data.path: {data.path} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if data.streaming and world > 1:
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(dataset, rank, world)
    return dataset


def build_stream(config: Config, rank: int, world: int) -> tuple[Stream | None, Shape | None, list[str]]:
    """Supply of pictures, their shape (C, H, W) and class names; None, None and [] without pictures."""
    data, seed = config.data, config.train.seed
    size = config.train.batch_size // (world * config.train.gradient_accumulation_steps)
    pictures: Pictures
    match data:
        case FashionMNISTData():
            pictures = FashionMNIST(data.path)
        case ImageFolderData():
            pictures = ImageFolder(data.path, data.size, data.channels, data.workers)
        case HFData():
            dataset = hf_dataset(data, rank, world)
            rows = HFPictures(dataset, data.size, data.channels, data.image_column, data.label_column)
            if data.streaming:
                stream = StreamedPictures(dataset, size, rows.shape, data.image_column, data.label_column)
                return stream, rows.shape, rows.class_names
            pictures = rows
        case ConditionsOnly():
            return None, None, []
    if len(pictures) == 0:
        raise UserError(f"data: no pictures in {data}")
    return ShuffledStream(pictures, size, seed, rank, world), pictures.shape, pictures.class_names


def build_method(config: Config, shape: Shape | None, class_names: list[str]) -> tuple[Method, Spec]:
    """The method with its networks, and the spec that the exported student will carry.

    UserError where settings, teacher and data do not fit each other.
    """
    match config.method:
        case Pretrain():
            return _pretraining(config, config.method, shape, class_names)
        case DMD2() | DiffInstruct() | FDistill():
            return _matching(config, config.method, shape)


def _pretraining(
    config: Config, settings: Pretrain, shape: Shape | None, class_names: list[str]
) -> tuple[Method, Spec]:
    if config.teacher is not None:
        raise UserError(
            "teacher: `pretrain` trains a teacher and takes none; remove the key or choose another method.kind"
        )
    if shape is None:
        raise UserError("data.kind: `pretrain` needs pictures, conditions_only has none")
    channels, size, _ = shape
    levels = settings.patch * 2 ** (len(settings.channels) - 1)
    if size % levels:
        raise UserError(f"data: side {size} is not a multiple of {levels} = method.patch x 2^(levels - 1)")
    network = PatchUNet.create(channels, size, len(class_names), settings.channels, settings.patch, settings.layers)
    process = EDM()
    spec = Spec(settings.patch, len(class_names), channels, size, settings.sigma_data, None, class_names)
    return Pretraining(settings, Denoiser(network, process, "edm", settings.sigma_data)), spec


def _matching(config: Config, settings: DistributionSettings, shape: Shape | None) -> tuple[Method, Spec]:
    if config.teacher is None:
        raise UserError(
            f"teacher: missing; {settings.kind} distils one, e.g. teacher: {{path: embedded:fashion_mnist}}"
        )
    denoiser, spec = load(config.teacher.path)
    expected = (spec.channels, spec.size, spec.size)
    if shape is not None and shape != expected:
        raise UserError(f"data: pictures of shape {shape}, but the teacher {config.teacher.path} makes {expected}")
    discriminator = ratio = None
    if not isinstance(settings, DiffInstruct):
        if shape is None:
            raise UserError(
                f"data.kind: {settings.kind} has a discriminator and needs pictures; conditions_only has none"
            )
        widths = feature_channels(denoiser, settings.gan.taps, expected)
        discriminator = Discriminator(widths, settings.gan.width)
    if isinstance(settings, FDistill):
        divergence = alpha(settings.order) if settings.divergence == "alpha" else DIVERGENCES[settings.divergence]
        stages = (settings.normalize_ratio, settings.normalize_weight)
        ratio = RatioWeight(divergence, settings.bins, settings.ratio_decay, settings.ratio_clip, stages)
    pairs = Pairs(settings.regression.path, expected, settings.regression.every) if settings.regression else None
    start = denoiser.process.time_from_ratio(torch.tensor(settings.sigma_init, dtype=torch.float64))
    student = OneStepStudent(copy.deepcopy(denoiser), float(start), settings.clip_samples)
    critic = copy.deepcopy(denoiser)
    teacher = Guided(denoiser.requires_grad_(False), config.teacher.guidance)
    conditions = Classes(spec.num_classes)
    spec = Spec(**{**spec.__dict__, "sigma_init": settings.sigma_init})
    return (
        DistributionMatching(settings, teacher, student, critic, conditions, expected, discriminator, ratio, pairs),
        spec,
    )
