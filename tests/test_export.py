"""An exported student loads without this project and gives the same pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.condition import Condition
from models.errors import UserError
from models.pipelines import class_conditional
from models.seeds import Draws
from models.student import OneStepStudent, heun
from models.teachers import PRETRAINED, load
from tests.tiny import save_network

ELSEWHERE = """
import sys
import numpy as np
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
one = pipe([0, 1, -1, 9], seeds=[5, 6, 7, 8], output_type="pt").images
pictures = pipe([0, 1]).images
assert pictures[0].size == (32, 32), pictures[0].size
np.save(sys.argv[2], one.numpy())
assert not {"models", "distill", "eval"} & sys.modules.keys()
"""


@pytest.mark.parametrize("sigma_init", [2.5, None], ids=["student", "teacher"])
def test_same_pixels_in_a_process_without_this_project(tmp_path: Path, sigma_init: float | None):
    folder = save_network(tmp_path / "exported", sigma_init, seed=3)
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    line = [sys.executable, "-P", str(script), str(folder), str(tmp_path / "out.npy")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    denoiser, spec = load(folder)
    z = Draws([5, 6, 7, 8]).normal(1, 32, 32)
    cond = Condition(class_ids=torch.tensor([0, 1, -1, 9]))
    with torch.no_grad():
        ours = heun(denoiser, z, cond, 18) if sigma_init is None else OneStepStudent(denoiser, sigma_init)(z, cond)
    assert spec.sigma_init == sigma_init
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours.numpy(), atol=1e-5)


def test_wrong_calls_of_the_pipeline(tmp_path: Path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(save_network(tmp_path / "s", 2.5, seed=3), trust_remote_code=True)
    for arguments, message in [
        ({"class_labels": [10]}, "class labels"),
        ({"class_labels": [1, 2], "seeds": [1]}, "2 class labels but noise for 1"),
        ({"class_labels": 1, "num_inference_steps": 4}, "takes one step"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)


def test_damaged_folders_are_one_line(tmp_path: Path):
    folder = save_network(tmp_path / "t", None, seed=3)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    index = json.loads((folder / "model_index.json").read_text())
    del index["patch"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="patch"):
        load(folder)


def test_the_embedded_teachers_carry_the_pipeline_of_today():
    folders = [folder for folder in PRETRAINED.iterdir() if (folder / "model_index.json").is_file()]
    own = [folder for folder in folders if "ClassConditionalPipeline" in (folder / "model_index.json").read_text()]
    assert own
    for folder in own:
        assert (folder / "pipeline.py").read_text() == Path(class_conditional.__file__).read_text(), folder
