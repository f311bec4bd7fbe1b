"""From settings to objects: the one place where the kinds of data and method are told apart."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from tarfile import TarError
from typing import Any, cast

import torch
from diffusers import AutoencoderDC
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import checkpoint, rows
from distill.build_scene import build_stage
from distill.class_names import KnownClasses
from distill.consistency_losses import nu_floor
from distill.data import (
    Captions,
    Classes,
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
from distill.divergences import DIVERGENCES, Divergence, alpha
from distill.methods.autoencoder import AutoencoderTraining
from distill.methods.base import Method
from distill.methods.consistency import ConsistencyDistillation
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.pretrain import Pretraining
from distill.pairs import Pairs
from distill.ratio import Ratio
from distill.settings import (
    DMD2,
    GAN,
    SDS,
    SIM,
    Autoencoder,
    ConditionsOnly,
    Config,
    Consistency,
    DiffInstruct,
    DivergenceMatching,
    FashionMNISTData,
    FDistill,
    HFData,
    ImageFolderData,
    LoRA,
    MatchingMethod,
    MultiStudent,
    PrecomputedData,
    Pretrain,
    SanaSize,
    SceneDistillation,
    ScoreMatching,
    SiD,
    SiDA,
    SolidsData,
    Teacher,
    UniInstruct,
)
from distill.source import check_unchanged
from distill.stored import Stored, cached
from distill.tars import whole_tars
from eval.binding import Binding
from models import autoencoder
from models.adapters import Adapted, checkpointed
from models.autoencoder import PictureSpec
from models.controlnet import BranchAlone, SanaControlBranch, edges
from models.denoiser import CoreNetwork, Denoiser, Guided
from models.discriminator import Discriminator, TokenDiscriminator, feature_channels
from models.errors import UserError
from models.process import EDM
from models.prompts import read_prompts
from models.scene import captions
from models.student import OneStepStudent
from models.teachers import base, class_names, load, sana
from models.teachers.base import ClassSpec, Texts, TextSpec
from models.teachers.class_pipeline import ClassPipelineSpec
from models.teachers.embedded import PatchUNet, Spec
from models.teachers.pipeline import PipelineSpec
from models.teachers.sana import SanaNetwork, SanaSpec
from models.trigflow import FlowStudent, LogVariance, TrigFlowView

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


def _texts(data: ImageFolderData | HFData) -> list[str]:
    """All captions that pictures may be told."""
    pictures = _image_folder(data) if isinstance(data, ImageFolderData) else _hf_pictures(data)
    return pictures.texts


def _has_classes(config: Config) -> bool:
    """Whether the data are a Hugging Face data set of classes; those of a stream may have no names."""
    return isinstance(config.data, HFData) and config.data.caption_column is None


def _is_folder(config: Config) -> bool:
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


def build_method(
    config: Config, shape: Shape | None, class_names: list[str], stream: Stream | None = None
) -> tuple[Method, base.Spec]:
    """The method with its networks, and the spec that the exported student will carry.

    UserError where settings, teacher and data do not fit each other.
    """
    method, spec = _build_method(config, shape, class_names, stream)
    if config.train.gradient_checkpointing:
        with_checkpointing(method.networks)
    return method, spec


def _build_method(
    config: Config, shape: Shape | None, class_names: list[str], stream: Stream | None
) -> tuple[Method, base.Spec]:
    if config.lora is not None and isinstance(config.method, Autoencoder | Pretrain):
        raise UserError(f"lora: `{config.method.kind}` trains no adapters; remove the key")
    match config.method:
        case Autoencoder():
            return _autoencoder(config.method, shape, stream)
        case Consistency():
            return _consistency(config, config.method, shape, class_names)
        case MultiStudent():
            raise ValueError("multi_student is a plan of runs, not one run")
        case SceneDistillation():
            return build_stage(config, config.method)
        case ScoreMatching():
            return _score_matching(config, config.method, shape, class_names)
        case Pretrain():
            return _pretraining(config, config.method, shape, class_names, stream)
        case _:
            return _matching(config, config.method, shape, class_names)


def _new_autoencoder(settings: Autoencoder) -> AutoencoderDC:
    """One with random weights, or with those of the autoencoder that it starts from; UserError if that has other
    latents."""
    sizes = settings.channels, settings.latent_channels, settings.layers
    vae = sana.new_autoencoder(*sizes, settings.decoder_channels, settings.decoder_layers)
    if settings.start is None:
        return vae
    old = autoencoder.load(settings.start)
    try:
        cast(Any, vae).encoder.load_state_dict(cast(Any, old).encoder.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"method.start: {settings.start} has an encoder of other sizes than channels, layers"
        ) from error
    decoder, weights = cast(Any, vae).decoder, cast(Any, old).decoder.state_dict()
    own = decoder.state_dict()
    if {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in weights.items()}:
        decoder.load_state_dict(weights)
    vae.register_to_config(scaling_factor=old.config["scaling_factor"])
    return vae


def _autoencoder(settings: Autoencoder, shape: Shape | None, stream: Stream | None) -> tuple[Method, base.Spec]:
    if shape is None or stream is None:
        raise UserError("data.kind: `autoencoder` needs pictures, conditions_only has none")
    levels = 2 ** len(settings.channels)
    if shape[0] != 3 or shape[1] % levels:
        raise UserError(f"data: an autoencoder takes 3 channels and a side that is a multiple of {levels}, not {shape}")
    vae = _new_autoencoder(settings)
    side = shape[1] // levels
    examples = stream.next().images[:EXAMPLES]
    return AutoencoderTraining(settings, vae, (settings.latent_channels, side, side), examples), PictureSpec(shape)


def sana_spec(sizes: SanaSize, picture: Shape) -> SanaSpec:
    """All of a new miniature Sana but its transformer; ``picture`` is the shape of the data's. UserError if autoencoder
    or text encoder are missing or do not fit."""
    vae = autoencoder.load(sizes.autoencoder)
    ratio = vae.spatial_compression_ratio
    if picture[1] % ratio:
        raise UserError(f"data.size: {picture[1]} is not a multiple of {ratio}, the autoencoder's")
    tokenizer = sana.new_tokenizer(captions.VOCABULARY, sizes.max_length)
    text_encoder: nn.Module = sana.new_text_encoder(
        len(tokenizer), sizes.text_width, sizes.text_depth, sizes.max_length
    )
    if sizes.text_encoder is not None:
        weights = sizes.text_encoder / "text_encoder" / "model.safetensors"
        try:
            text_encoder.load_state_dict(load_file(weights))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"method.sana.text_encoder: {weights} is missing or of other sizes: `python -m distill.text_encoder`"
            ) from error
    examples = tuple(m["prompt"] for m in captions.prompts(captions.EVALUATION, EXAMPLES))
    shape = (vae.config["latent_channels"], picture[1] // ratio, picture[1] // ratio)
    return SanaSpec(tokenizer, text_encoder.eval(), vae, shape, 1.0, examples=examples)


def _sana(config: Config, settings: Pretrain, sizes: SanaSize, shape: Shape) -> tuple[Method, base.Spec]:
    """A new miniature Sana for the solids world's words. Its text encoder is trained too, unless the data bring its
    embeddings."""
    if not isinstance(config.data, SolidsData | PrecomputedData):
        raise UserError("data.kind: a text-to-image teacher learns from pictures with captions: choose solids")
    spec = sana_spec(sizes, shape)
    transformer = sana.new_transformer(spec.shape[0], spec.shape[1], sizes.width, sizes.depth, sizes.text_width)
    if sizes.start is not None:
        other, its_spec = load(sizes.start)
        if not isinstance(its_spec, SanaSpec):
            raise UserError(f"method.sana.start: {sizes.start} is asked for classes, not for prompts")
        try:
            transformer.load_state_dict(cast(SanaNetwork, other.network).transformer.state_dict())
            if sizes.text_encoder is None:
                spec.text_encoder.load_state_dict(its_spec.text_encoder.state_dict())
        except RuntimeError as error:
            raise UserError(f"method.sana.start: {sizes.start} has networks of other sizes") from error
    if isinstance(config.data, PrecomputedData):
        spec.text_encoder.requires_grad_(False)
        Stored(config.data.path).check(spec, f"{sizes.autoencoder} with {sizes.text_encoder}")
        return Pretraining(settings, sana.denoiser(SanaNetwork(transformer), 1.0), binding=Binding(spec)), spec
    network, spec = SanaNetwork(transformer, spec.text_encoder.train()), replace(spec, joint=True)
    return Pretraining(settings, sana.denoiser(network, 1.0), binding=Binding(spec)), spec


def _pretraining(
    config: Config, settings: Pretrain, shape: Shape | None, class_names: list[str], stream: Stream | None
) -> tuple[Method, base.Spec]:
    if settings.control is not None:
        return _control(config, settings, settings.control, stream)
    if config.teacher is not None:
        raise UserError(
            "teacher: `pretrain` trains a teacher and takes none; remove the key or choose another method.kind"
        )
    if shape is None:
        raise UserError("data.kind: `pretrain` needs pictures, conditions_only has none")
    if settings.sana is not None:
        return _sana(config, settings, settings.sana, shape)
    if not class_names and _has_classes(config):
        raise UserError(
            "data.streaming: a stream whose classes have no names does not tell how many there are: give false, or "
            "label_column: null"
        )
    if not class_names:
        raise UserError("data: pictures with captions, not classes; method.sana makes a teacher for them")
    spec = Spec(settings.patch, len(class_names), shape[0], shape[1], settings.sigma_data, None, class_names)
    return Pretraining(settings, _new_denoiser(settings, spec)), spec


def _control(config: Config, settings: Pretrain, blocks: int, stream: Stream | None) -> tuple[Method, base.Spec]:
    """A control branch on a frozen teacher; the first pictures of the data are its examples."""
    denoiser, spec = load_teacher(config)
    if stream is None or not isinstance(spec, SanaSpec):
        raise UserError("method.control: a branch for sketches needs pictures, and a teacher that is asked for prompts")
    network = cast(SanaNetwork, denoiser.requires_grad_(False).network)
    if network.control is not None:
        raise UserError(f"method.control: the teacher {config.teacher and config.teacher.path} has a branch already")
    try:
        network.control = SanaControlBranch.of(network.transformer, blocks, spec.vae.spatial_compression_ratio)
    except ValueError as error:
        raise UserError(f"method.control: {error}") from error
    first = stream.next()
    spec = replace(spec, examples=first.captions[:EXAMPLES], control=edges(first.images[:EXAMPLES]))
    return Pretraining(settings, denoiser, part=BranchAlone(denoiser, network.control)), spec


def _new_denoiser(settings: Pretrain, spec: Spec) -> Denoiser:
    """With random weights."""
    levels = settings.patch * 2 ** (len(settings.channels) - 1)
    if spec.size % levels:
        raise UserError(f"data: side {spec.size} is not a multiple of {levels} = method.patch x 2^(levels - 1)")
    network = PatchUNet.create(
        spec.channels, spec.size, spec.num_classes, settings.channels, settings.patch, settings.layers
    )
    return Denoiser(network, EDM(), "edm", spec.sigma_data)


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
        if class_names or config.classes is not None or _has_classes(config):
            hint = ": put captions beside them, name.txt or metadata.jsonl" if _is_folder(config) else ""
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
    if shape is not None and not class_names and _is_folder(config):
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
        prompts += _texts(config.data)
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


def _score_matching(
    config: Config, settings: ScoreMatching, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
    denoiser, spec = class_teacher(config, shape, class_names)
    assert config.teacher is not None
    if shape is None:
        raise UserError("data.kind: `score_matching` needs pictures, conditions_only has none")
    settings = settings.model_copy(update={"sigma_data": spec.sigma_data})
    spec = replace(spec, patch=settings.patch)
    teacher = Guided(denoiser.requires_grad_(False), config.teacher.guidance)
    return Pretraining(settings, _new_denoiser(settings, spec), teacher), spec


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


def with_checkpointing(networks: dict[str, nn.Module]) -> None:
    """Make networks that come from diffusers recompute their activations; UserError if none can."""
    modules = [module for network in networks.values() for module in network.modules()]
    found = [module for module in modules if isinstance(module, CoreNetwork)]
    for network in found:
        if isinstance(network, Adapted):
            checkpointed(network.network)
        else:
            network.core.enable_gradient_checkpointing()
    if not found:
        raise UserError("train.gradient_checkpointing: no network of this run can recompute its activations")


def adapted(lora: LoRA, denoiser: Denoiser, name: str) -> Denoiser:
    """``denoiser`` with an adapter of its own on the same frozen network."""
    network = Adapted(denoiser.network, name, lora.rank, lora.alpha, lora.targets)
    return Denoiser(network, denoiser.process, denoiser.prediction, denoiser.sigma_data)


def _trainable(config: Config, teacher: Denoiser, name: str) -> Denoiser:
    """What starts as the teacher: a copy of it, or an adapter on it."""
    return copy.deepcopy(teacher) if config.lora is None else adapted(config.lora, teacher, name)


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


def _check_kind(path: Path | None, own: base.Spec, spec: base.Spec) -> None:
    """UserError if a student to start from makes other pictures than the teacher, or is asked for more."""
    if type(own) is not type(spec) or own.shape != spec.shape:
        raise UserError(f"method.start: {path} makes other pictures than the teacher")
    if isinstance(own, TextSpec) and isinstance(spec, TextSpec) and own.control is not None and spec.control is None:
        raise UserError(
            f"method.start: {path} follows lines by a control branch, the teacher has none: name in teacher.path one "
            "with a branch, or start at a student without"
        )


def _load_weights(network: nn.Module, run: Path, name: str) -> None:
    """Those of the newest checkpoint of ``run``, if it has any of that name; UserError if they do not fit or are
    damaged."""
    try:
        if weights := checkpoint.newest(run / "checkpoints", name):
            network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"method.start: the {name} in {run} is of another teacher's architecture") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"method.start: the newest checkpoint of {run} is damaged ({error}): delete it") from error


def _start(
    config: Config, settings: MatchingMethod, teacher: Denoiser, spec: ClassSpec | TextSpec
) -> tuple[Denoiser, ClassSpec | TextSpec, Denoiser]:
    """The student's network and spec at step 0, and the critic's network."""
    critic = _trainable(config, teacher, "critic")
    if settings.start is None:
        return _trainable(config, teacher, "student"), spec, critic
    run = settings.start if (settings.start / "student").is_dir() else None
    if config.lora is not None:
        if run is None or not checkpoint.list_steps(run / "checkpoints"):
            raise UserError(f"method.start: with lora it is a run folder with checkpoints, {settings.start} is none")
        student = _trainable(config, teacher, "student")
        _load_weights(OneStepStudent(student, 0.0), run, "student")
        _load_weights(critic, run, "critic")
        return student, spec, critic
    denoiser, own = load(settings.start / "student" if run else settings.start)
    if isinstance(own, Spec) and isinstance(spec, Spec):
        _check_start(settings, own, spec)
    _check_kind(settings.start, own, spec)
    if run:
        _load_weights(critic, run, "critic")
    if isinstance(own, TextSpec) and isinstance(spec, TextSpec) and spec.texts is not None:
        known = replace(cast(Any, own), examples=spec.examples)
        own = known.without_encoders(spec.texts, isinstance(config.data, PrecomputedData | ConditionsOnly))
    return denoiser.train(), own, critic


def _matching(
    config: Config, settings: MatchingMethod, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
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
            return Captions.of(_texts(data), spec)
        case HFData() if not data.streaming and data.caption_column:
            return Captions.of(_texts(data), spec)
    raise UserError("data.prompts: missing; a text file with a prompt in each line")


def _other_start(config: Config, path: Path, teacher: Denoiser, spec: ClassSpec | TextSpec) -> Denoiser:
    """A student's network to go on from, with a copy of the teacher's control branch if it has none."""
    if config.lora is not None:
        raise UserError("method.start: not with lora; its adapters start at the teacher")
    run = path / "student"
    denoiser, own = load(run if run.is_dir() else path)
    _check_kind(path, own, spec)
    if isinstance(denoiser.network, SanaNetwork) and denoiser.network.control is None:
        denoiser.network.control = copy.deepcopy(cast(SanaNetwork, teacher.network).control)
    return denoiser.train()


def _consistency(
    config: Config, settings: Consistency, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
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
        student = _trainable(config, teacher, "student")
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
