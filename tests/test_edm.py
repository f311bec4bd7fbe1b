"""EDM's and EDM2's checkpoints: read without running their code, converted, distilled, and loaded elsewhere."""

import copy
import io
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.run import build
from distill.run import train as run_training
from distill.settings import Config, LoRA
from distill.trainer import Trainer
from models import unpickle
from models.condition import Condition
from models.denoiser import Denoiser
from models.derivatives import jvp
from models.errors import UserError
from models.multi_student import MultiStudent, assemble
from models.process import EDM
from models.seeds import Draws
from models.student import OneStepStudent
from models.teachers import edm, load
from models.teachers.edm2_networks import EDM2UNet
from models.teachers.edm_networks import DhariwalUNet, SongUNet
from models.teachers.embedded import PatchUNet, Spec
from tests.tiny import settings

UNet = SongUNet | DhariwalUNet | EDM2UNet
SIZES: dict[str, Any] = {"img_resolution": 16, "label_dim": 5, "channel_mult": [1, 2], "num_blocks": 1}
RGB: dict[str, Any] = SIZES | {"in_channels": 3, "out_channels": 3, "attn_resolutions": [8]}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
MAKE: dict[str, Callable[..., UNet]] = {
    "ddpmpp": partial(SongUNet, **RGB, model_channels=16, augment_dim=9),
    "ncsnpp": partial(SongUNet, **RGB, model_channels=16, **NCSNPP),
    "adm": partial(DhariwalUNet, **RGB | {"channel_mult": [1, 4]}, model_channels=32, augment_dim=9),
    "edm2": partial(EDM2UNet, **SIZES, img_channels=3, model_channels=16, attn_resolutions=[8], channels_per_head=16),
}
NAMES = list(MAKE)


def new(name: str, seed: int = 0) -> UNet:
    """A tiny network none of whose weights is zero."""
    torch.manual_seed(seed)
    unet = MAKE[name]()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return unet.eval()


# ------------------------------------------------------------------------------------------- NVIDIA's file format


class Persistent:
    """Pickles as an object of NVIDIA's torch_utils.persistence does."""

    def __init__(self, name: str, state: dict[str, Any], source: str):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Checkpoint:
    """Writes networks as NVIDIA does. ``marker`` is a file that the source in them makes when it is executed."""

    def __init__(self, folder: Path):
        self.folder, self.marker = folder, folder / "executed"
        self.source = f"open({str(self.marker)!r}, 'w').close()\nclass SongUNet: pass\n"

    def module(self, module: nn.Module, name: str | None = None, **kwargs: Any) -> Persistent | nn.ModuleDict:
        state = dict(module.__dict__)
        state["_modules"] = {key: child and self.module(child) for key, child in module._modules.items()}
        if isinstance(module, nn.ModuleDict):
            made = nn.ModuleDict()
            made.__dict__["_modules"] = state["_modules"]
            return made
        state = {key: value for key, value in state.items() if key[0] == "_" and key != "_internal_dict"}
        state |= {"_init_args": (), "_init_kwargs": kwargs, "training": False, "skip_scale": np.sqrt(0.5)}
        return Persistent(name or type(module).__name__, state, self.source)

    def network(self, unet: UNet, **changes: Any) -> Persistent:
        arguments = {key: value for key, value in unet.config.items() if key[0] != "_"}
        second = isinstance(unet, EDM2UNet)
        inner = self.module(unet, "UNet" if second else None, **arguments | changes)
        state = {"_modules": {"unet" if second else "model": inner}, "_parameters": {}, "_buffers": {}}
        return Persistent("Precond" if second else "EDMPrecond", state | {"sigma_data": 0.5}, self.source)

    def write(self, network: Any, name: str = "net", protocol: int = 4) -> Path:
        """The file of one network, with what stands beside it in real ones."""
        path, util = self.folder / f"{name}.pkl", types.ModuleType("dnnlib.util")
        util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})  # type: ignore[attr-defined]
        persistence = types.ModuleType("torch_utils.persistence")
        function = types.FunctionType((lambda meta: None).__code__, {}, "_reconstruct_persistent_obj")
        function.__module__, function.__qualname__ = persistence.__name__, function.__name__
        persistence._reconstruct_persistent_obj = function  # type: ignore[attr-defined]
        content = util.EasyDict(ema=network, dataset_kwargs=util.EasyDict(path="x"))
        content["augment_pipe"] = Persistent("AugmentPipe", {"bands": np.arange(6.0).reshape(2, 3)}, self.source)
        with pytest.MonkeyPatch.context() as patch:
            for module in (util, persistence):
                patch.setitem(sys.modules, module.__name__, module)
                patch.setitem(sys.modules, module.__name__.split(".")[0], types.ModuleType("package"))
            path.write_bytes(pickle.dumps(content, protocol))
        return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def inputs(size: int = 16) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.1, 1.0, 40.0])
    x = sigma.view(-1, 1, 1, 1) * torch.randn(3, 3, size, size, generator=generator)
    return x, EDM().time_from_ratio(sigma), Condition(class_ids=torch.tensor([0, 4, -1]))


