"""Text-to-image runs over two processes: DDP equals one process, FSDP2 too, and its checkpoints resume on one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from distill import checkpoint, parallel
from distill.run import train
from distill.settings import check
from models import autoencoder
from models.errors import UserError
from models.teachers import load
from tests import families, tiny
from tests.test_families import class_values, consistency, f_distill, values

FAMILY = "stable_diffusion_3"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def settings(base: Path, output: str, method: dict[str, Any], lora: bool, guidance: float) -> dict[str, Any]:
    made = values(base, base / "teacher", output, method, lora, guidance)
    made["student"]["eps"] = 1e-3  # rounding must not decide an update's sign
    made["train"] |= {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "checkpoints_total_limit": 9}
    return made


WORKER = """
import sys
from distill.run import train
from distill.settings import read_config
from pathlib import Path
for path in sys.argv[1:]:
    assert train(read_config(Path(path))) == 0
"""


def lines(run: Path) -> list[dict[str, float]]:
    """The scalars of metrics.jsonl, a step each; without the spread within a process's share of the batch."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scalars = [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]
    return [{key: value for key, value in row.items() if key != "sample_std"} for row in scalars]


SPRINT = consistency(FAMILY, 2.0)
SPRINT["ladd"]["misaligned_pairs"] = False  # pairs are made within a process's share of the batch
AUTOENCODER = {
    "method": {"kind": "autoencoder", "channels": [8, 16], "latent_channels": 4},
    "teacher": None,
    "data__channels": 3,
}
METHODS = {
    "f_distill": (f_distill(FAMILY), False, 2.0),
    "f_distill_lora": (f_distill(FAMILY), True, 2.0),
    "sprint": (SPRINT, False, 1.0),
}


DIT = ("dit_lora", "dit_full")


def dit(base: Path, output: str) -> dict[str, Any]:
    """Two steps of a network whose last layer asks a part of its first block again."""
    made = class_values(base, base / "dit", output, "lora" in output, 2.0)
    made["student"]["eps"] = 1e-3
    made["train"] |= {"steps": 2, "checkpoint_every": 2}
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs over two processes: each method for two steps under FSDP2, an embedded U-Net and an autoencoder for one, and
    the one with LoRA under DDP to its end."""
    base = tmp_path_factory.mktemp("two")
    families.save(base / "teacher", FAMILY)
    runs = {name: settings(base, name, *METHODS[name]) for name in METHODS}
    for made in runs.values():
        made["train"] |= {"parallel": "fsdp2", "steps": 2}
    short: dict[str, Any] = {"train__parallel": "fsdp2", "train__steps": 1}
    runs["unet"] = tiny.settings(base / "own", "unet", **short)
    runs["autoencoder"] = tiny.settings(base / "own", "autoencoder", **short, **AUTOENCODER)
    runs["ddp"] = settings(base, "ddp", *METHODS["f_distill_lora"])
    families.save(base / "dit", "dit")
    runs |= {name: dit(base, name) for name in DIT}
    for name in DIT:
        runs[name]["train"]["parallel"] = "fsdp2"
    for name, made in runs.items():
        (base / f"{name}.yaml").write_text(yaml.safe_dump(made))
    (base / "worker.py").write_text(WORKER)
    line = [*TORCHRUN, str(base / "worker.py"), *(str(base / f"{name}.yaml") for name in runs)]
    done = subprocess.run(line, cwd=base, env=tiny.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.mark.parametrize("name", METHODS)
def test_fsdp2_equals_one_process_and_resumes_on_one(name: str, two: Path) -> None:
    made = settings(two, f"{name}-one", *METHODS[name])
    assert train(check(made, "test")) == 0
    step = two / name / "checkpoints" / "step-2"
    divided = sorted(path.name for path in (step / "student").iterdir())
    if name == "f_distill_lora":  # adapters are whole, the network under them is divided
        assert divided == ["ema.safetensors", "model.safetensors", "optimizer.pt"]
    else:
        assert "model-00001-of-00002.safetensors" in divided and "optimizer-00000-of-00002.pt" in divided
        sizes = [path.stat().st_size for path in (step / "student").glob("ema-*")]  # no buffers in it
        assert max(sizes) < 0.7 * sum(sizes)
    load(two / name / "student")  # exported whole
    assert train(check(settings(two, name, *METHODS[name]), "test")) == 0  # resumes on this process
    one, other = lines(two / f"{name}-one"), lines(two / name)
    assert [row["step"] for row in one] == [row["step"] for row in other] == [1, 2, 3, 4]
    for expected, found in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_students_of_the_projects_own_networks_are_exported_whole(two: Path) -> None:
    autoencoder.load(two / "own" / "autoencoder")
    assert train(check(tiny.settings(two / "own", "one", train__steps=1), "test")) == 0
    one, other = ([*load(two / "own" / name / "student")[0].parameters()] for name in ("one", "unet"))
    assert all(torch.allclose(first, second, atol=1e-6) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("name", DIT)
def test_dit_is_divided_too(name: str, two: Path) -> None:
    assert train(check(dit(two, f"{name}-one"), "test")) == 0
    one, other = lines(two / f"{name}-one"), lines(two / name)
    assert len(one) == len(other) == 2
    for expected, found in zip(one, other, strict=True):  # one step from noise has 160 times the network's rounding
        assert found == pytest.approx(expected, rel=2e-2, abs=1e-5)
    load(two / name / "student")


FROZEN_FIRST = """
import copy, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from models.condition import Condition
from models.denoiser import CoreNetwork
from distill import parallel
from distill.precision import AUTOCAST

