"""The one place where the kinds of method are told apart."""

from distill.build.consistency import build_consistency
from distill.build.data import Shape
from distill.build.matching import build_matching
from distill.build.networks import with_checkpointing
from distill.build.pretrain import build_autoencoder, build_pretraining, build_score_matching
from distill.build.scene import build_stage
from distill.data import Stream
from distill.methods.base import Method
from distill.settings import Autoencoder, Config, Consistency, MultiStudent, Pretrain, SceneDistillation, ScoreMatching
from models.errors import UserError
from models.teachers import base


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
            return build_autoencoder(config.method, shape, stream)
        case Consistency():
            return build_consistency(config, config.method, shape, class_names)
        case MultiStudent():
            raise ValueError("multi_student is a plan of runs, not one run")
        case SceneDistillation():
            return build_stage(config, config.method)
        case ScoreMatching():
            return build_score_matching(config, config.method, shape, class_names)
        case Pretrain():
            return build_pretraining(config, config.method, shape, class_names, stream)
        case _:
            return build_matching(config, config.method, shape, class_names)
