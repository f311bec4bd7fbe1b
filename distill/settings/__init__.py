"""The whole configuration of a run: a module for each kind of data and method; ``reading`` makes it from files."""

from distill.settings.config import Config, LoRA, Teacher
from distill.settings.consistency import LADD, Consistency
from distill.settings.data import (
    ConditionsOnly,
    Data,
    FashionMNISTData,
    HFData,
    ImageFolderData,
    PrecomputedData,
    SolidsData,
)
from distill.settings.matching import (
    DMD2,
    GAN,
    SDS,
    SIM,
    DiffInstruct,
    DivergenceMatching,
    DivergenceName,
    FDistill,
    MatchingMethod,
    SiD,
    SiDA,
    UniInstruct,
)
from distill.settings.multi_student import MultiStudent
from distill.settings.pretrain import Autoencoder, Pretrain, SanaSize, ScoreMatching
from distill.settings.reading import check, override, parse, read_config, read_values, write_config
from distill.settings.scene import Anneal, SceneDistillation, SceneStage
from distill.settings.train import Evaluation, Optimizer

__all__ = [
    "DMD2",
    "GAN",
    "LADD",
    "SDS",
    "SIM",
    "Anneal",
    "Autoencoder",
    "ConditionsOnly",
    "Config",
    "Consistency",
    "Data",
    "DiffInstruct",
    "DivergenceMatching",
    "DivergenceName",
    "Evaluation",
    "FDistill",
    "FashionMNISTData",
    "HFData",
    "ImageFolderData",
    "LoRA",
    "MatchingMethod",
    "MultiStudent",
    "Optimizer",
    "PrecomputedData",
    "Pretrain",
    "SanaSize",
    "SceneDistillation",
    "SceneStage",
    "ScoreMatching",
    "SiD",
    "SiDA",
    "SolidsData",
    "Teacher",
    "UniInstruct",
    "check",
    "override",
    "parse",
    "read_config",
    "read_values",
    "write_config",
]