class Core(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)) for _ in range(2)]
        self.blocks, self.last = torch.nn.ModuleList(layers), torch.nn.Linear(4, 4)
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)

class Network(CoreNetwork):
    def __init__(self):
        super().__init__()
        self.inner = Core()
    @property
    def core(self):
        return self.inner
    def forward(self, x, t, cond):
        return self.inner(x)

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.manual_seed(0)
plain = Network()
divided = copy.deepcopy(plain)
parallel.shard([divided], SimpleNamespace(device=torch.device("cpu"), num_processes=1))
x, grads = torch.randn(16, 4), []
autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=AUTOCAST.cache_enabled)
for network in (plain, divided):
    ask = lambda: network(x, None, Condition())
    found = []
    for turn in range(3):
        network.requires_grad_(False)
        with autocast():
            assert not ask().requires_grad  # a critic in the student's turn
        network.requires_grad_(True)
        with autocast():
            with torch.no_grad():
                ask()  # a student's earlier step
            loss = ask().float().square().mean()
        loss.backward()
        for parameter in network.parameters():
            grad = parameter.grad.full_tensor() if network is divided else parameter.grad
            assert parameter.dtype == grad.dtype == torch.float32 and float(grad.abs().max()) > 0
            found.append(grad)
        network.zero_grad()
    grads.append(found)
for first, second in zip(*grads, strict=True):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
"""


def test_a_network_that_is_first_run_frozen_trains_in_float32(tmp_path: Path) -> None:
    """Under bf16, divided or whole: neither a frozen run nor one without gradients decides what later ones are cast to.

    With the casts of the first run kept, the divided blocks get no gradient in the first turn.
    """
    line = [sys.executable, "-c", FROZEN_FIRST, str(tmp_path / "store")]
    done = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_ddp_with_lora_equals_one_process(two: Path) -> None:
    made = settings(two, "ddp-one", *METHODS["f_distill_lora"])
    assert train(check(made, "test")) == 0
    for expected, found in zip(lines(two / "ddp-one"), lines(two / "ddp"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_missing_part_is_named(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "sprint", tmp_path / "run")
    for step in checkpoint.list_steps(tmp_path / "run" / "checkpoints")[1:]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    made = settings(two, "sprint", *METHODS["sprint"]) | {"output": str(tmp_path / "run")}
    next((tmp_path / "run" / "checkpoints" / "step-2" / "student").glob("model-00001*")).unlink()
    with pytest.raises(UserError, match="damaged or of another configuration"):
        train(check(made, "test"))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_other_launchers_are_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    with pytest.raises(UserError, match="fsdp2"):
        parallel.check_launch(accelerator)
