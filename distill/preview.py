"""Sample grids: the teacher's and the student's pictures from the same noise, row above row."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from distill.methods.base import Method
from models.condition import Condition
from models.seeds import Draws
from models.teachers.embedded import Spec


class Preview:
    """Two rows of up to ten classes; noise and classes are the same at every step of every run."""

    def __init__(self, folder: Path, spec: Spec, teacher_steps: int, device: torch.device):
        self.folder, self.teacher_steps, self.columns = folder, teacher_steps, min(10, spec.num_classes)
        self.z = Draws(list(range(2 * self.columns)), device).normal(spec.channels, spec.size, spec.size)
        self.cond = Condition(class_ids=torch.arange(2 * self.columns, device=device) % self.columns)
        self._teacher: Tensor | None = None

    @torch.no_grad()
    def draw(self, method: Method, step: int) -> None:
        """Write ``step-NNNNNN.png``; the teacher's rows are made once."""
        if self._teacher is None:
            self._teacher = method.reference(self.z, self.cond, self.teacher_steps)
        student = method.sample(self.z, self.cond)
        rows = [student] if self._teacher is None else [self._teacher, student]
        pictures = [part for pair in zip(*(row.split(self.columns) for row in rows), strict=True) for part in pair]
        grid = make_grid(torch.cat(pictures).float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=self.columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, self.folder / f"step-{step:06d}.png")
