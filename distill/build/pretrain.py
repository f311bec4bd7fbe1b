"""Training of autoencoders and teachers."""

from dataclasses import replace
from typing import Any, cast

from diffusers import AutoencoderDC
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distill.build.data import EXAMPLES, Shape, has_classes
from distill.build.teacher import class_teacher, load_teacher
from distill.data import Stream
from distill.methods.autoencoder import AutoencoderTraining
from distill.methods.base import Method
from distill.methods.pretrain import Pretraining
from distill.settings import Autoencoder, Config, PrecomputedData, Pretrain, SanaSize, ScoreMatching, SolidsData
from distill.stored import Stored
from eval.binding import Binding
from models import autoencoder
from models.autoencoder import PictureSpec
from models.controlnet import BranchAlone, SanaControlBranch, edges
from models.denoiser import Denoiser, Guided
from models.errors import UserError
from models.process import EDM
from models.scene import captions
from models.teachers import base, load, miniature, sana
from models.teachers.embedded import PatchUNet, Spec
from models.teachers.sana import SanaNetwork, SanaSpec


def _new_autoencoder(settings: Autoencoder) -> AutoencoderDC:
    """One with random weights, or with those of the autoencoder that it starts from; UserError if that has other
    latents."""
    sizes = settings.channels, settings.latent_channels, settings.layers
    vae = miniature.new_autoencoder(*sizes, settings.decoder_channels, settings.decoder_layers)
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


def build_autoencoder(settings: Autoencoder, shape: Shape | None, stream: Stream | None) -> tuple[Method, base.Spec]:
    """A new autoencoder in training; UserError without pictures, or if its levels do not divide their side."""
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
    tokenizer = miniature.new_tokenizer(captions.VOCABULARY, sizes.max_length)
    text_encoder: nn.Module = miniature.new_text_encoder(
        len(tokenizer), sizes.text_width, sizes.text_depth, sizes.max_length
    )
    if sizes.text_encoder is not None:
        weights = sizes.text_encoder / "text_encoder" / "model.safetensors"
        try:
            text_encoder.load_state_dict(load_file(weights))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"method.sana.text_encoder: {weights} is missing or of other sizes: "
                "`python -m distill.workshop.text_encoder`"
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
    transformer = miniature.new_transformer(spec.shape[0], spec.shape[1], sizes.width, sizes.depth, sizes.text_width)
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


def build_pretraining(
    config: Config, settings: Pretrain, shape: Shape | None, class_names: list[str], stream: Stream | None
) -> tuple[Method, base.Spec]:
    """A new teacher of classes, a miniature Sana or a control branch in training; UserError where settings and data do
    not fit each other."""
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
    if not class_names and has_classes(config):
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


def build_score_matching(
    config: Config, settings: ScoreMatching, shape: Shape | None, class_names: list[str]
) -> tuple[Method, base.Spec]:
    """A new, smaller network that learns the teacher's denoising; UserError where settings, teacher and data do not fit
    each other."""
    denoiser, spec = class_teacher(config, shape, class_names)
    assert config.teacher is not None
    if shape is None:
        raise UserError("data.kind: `score_matching` needs pictures, conditions_only has none")
    settings = settings.model_copy(update={"sigma_data": spec.sigma_data})
    spec = replace(spec, patch=settings.patch)
    teacher = Guided(denoiser.requires_grad_(False), config.teacher.guidance)
    return Pretraining(settings, _new_denoiser(settings, spec), teacher), spec
