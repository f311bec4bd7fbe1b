"""A trained network as a folder that stock diffusers loads: weights, the pipeline's own source, a model card."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import diffusers

from models.folders import replace_folder
from models.pipelines import class_conditional
from models.teachers.embedded import PatchUNet, Spec


def export(folder: Path, network: PatchUNet, spec: Spec, card: str) -> None:
    """Write ``folder`` through a temporary one: unet/, pipeline.py, model_index.json and README.md (``card``)."""
    index = {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DModel"],
        **asdict(spec),
    }
    with replace_folder(folder) as temporary:
        network.unet.save_pretrained(temporary / "unet", safe_serialization=True)
        shutil.copy(class_conditional.__file__, temporary / "pipeline.py")
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "README.md").write_text(card)
