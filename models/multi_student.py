"""Several students behind one call, each for a part of the condition space (MSD, arXiv 2410.23274).

Partitions give each of N conditions one of K students; all are disjoint, complete and balanced: sizes differ by at most
one (quadrants: if no embeddings are equal). Coherent parts are what makes the students better: with one mean for each
the loss that K students save is the variance between parts.
"""

import json
import shutil
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.condition import Condition
from models.errors import UserError
from models.folders import replace_folder
from models.student import OneStepStudent
from models.teachers import embedded, load_class_conditional

# ---------------------------------------------------------------------------------------------------- partitions


def _check(count: int, students: int) -> None:
    if not 1 <= students <= count:
        raise ValueError(f"{count} conditions cannot be divided among {students} students")


def consecutive(count: int, students: int) -> Tensor:
    """Consecutive classes: the student (N,) of each of ``count``."""
    _check(count, students)
    return torch.arange(count) * students // count


def kmeans(points: Tensor, students: int, iterations: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Balanced K-means on embeddings (N, D): the student (N,) of each, and the centres (K, D).

    Assignment under equal sizes: every point takes the nearest centre that has room, those with most to lose first;
    then pairs of points change places as long as that shortens the sum of squared distances.
    """
    _check(len(points), students)
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:students]]
    owner = torch.full((len(points),), -1)
    for _ in range(iterations):
        updated = _assign(torch.cdist(points, centres) ** 2)
        if torch.equal(updated, owner):
            break
        owner = updated
        centres = torch.stack([points[owner == k].mean(0) for k in range(students)])
    return owner, centres


def _assign(cost: Tensor) -> Tensor:
    """Student (N,) of each row of ``cost`` (N, K), sizes differing by at most one."""
    count, students = cost.shape
    room = [count // students + (k < count % students) for k in range(students)]
    ordered = cost.sort(dim=1).values
    regret = ordered[:, min(1, students - 1)] - ordered[:, 0]
    owner = torch.empty(count, dtype=torch.long)
    for i in regret.argsort(descending=True, stable=True).tolist():
        k = next(k for k in cost[i].argsort().tolist() if room[k] > 0)
        owner[i] = k
        room[k] -= 1
    rows = torch.arange(count)
    while True:
        # gain[i, j]: what the total falls by if i and j change places
        own = cost[rows, owner]
        gain = own[:, None] + own[None] - cost[:, owner] - cost[:, owner].T
        best = int(gain.argmax())
        i, j = divmod(best, count)
        if gain[i, j] <= 1e-12 * (1 + own.sum()):
            return owner
        owner[i], owner[j] = owner[j].clone(), owner[i].clone()


@dataclass(frozen=True)
class Quadrants:
    """Signs along the leading principal components, each part cut at its own median: K = 2^m parts for any embedding.

    (The paper takes the signs of two coordinates; a cut at each half's own median makes the parts equal.)

    mean (D,); directions (m, D); thresholds (K - 1,), those of one level after another, as in a heap.
    """

    mean: Tensor
    directions: Tensor
    thresholds: Tensor

    @classmethod
    def fit(cls, points: Tensor, students: int) -> "Quadrants":
        """From embeddings (N, D); UserError unless ``students`` is a power of two that N and D allow."""
        levels = students.bit_length() - 1
        if students != 2**levels or students > len(points) or levels > points.shape[1]:
            raise UserError(f"partition quadrants: {students} students for {len(points)} points: take a power of two")
        points = points.double()
        mean = points.mean(0)
        directions = torch.linalg.svd(points - mean, full_matrices=False).Vh[:levels]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * largest.sign()  # a component's sign is arbitrary; all machines must agree on it
        projections = (points - mean) @ directions.T
        thresholds = torch.empty(students - 1, dtype=torch.float64)
        groups = [torch.arange(len(points))]
        for level in range(levels):
            halves = []
            for node, group in enumerate(groups):
                order = group[projections[group, level].argsort(stable=True)]
                middle = len(order) // 2 + (len(order) % 2) * (node % 2)
                low, high = order[:middle], order[middle:]
                cut = (projections[low[-1], level] + projections[high[0], level]) / 2
                thresholds[2**level - 1 + node] = cut
                halves += [low, high]
            groups = halves
        return cls(mean, directions, thresholds)

    def route(self, points: Tensor) -> Tensor:
        """The student (B,) of each embedding (B, D)."""
        projections = (points.double() - self.mean) @ self.directions.T
        student = torch.zeros(len(points), dtype=torch.long)
        for level in range(len(self.directions)):
            above = projections[:, level] > self.thresholds[2**level - 1 + student]
            student = 2 * student + above.long()
        return student


def partition(kind: str, embeddings: Tensor, students: int) -> Tensor:
    """The student (N,) of each class by the name of the partition; ``embeddings`` (N, D) are the classes'."""
    match kind:
        case "consecutive":
            return consecutive(len(embeddings), students)
        case "kmeans":
            return kmeans(embeddings, students)[0]
        case "quadrants":
            return Quadrants.fit(embeddings, students).route(embeddings)
    raise ValueError(f"no partition '{kind}'")


# ---------------------------------------------------------------------------------------------------- generation


class MultiStudent:
    """The students of one folder: the first in the folder itself, the others in ``student_1``, ``student_2``, ...

    At most ``max_loaded`` networks are in memory (None: all); the one that was used longest ago goes first.
    """

    def __init__(self, folder: Path, max_loaded: int | None = None, device: torch.device | str = "cpu"):
        if max_loaded is not None and max_loaded < 1:
            raise ValueError(f"max_loaded must be at least 1, got {max_loaded}")
        self.folder, self.max_loaded, self.device = folder, max_loaded, device
        self.spec = embedded.read_spec(folder)
        if self.spec.student_of_class is None:
            raise UserError(f"{folder} holds one student, not several")
        self.student_of_class = torch.tensor(self.spec.student_of_class)
        self._loaded: OrderedDict[int, OneStepStudent] = OrderedDict()

    def __len__(self) -> int:
        return int(self.student_of_class.max()) + 1

    def route(self, cond: Condition) -> Tensor:
        """The student (B,) of each row, on the CPU."""
        if cond.class_ids is None or bool((cond.class_ids < 0).any()):
            raise ValueError("several students need a class for every picture: none of them is unconditional")
        return self.student_of_class[cond.class_ids.cpu()]

    def student(self, index: int) -> OneStepStudent:
        """One of them, loaded if it is not."""
        if index not in self._loaded:
            denoiser, spec = load_class_conditional(self.folder if index == 0 else self.folder / f"student_{index}")
            if not spec.student:
                raise UserError(f"{self.folder}: student {index} is not a one-step student")
            while self.max_loaded is not None and len(self._loaded) >= self.max_loaded:
                self._loaded.popitem(last=False)
            self._loaded[index] = spec.one_step(denoiser.to(self.device))
        self._loaded.move_to_end(index)
        return self._loaded[index]

    @torch.no_grad()
    def generate(self, z: Tensor, cond: Condition) -> Tensor:
        """Unit noise ``z`` (B, C, H, W) to pictures in the same order, each from its condition's student."""
        owner, out = self.route(cond), torch.empty_like(z)
        parts = [(k, (owner == k).nonzero().squeeze(1).to(z.device)) for k in owner.unique().tolist()]
        threads = torch.get_num_threads()
        workers = min(len(parts), threads)
        if z.device.type != "cpu" or workers == 1 or (self.max_loaded or len(parts)) < len(parts):
            for index, rows in parts:
                out[rows] = self.student(index)(z[rows], cond[rows])
            return out

        def make(student: OneStepStudent, rows: Tensor) -> None:
            torch.set_num_threads(threads // workers)
            with torch.no_grad():
                out[rows] = student(z[rows], cond[rows])

        # Small batches do not keep all cores busy, students side by side do.
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(make, [self.student(index) for index, _ in parts], [rows for _, rows in parts]))
            finally:
                torch.set_num_threads(threads)  # a worker's number is also that of every thread begun after it
        return out


def assemble(folder: Path, students: list[Path], student_of_class: list[int], card: str) -> None:
    """Copy exported students into one folder, which loads as a pipeline and as :class:`MultiStudent`.

    Written through a temporary folder, which takes the place of an older one when it is complete.
    """
    with replace_folder(folder) as temporary:
        for index, source in enumerate(students):
            shutil.copytree(source, temporary if index == 0 else temporary / f"student_{index}", dirs_exist_ok=True)
        path = temporary / "model_index.json"
        index_file = json.loads(path.read_text()) | {"student_of_class": student_of_class}
        path.write_text(json.dumps(index_file, indent=2) + "\n")
        (temporary / "README.md").write_text(card)