@torch.no_grad()
def pictures(denoiser: Denoiser) -> Tensor:
    return denoiser.denoise(*inputs())


def as_denoiser(unet: UNet) -> Denoiser:
    return Denoiser(PatchUNet(unet, 1, 5), EDM(), "edm", 0.5).eval()


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- networks

GOLDEN = {
    "ddpmpp": ([0.378342, 0.370949, 0.340990], 0.164380, 189587),
    "ncsnpp": ([0.387514, 0.380059, 0.351129], 0.163555, 191011),
    "adm": ([0.130939, 0.127653, 0.140184], 0.203829, 2553667),
    "edm2": ([0.064845, 0.066112, 0.055473], 0.019345, 181403),
}
"""Three outputs, the standard deviation of all, and the parameters of NVIDIA's own classes on the weights below."""


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_original_networks(name: str):
    unet = MAKE[name]().eval()
    state = unet.state_dict()
    for i, key in enumerate(sorted(state)):
        if not key.endswith("resample_filter"):
            wave = torch.sin(1.7 * torch.arange(state[key].numel(), dtype=torch.float64) + i)
            state[key].copy_(0.3 * wave.view(state[key].shape))
    x = torch.sin(torch.arange(3 * 3 * 256, dtype=torch.float64)).float().view(3, 3, 16, 16)
    out = unet(x, 250 * torch.tensor([0.1, 1.0, 10.0]).log(), torch.tensor([0, 4, -1])).sample
    some, spread, count = GOLDEN[name]
    torch.testing.assert_close(out[:, 1, 3, 5], torch.tensor(some), atol=1e-5, rtol=0)
    assert abs(float(out.std()) - spread) < 1e-5
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


CIFAR: dict[str, Any] = {
    "img_resolution": 32,
    "in_channels": 3,
    "out_channels": 3,
    "augment_dim": 9,
    "channel_mult": [2, 2, 2],
}
IMAGENET: dict[str, Any] = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}
PUBLISHED = [
    (partial(SongUNet, **CIFAR), 56),
    (partial(SongUNet, **CIFAR, **NCSNPP), 56),
    (partial(DhariwalUNet, 64, 3, 3, label_dim=1000), 296),
    *(
        (partial(EDM2UNet, **IMAGENET, model_channels=c), m)
        for c, m in [(128, 125), (192, 280), (256, 498), (448, 1523)]
    ),
]
"""Architectures of the papers, and the millions of parameters that they state."""


