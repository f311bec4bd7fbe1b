"""Sample grids: the teacher's and the student's pictures from the same noise, row above row."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from distill.methods.base import Method
from models.folders import replace_file
from models.seeds import Draws
from models.teachers.base import Spec

COLUMNS = 10


class Preview:
    """Two rows of ten pictures; noise and conditions are the same at every step of every run."""

    def __init__(self, folder: Path, spec: Spec, teacher_steps: int, device: torch.device):
        self.folder, self.spec, self.teacher_steps = folder, spec, teacher_steps
        self.z = Draws(list(range(2 * COLUMNS)), device).normal(*spec.shape)
        self.cond = spec.preview(2 * COLUMNS).to(device)
        self._teacher: Tensor | None = None

    @torch.no_grad()
    def draw(self, method: Method, step: int, write: bool = True) -> None:
        """Write ``step-NNNNNN.png``, or only take part in making it; the teacher's rows are made once."""
        if self._teacher is None:
            self._teacher = method.reference(self.z, self.cond, self.teacher_steps)
        student = method.sample(self.z, self.cond)
        if not write:
            return
        rows = [student] if self._teacher is None else [self._teacher, student]
        pictures = [part for pair in zip(*(row.split(COLUMNS) for row in rows), strict=True) for part in pair]
        decoded = self.spec.decode(torch.cat(pictures)).float().cpu()
        grid = make_grid(decoded.clamp(-1, 1) / 2 + 0.5, nrow=COLUMNS)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_file(self.folder / f"step-{step:06d}.png") as temporary:
            save_image(grid, temporary, format="png")
