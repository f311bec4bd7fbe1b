"""Which parts of text to 3D can be used here.

python -m models.scene.doctor
"""

import importlib
from dataclasses import dataclass

import torch
import tyro

from models.errors import run_command

NEEDED = {"trimesh": "GLB, OBJ and PLY", "xatlas": "textures", "fast_simplification": "fewer triangles"}
VIDEO = {"imageio": "the turntable", "imageio_ffmpeg": "the turntable"}
OPTIONAL = {
    "tinycudann": "method.field.fused: the hash grid's kernel, CUDA only",
    "nvdiffrast": "taken by the rasteriser, CUDA only; licensed for research and evaluation only",
}


@dataclass(frozen=True)
class Finding:
    """One line: what, whether it can be used, and what for or what to do."""

    name: str
    usable: bool
    note: str

    def __str__(self) -> str:
        return f"{'yes' if self.usable else 'no ':3}  {self.name:22}  {self.note}"


def _imports(name: str) -> str | None:
    """None if a module can be imported, else why not."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:100] or type(error).__name__
    return None


def findings() -> list[Finding]:
    """Devices, then the packages for files, then what is only faster."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = [
        Finding("torch on the CPU", True, f"{torch.__version__}, {torch.get_num_threads()} threads; field: triplane"),
        Finding("torch on CUDA", bool(device), f"{device}; field: hash" if device else "no CUDA device"),
        Finding("volume renderer", True, "plain torch, nothing to compile"),
        Finding("rasteriser", True, "plain torch, nothing to compile"),
    ]
    for names, advice in ((NEEDED, "pip install -e '.[scene]'"), (VIDEO, "pip install -e '.[scene]'"), (OPTIONAL, "")):
        for name, use in names.items():
            reason = _imports(name)
            note = use if reason is None else f"{use}: {reason}" + (f" ({advice})" if advice else "")
            found.append(Finding(name, reason is None, note))
    return found


def main() -> None:
    """Say what text to 3D can use here."""
    for finding in findings():
        print(finding)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
