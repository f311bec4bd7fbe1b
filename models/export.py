"""A trained network as a folder that stock diffusers loads: weights, the pipeline's own source, a model card."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import diffusers

from models.pipelines import class_conditional
from models.teachers.embedded import PatchUNet, Spec


def export(folder: Path, network: PatchUNet, spec: Spec, card: str) -> None:
    """Write ``folder`` through a temporary one: unet/, pipeline.py, model_index.json and README.md (``card``)."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    network.unet.save_pretrained(temporary / "unet", safe_serialization=True)
    shutil.copy(class_conditional.__file__, temporary / "pipeline.py")
    index = {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DModel"],
        **asdict(spec),
    }
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (temporary / "README.md").write_text(card)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
