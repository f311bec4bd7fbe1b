"""From settings to objects: a module for each kind of method, as in ``distill.settings``."""

from distill.build.data import build_stream
from distill.build.matching import build_ratio, build_row
from distill.build.method import build_method
from distill.build.pretrain import sana_spec
from distill.build.teacher import class_teacher, load_teacher
from models.prompts import read_prompts

__all__ = [
    "build_method",
    "build_ratio",
    "build_row",
    "build_stream",
    "class_teacher",
    "load_teacher",
    "read_prompts",
    "sana_spec",
]
