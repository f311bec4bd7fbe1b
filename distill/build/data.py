"""The pictures and conditions that a run learns from."""

from collections.abc import Callable
from glob import glob
from tarfile import TarError
from typing import Any

import torch
from torch import Tensor

from distill.class_names import KnownClasses
from distill.data import (
    Columns,
    FashionMNIST,
    HFPictures,
    ImageFolder,
    Pictures,
    ShuffledStream,
    SolidsPictures,
    Stream,
    StreamedPictures,
    Subset,
)
from distill.settings import (
    Autoencoder,
    ConditionsOnly,
    Config,
    FashionMNISTData,
    HFData,
    ImageFolderData,
    PrecomputedData,
    Pretrain,
    SolidsData,
)
from distill.source import check_unchanged
from distill.stored import Stored
from distill.tars import whole_tars
from models.errors import UserError
from models.teachers import class_names

Shape = tuple[int, int, int]

BUILDERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "webdataset"}
"""Names of readers in the place of a data set's."""

EXAMPLES = 20
"""Pictures or prompts of a sample grid."""


def hf_dataset(data: HFData, seed: int = 0) -> Any:
    """The data set of ``data``; an iterable one is shuffled, shards alone."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError("data.kind hf_dataset needs the library `datasets`: pip install -e '.[data]'") from error
    if data.path in BUILDERS:  # without files they read all that lies in this folder, or end in an IndexError
        if data.data_files is None:
            raise UserError(f"data.data_files: missing; {data.path} reads files: name them, e.g. 'shards/*.tar'")
        if "://" not in data.data_files and not glob(data.data_files, recursive=True):
            raise UserError(
                f"data.data_files: there is no file {data.data_files}: wildcards are *, ** and ?, not {{000..009}}"
            )
    try:
        with whole_tars():
            dataset: Any = datasets.load_dataset(
                data.path, data_files=data.data_files, split=data.split, streaming=data.streaming
            )
    except (OSError, ValueError, LookupError, EOFError, TarError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        raise UserError(f"data.path: {data.path} cannot be loaded: {' '.join(reason.split())[:300]}") from error
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))  # models/pictures.py decodes
    if data.streaming:
        dataset = dataset.shuffle(seed=seed, buffer_size=1)  # a larger buffer would not be resumed exactly
    return dataset


def _of_classes(classes: list[int], columns: Columns) -> Callable[[dict[str, Any]], bool]:
    """Whether a row of a streamed data set is of these classes."""
    allowed = set(classes)
    return lambda row: (columns.class_id(row[columns.label]) if columns.label else 0) in allowed


def _known_classes(config: Config) -> KnownClasses | None:
    """The classes of the run's teacher; None without one, or for a teacher of prompts."""
    data, teacher = config.data, config.teacher
    if teacher is None or not isinstance(data, ImageFolderData | HFData):
        return None
    names = class_names(teacher.path, teacher.config)
    return None if names is None else KnownClasses(names, teacher.path, data.classes_by)


def _image_folder(data: ImageFolderData, known: KnownClasses | None = None) -> ImageFolder:
    return ImageFolder(
        data.path,
        data.size,
        data.channels,
        data.workers,
        background=data.background,
        captions_from=data.captions_from,
        caption_column=data.caption_column,
        caption=data.caption,
        known=known,
        skip=data.on_bad_picture == "skip",
    )


def _columns(data: HFData) -> Columns:
    return Columns(data.image_column, data.label_column, data.caption_column, data.caption, data.background)


def _hf_pictures(data: HFData, known: KnownClasses | None = None) -> HFPictures:
    shape = (data.channels, data.size, data.size)
    return HFPictures(hf_dataset(data), shape, _columns(data), known, data.on_bad_picture == "skip")


def all_texts(data: ImageFolderData | HFData) -> list[str]:
    """All captions that pictures may be told."""
    pictures = _image_folder(data) if isinstance(data, ImageFolderData) else _hf_pictures(data)
    return pictures.texts


def has_classes(config: Config) -> bool:
    """Whether the data are a Hugging Face data set of classes; those of a stream may have no names."""
    return isinstance(config.data, HFData) and config.data.caption_column is None


def is_folder(config: Config) -> bool:
    return isinstance(config.data, ImageFolderData)


def _reads_latents(method: Any) -> bool:
    """Whether a method can learn from latents in the place of pictures."""
    return not isinstance(method, Autoencoder) and (not isinstance(method, Pretrain) or method.sana is not None)


def build_stream(config: Config, rank: int, world: int) -> tuple[Stream | None, Shape | None, list[str]]:
    """Supply of pictures, their shape (C, H, W) and class names; None, None and [] without pictures."""
    data, seed = config.data, config.train.seed
    size = config.train.batch_size // (world * config.train.gradient_accumulation_steps)
    pictures: Pictures
    groups: Tensor | None = None
    match data:
        case FashionMNISTData():
            pictures = FashionMNIST(data.path)
        case ImageFolderData():
            pictures = _image_folder(data, _known_classes(config))
        case HFData(streaming=True):
            dataset = hf_dataset(data, seed)
            columns, names = _columns(data).of(_known_classes(config), dataset.features)
            shape = (data.channels, data.size, data.size)
            if config.classes is not None:
                if columns.caption:
                    raise UserError("classes: these pictures have captions, not classes")
                dataset = dataset.filter(_of_classes(config.classes, columns))
            skip = data.on_bad_picture == "skip"
            return StreamedPictures(dataset, size, shape, columns, rank, world, skip), shape, names
        case HFData():
            pictures = _hf_pictures(data, _known_classes(config))
        case SolidsData():
            if data.device != "cpu" and not torch.cuda.is_available():
                raise UserError(f"data.device: {data.device}, but there is no GPU here: give cpu")
            pictures = SolidsPictures(
                data.count, data.size, data.turntable, data.pairs, data.device, data.workers, data.keep
            )
        case ConditionsOnly():
            return None, None, []
        case PrecomputedData():
            if not _reads_latents(config.method):
                raise UserError(f"data.kind: `{config.method.kind}` learns from pictures, not from their latents")
            pictures = Stored(data.path)
            check_unchanged(data.path, pictures.facts)
            if not pictures.pictures:
                return None, None, []
            groups = pictures.groups if data.streaming else None
    if len(pictures) == 0:
        raise UserError(f"data: no pictures in {data}")
    if config.classes is not None:
        pictures = Subset(pictures, config.classes)
        groups = None if groups is None else groups[pictures.indices]
    return ShuffledStream(pictures, size, seed, rank, world, groups), pictures.shape, pictures.class_names