@pytest.mark.parametrize(("make", "millions"), PUBLISHED)
def test_published_architectures_have_the_stated_size(make: Callable[..., UNet], millions: int):
    with torch.device("meta"):
        assert round(sum(parameter.numel() for parameter in make().parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name: str):
    x, t, cond = inputs()
    found = []
    for on in (False, True):
        unet = new(name)
        if on:
            unet.enable_gradient_checkpointing()
        as_denoiser(unet).denoise(x, t, cond).square().mean().backward()
        found.append([p.grad for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_edm2s_weights_keep_unit_length_in_training_and_two_passes_share_one_backward_pass():
    unet = new("edm2").train()
    denoiser, (x, t, cond) = as_denoiser(unet).train(), inputs()
    (denoiser.denoise(x, t, cond) + denoiser.denoise(2 * x, t, cond)).square().mean().backward()
    for name, weight in unet.named_parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()), name
        if name.endswith("weight"):
            length = weight.detach().flatten(1).square().mean(1).sqrt()
            assert bool((length - 1).abs().max() < 1e-3), name
    primal, _ = jvp(lambda x: denoiser.denoise(x, t, cond), (x,), (x,))
    torch.testing.assert_close(primal, denoiser.denoise(x, t, cond), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- reading files


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_gives_the_same_outputs_and_its_source_is_not_run(checkpoint: Checkpoint, name: str, protocol: int):
    unet = new(name)
    denoiser, spec = edm.read(checkpoint.write(checkpoint.network(unet), protocol=protocol))
    assert torch.equal(pictures(denoiser), pictures(as_denoiser(unet)))
    assert (spec.num_classes, spec.shape, spec.sigma_data, spec.student) == (5, (3, 16, 16), 0.5, False)
    assert not checkpoint.marker.exists() and "torch_utils" not in sys.modules


def test_half_precision_and_no_classes(checkpoint: Checkpoint):
    """As EDM2's files are; a network without classes is one of a single class."""
    torch.manual_seed(0)
    unet = MAKE["edm2"](label_dim=0).half().float()
    denoiser, spec = edm.read(checkpoint.write(checkpoint.network(copy.deepcopy(unet).half())))
    assert spec.class_names == ["all"] and torch.equal(pictures(denoiser), pictures(as_denoiser(unet)))
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    assert spec.preview(3).class_ids is not None and bool((spec.preview(3).class_ids == 0).all())


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def raw(module: str, name: str, rest: bytes) -> bytes:
    """A pickle by hand: the global ``name`` of ``module``, then instructions."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + rest


def malicious(path: Path) -> dict[str, tuple[Any, str]]:
    """Objects or pickles that would make ``path``, and what the refusal says."""
    touch = Calls(os.system, f"touch {path}")
    archive, command = io.BytesIO(), f"touch {path}".encode()
    torch.save(touch, archive)
    tensor = torch.storage._load_from_bytes  # pyright: ignore[reportAttributeAccessIssue]
    numeric, scalar = np._core.numeric._frombuffer, np._core.multiarray.scalar  # type: ignore[attr-defined]
    evil = b"(U" + bytes([len(command)]) + command + b"tR."
    return {
        "system": (touch, r"asks for (posix|nt)\.system"),
        "eval": ({"ema": Calls(eval, f"open({str(path)!r}, 'w')")}, r"asks for builtins\.eval"),
        "getattr": (Calls(getattr, path, "unlink"), r"asks for builtins\.getattr"),
        "partial": (partial(os.system, "x"), r"asks for functools\.partial"),
        "tensor of an archive": (Calls(tensor, archive.getvalue()), "asks for posix.system"),
        "tensor of a pickle": (Calls(tensor, pickle.dumps(touch, 2)), "tensor that is not one|asks for"),
        "tensor of a list": (Calls(torch._utils._rebuild_tensor_v2, [1.0], 0, (1,), (1,)), "tensor without numbers"),
        "tensor out of bounds": (
            Calls(torch._utils._rebuild_tensor_v2, torch.zeros(2)._typed_storage(), 0, (1000,), (1,)),
            "out of bounds",
        ),
        "array of objects": (np.array([touch], dtype=object), "array of O8"),
        "array of pointers": (Calls(np.ndarray, (1,), "O", b"AAAAAAAA"), "not callable"),
        "scalar of a pointer": (Calls(scalar, np.dtype("O"), b"AAAAAAAA"), "array of O8"),
        "array beyond its bytes": (Calls(numeric, b"AAAA", np.dtype("f4"), (1000,), "C"), "reshape"),
        "numpy's function": (Calls(np.load, str(path)), r"asks for numpy\.load"),
        "copyreg": (raw("copyreg", "_reconstructor", b"."), r"asks for copyreg\._reconstructor"),
        "torch's function": (raw("torch.nn.modules.module", "register_module_forward_hook", evil), "argument"),
        "dotted name": (raw("torch.nn.modules.module", "torch.os.system", evil), r"asks for torch\.nn"),
        "dotted dtype": (raw("torch", "os.system", evil), r"asks for torch\.os\.system"),
        "change of a class": (
            raw("torch.nn.modules.container", "ModuleDict", b"N}U\x05stateU\x01xs\x86b."),
            "__setstate__|sets state",
        ),
        "codec": (raw("_codecs", "encode", b"(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR."), "encoding rot13"),
        "persistent id": (b"\x80\x02U\x01xQ.", "persistent"),
    }


@pytest.mark.parametrize("name", malicious(Path("x")))
def test_malicious_pickles_are_refused(tmp_path: Path, name: str):
    content, message = malicious(tmp_path / "executed")[name]
    path = tmp_path / "bad.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 4))
    with pytest.raises(UserError, match=message) as error:
        edm.read(path)
    assert str(path) in one_line(error) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"type": "function"}, "not of a class"), ({"version": 5}, "version 5"), ({"state": [1]}, "not a dict")],
)
def test_other_persistent_objects_are_refused(checkpoint: Checkpoint, changes: dict[str, Any], message: str):
    network = Persistent("SongUNet", {}, checkpoint.source)
    network.meta |= changes
    path = checkpoint.write(network)
    with pytest.raises(UserError, match=message):
        edm.read(path)
    assert not checkpoint.marker.exists()


def test_records_and_functions_cannot_be_changed_by_a_file():
    with pytest.raises(pickle.UnpicklingError, match="sets state of a class"):
        unpickle.Record.state = {}  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        unpickle._Storage().__call__ = eval  # type: ignore[method-assign]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_numbers_of_numpy_are_read(tmp_path: Path, protocol: int):
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = [grid, np.asfortranarray(grid), grid.astype(">f4"), np.array([True, False]), np.float64(0.5), np.int64(-3)]
    path = tmp_path / "values.pkl"
    path.write_bytes(pickle.dumps(values, protocol))
    for value, found in zip(values, unpickle.load(path, "checkpoint"), strict=True):
        assert found.dtype.str[1:] == value.dtype.str[1:] and np.array_equal(found, value)


def without(network: Persistent, *place: str) -> Persistent:
    """The network with the thing at ``place`` removed."""
    state = network.meta["state"]
    for name in place[:-1]:
        inner = state["_modules"][name]
        state = inner.__dict__ if isinstance(inner, nn.ModuleDict) else inner.meta["state"]
    del state["_parameters"][place[-1]]
    return network


def test_damaged_and_other_files_are_one_line(checkpoint: Checkpoint):
    network, unet = checkpoint.network, new("ddpmpp")
    whole = checkpoint.write(network(unet)).read_bytes()
    path = checkpoint.folder / "cut.pkl"
    for part in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:-1], pickle.dumps([1]), pickle.dumps({})):
        path.write_bytes(part)
        with pytest.raises(UserError, match=r"cut\.pkl") as error:
            edm.read(path)
        one_line(error)
    vp = network(unet)
    vp.meta["class_name"] = "VPPrecond"
    latents = network(EDM2UNet(**SIZES, img_channels=4, model_channels=16, channels_per_head=16))
    for wrong, message in [
        (without(network(unet), "model", "map_layer0", "weight"), r"map_layer0\.weight"),
        (without(network(unet), "model", "enc", "8x8_down", "affine", "bias"), r"8x8_down\.affine\.bias"),
        (network(unet, model_channels=32), "size mismatch"),
        (network(unet, depth=3), "depth"),
        (network(unet, encoder_type="skip"), "encoder skip"),
        (network(unet, dropout=nn.Identity()), "Identity"),
        (vp, "VPPrecond"),
        (latents, "latents of 4 channels"),
        (checkpoint.module(nn.Identity()), "Identity"),
        ("text", "no network"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            edm.read(checkpoint.write(wrong))
        one_line(error)
    assert not checkpoint.marker.exists()


# ------------------------------------------------------------------------------------------ folders, and training


def converted(checkpoint: Checkpoint, name: str) -> Path:
    """By the command."""
    folder = checkpoint.folder / name
    edm.main(edm.Options(checkpoint.write(checkpoint.network(new(name)), name), folder))
    return folder


def test_the_command_converts_and_the_folder_gives_the_same_outputs(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
):
    folder = converted(checkpoint, "ncsnpp")
    assert "0.2 million parameters; 5 classes" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"unet", "pipeline.py", "model_index.json", "README.md"}
    denoiser, spec = load(folder)
    assert torch.equal(pictures(denoiser), pictures(as_denoiser(new("ncsnpp")))) and not spec.student
    with pytest.raises(UserError, match=r"python -m models\.teachers\.edm") as error:
        load(checkpoint.folder / "ncsnpp.pkl")
    one_line(error)
    (checkpoint.folder / "mine").mkdir()
    for checkpoint_path, target, message in [
        ("nothing.pkl", "new", "no file"),
        ("ncsnpp.pkl", "mine", "choose another"),
    ]:
        with pytest.raises(UserError, match=message):
            edm.main(edm.Options(checkpoint.folder / checkpoint_path, checkpoint.folder / target))
    with pytest.raises(UserError, match=r"unet\.enc\.8x8_block0"):
        build(settings_of(folder, checkpoint.folder, taps=["unet.mid_block"]))


ELSEWHERE = """
import sys
import numpy as np
from diffusers import DiffusionPipeline

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipe([0, 1])[0][0].size == (16, 16)
    np.save(folder + ".npy", pipe([0, 1, -1, 4], seeds=[5, 6, 7, 8], output_type="pt").images.numpy())
assert not {"models", "distill", "eval"} & sys.modules.keys()
"""


def test_students_give_the_same_pixels_in_a_process_without_this_project(checkpoint: Checkpoint):
    folders = []
    for name in NAMES:
        denoiser, spec = edm.read(checkpoint.write(checkpoint.network(new(name)), name))
        folders.append(checkpoint.folder / f"{name}-student")
        replace(spec, sigma_init=2.5).save(folders[-1], denoiser.network, "")
    script = checkpoint.folder / "elsewhere.py"
    script.write_text(ELSEWHERE)
    line = [sys.executable, "-P", str(script), *map(str, folders)]
    done = subprocess.run(line, cwd=checkpoint.folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    z, cond = Draws([5, 6, 7, 8]).normal(3, 16, 16), Condition(class_ids=torch.tensor([0, 1, -1, 4]))
    for folder in folders:
        denoiser, spec = load(folder)
        assert spec.student
        with torch.no_grad():
            ours = OneStepStudent(denoiser, 2.5)(z, cond)
        np.testing.assert_allclose(np.load(f"{folder}.npy"), ours.numpy(), atol=1e-5)


def test_several_students_load_with_stock_diffusers(tmp_path: Path):
    for seed in (0, 1):
        spec = Spec(1, 5, 3, 16, 0.5, 2.5, list("abcde"))
        spec.save(tmp_path / f"part{seed}", as_denoiser(new("ncsnpp", seed)).network, "")
    assemble(tmp_path / "student", [tmp_path / "part0", tmp_path / "part1"], [0, 0, 1, 1, 1], "card")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    classes, z = [4, 0, 2], torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = MultiStudent(tmp_path / "student").generate(z, Condition(class_ids=torch.tensor(classes)))
    found = pipe(classes, latents=z, output_type="pt").images
    assert float((found - expected).abs().max()) <= 1e-5


def settings_of(teacher: Path, base: Path, **gan: Any) -> Config:
    """Three steps of f-distill with this teacher."""
    values = settings(
        base, output="run", data__channels=3, data__classes_by="position", train__steps=3, method__critic_turns=1
    )
    values["teacher"]["path"], values["method"]["bins"] = str(teacher), 2
    values["method"]["gan"] |= gan
    return Config.model_validate(values)


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_f_distill_and_the_student_loads(checkpoint: Checkpoint, name: str):
    teacher, base = converted(checkpoint, name), checkpoint.folder
    assert run_training(settings_of(teacher, base, taps=["unet.enc.8x8_block0"])) == 0
    denoiser, spec = load(base / "run" / "student")
    assert spec.sigma_init == 2.5 and type(denoiser.network.unet) is type(new(name))  # type: ignore[union-attr]
    before, after = pictures(load(teacher)[0]), pictures(denoiser)
    assert bool(after.isfinite().all()) and not torch.equal(before, after)


def started(base: Path, method: dict[str, Any], **changes: Any) -> Trainer:
    """Before its first step; the teacher's network has dropout."""
    unet = new("ddpmpp")
    assert unet.config.dropout == 0.1
    Spec(1, 5, 3, 16, 0.5, None, [str(i) for i in range(5)]).save(base / "dropout", PatchUNet(unet, 1, 5), "")
    values = settings(base, method=method, data__channels=3, data__classes_by="position", **changes)
    values["teacher"]["path"] = str(base / "dropout")
    return build(Config.model_validate(values))


def test_dropout_is_on_in_what_is_trained_alone(tmp_path: Path):
    """At the start the critic is the teacher: their distance is 0. A grid repeats itself."""
    trainer = started(tmp_path, {"kind": "diff_instruct", "critic_turns": 1, "bins": 4})
    modes: list[tuple[str, bool]] = []
    for name, network in trainer.bare.items():
        network.register_forward_pre_hook(lambda module, _inputs, name=name: modes.append((name, module.training)))
    trainer.turn("student", 0)
    assert modes == [("student", True), ("critic", False)]
    distances, _ = trainer.metrics.sums["teacher_critic_distance"]
    assert float(distances.abs().max()) == 0
    grids = []
    for _ in range(2):
        trainer._sample()
        grids.append((tmp_path / "run/samples/step-000000.png").read_bytes())
    assert grids[0] == grids[1]
    modes.clear()
    trainer.turn("critic", 1)
    trainer.turn("student", 0)
    assert modes == [("critic", True), ("student", True), ("critic", False)]


def test_dropout_is_not_the_first_rows_noise(tmp_path: Path):
    trainer = started(tmp_path, {"kind": "diff_instruct", "critic_turns": 1, "bins": 4})
    noise = trainer._inputs("student", 0, 0).draws.normal(64)[0]
    assert not torch.equal(torch.randn(64), noise)


@pytest.mark.parametrize("tangent", ["central", "jvp"])
def test_tangents_know_no_dropout(tmp_path: Path, tangent: str):
    """Differences of two masks would be refused; the exact derivative would be said not to be smooth."""
    method = {"kind": "consistency", "tangent": tangent, "tangent_step": 0.002, "warmup_steps": 2, "guidance": [1.0]}
    trainer = started(tmp_path, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.run_step()
    assert trainer.bare["student"].training


@pytest.mark.parametrize("name", ["own", "ddpmpp", "adm"])
def test_an_adapter_is_merged_into_the_exported_weights(checkpoint: Checkpoint, name: str):
    base = checkpoint.folder
    if name == "own":
        config, teacher = (
            Config.model_validate(settings(base, lora={"rank": 2}, data__classes_by="position")),
            base / "teacher",
        )
    else:
        teacher = converted(checkpoint, name)
        config = settings_of(teacher, base, taps=["unet.enc.8x8_block0"])
        config = config.model_copy(update={"lora": LoRA(rank=2, targets=["qkv", "proj"])})
    trainer = build(config)
    trainer.run_step()
    trainer.spec.save(base / "student", trainer.method.exported(), "")
    student = cast(OneStepStudent, trainer.bare["student"]).denoiser.eval()
    x, t, _ = inputs()
    x, cond = x[:, : trainer.spec.shape[0]], Condition(class_ids=torch.tensor([0, 1, -1]))
    with torch.no_grad():
        expected, found, before = (
            each.denoise(x, t, cond) for each in (student, load(base / "student")[0], load(teacher)[0])
        )
    assert float((found - expected).abs().max()) < 1e-5 < float((found - before).abs().max())


def test_layers_that_cannot_be_adapted_are_refused_before_training(checkpoint: Checkpoint):
    config = settings_of(converted(checkpoint, "edm2"), checkpoint.folder, taps=["unet.enc.8x8_block0"])
    with pytest.raises(UserError, match="can adapt") as error:
        build(config.model_copy(update={"lora": LoRA(rank=2, targets=["attn_qkv"])}))
    one_line(error)
