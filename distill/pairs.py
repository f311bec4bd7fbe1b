"""Pairs of noise and the teacher's own picture, for DMD's regression term.

python -m distill.pairs --teacher embedded:fashion_mnist --output data/pairs.safetensors --count 2000
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange

from models.condition import Condition
from models.denoiser import Denoiser
from models.errors import UserError, run_command
from models.seeds import Draws
from models.student import heun
from models.teachers import load_class_conditional


class Pairs:
    """``z`` (N, C, H, W), ``class_ids`` (N,), ``target`` (N, C, H, W), drawn uniformly with replacement.

    One pair goes with each ``every``-th row of a turn, so that processes sharing a batch draw the same pairs as one.
    UserError if they are of another shape, or not of the weights of ``teacher``.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], every: int, teacher: Denoiser | None = None):
        try:
            with safe_open(path, "pt") as file:
                made: dict[str, str] = file.metadata() or {}
            tensors = load_file(path)
            self.z, self.class_ids, self.target = tensors["z"], tensors["class_ids"], tensors["target"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"method.regression.path: {path} is not a file of pairs ({error}): run `python -m distill.pairs`"
            ) from error
        if tuple(self.z.shape[1:]) != shape:
            raise UserError(
                f"method.regression.path: pairs of shape {tuple(self.z.shape[1:])}, the teacher's is {shape}"
            )
        if teacher is not None and "weights" not in made:
            print(f"method.regression.path: {path} does not tell whose pairs they are: not compared", file=sys.stderr)
        elif teacher is not None and made["weights"] != digest(teacher):
            raise UserError(
                f"method.regression.path: {path} was made by another teacher, or by other weights of "
                f"{made.get('teacher')}: run `python -m distill.pairs` again"
            )
        self.every = every

    def sample(self, draws: Draws) -> tuple[Tensor, Condition, Tensor]:
        """ceil(B / every) pairs for the B rows of ``draws``: noise, conditions, pictures."""
        index = (draws.uniform()[:: self.every] * len(self.z)).long().clamp(max=len(self.z) - 1).cpu()
        place = lambda tensor: tensor[index].to(draws.device)
        return place(self.z), Condition(class_ids=place(self.class_ids)), place(self.target)


def digest(network: nn.Module) -> str:
    """SHA-256 of its weights."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass
class Arguments:
    """Make pairs of noise and teacher picture."""

    teacher: str
    """Folder of the teacher or embedded:NAME."""
    output: Path
    """File to write (.safetensors)."""
    count: int = 2000
    """Number of pairs."""
    steps: int = 18
    """Heun steps."""
    batch: int = 250
    """Pairs at a time."""
    seed: int = 0
    """Pair i has seed `seed + i` and class `i mod classes`."""


def make(arguments: Arguments) -> None:
    if min(arguments.count, arguments.steps, arguments.batch) < 1:
        raise UserError("--count, --steps and --batch must be at least 1")
    denoiser, spec = load_class_conditional(arguments.teacher)
    if spec.student:
        raise UserError(f"--teacher: {arguments.teacher} is a one-step student: name the teacher that it was made from")
    parts: list[dict[str, Tensor]] = []
    for start in trange(0, arguments.count, arguments.batch, desc="pairs"):
        index = torch.arange(start, min(start + arguments.batch, arguments.count))
        z = Draws([arguments.seed + int(i) for i in index]).normal(*spec.shape)
        classes = index % spec.num_classes
        target = heun(denoiser, z, Condition(class_ids=classes), arguments.steps)
        parts.append({"z": z, "class_ids": classes, "target": target})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    made = {"teacher": arguments.teacher, "weights": digest(denoiser)}
    save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, arguments.output, made)


if __name__ == "__main__":
    run_command(lambda: make(tyro.cli(Arguments)))
