"""What a run learns from: pictures with conditions, and conditions alone, with a position that can be resumed."""

import atexit
import gzip
import hashlib
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.multiprocessing import get_context

from distill.bad_samples import BadSamples
from distill.class_names import KnownClasses
from distill.epochs import Epochs
from distill.picture_folder import CaptionsFrom, PictureFolder
from eval.pictures import warn_left_out
from models.condition import Condition
from models.controlnet import edges, roughened
from models.errors import BadSample, UserError, run_command
from models.pictures import Background, decode
from models.prompts import captions as captions_of
from models.prompts import settled
from models.scene import captions
from models.scene.solids import Solids
from models.seeds import Draws, mix
from models.teachers.base import ClassSpec, Spec, TextSpec

ROUGH = 0x11E5
"""Sets the random numbers of lines apart from those of a turn."""
TOLD = 0x701D
"""And those of the choice between several captions."""


@dataclass(frozen=True)
class Batch:
    """``images`` (B, C, H, W) in [-1, 1], or the x0 they are encoded to, and their conditions or captions.

    ``encoded``: they are x0 and embedded conditions, and nothing is left to be done. ``choices``: all captions of each
    picture, where one is to be told at random; ``captions`` then has one of them.
    """

    images: Tensor
    cond: Condition
    captions: tuple[str, ...] = ()
    encoded: bool = False
    choices: tuple[tuple[str, ...], ...] = ()

    def checked(self, spec: Spec) -> "Batch":
        """Itself; UserError if there is a class that ``spec`` does not know. For batches on the CPU."""
        if isinstance(spec, ClassSpec) and self.cond.class_ids is not None:
            last = int(self.cond.class_ids.max())
            if last >= spec.num_classes:
                raise UserError(f"data: a picture of class {last}, but the network knows 0 to {spec.num_classes - 1}")
        return self

    def to(self, device: torch.device) -> "Batch":
        return replace(self, images=self.images.to(device, non_blocking=True), cond=self.cond.to(device))

    def through(self, spec: Spec, seeds: Sequence[int]) -> "Batch":
        """As the teacher sees it: pictures encoded, captions embedded, and, if it follows them, lines as a hand draws
        them; which hand, and which of several captions, ``seeds`` (one a picture) say."""
        if self.encoded:
            return self
        told = self.captions
        if self.choices:
            told = tuple(c[mix(seed, TOLD) % len(c)] for c, seed in zip(self.choices, seeds, strict=True))
        cond = spec.text(told) if isinstance(spec, TextSpec) else self.cond
        if isinstance(spec, TextSpec) and spec.control is not None:
            draws = Draws([mix(seed, ROUGH) for seed in seeds], self.images.device)
            cond = replace(cond, control=roughened(edges(self.images), draws))
        return Batch(spec.encode(self.images), cond, encoded=True)


class Pictures(Protocol):
    """A set of pictures that can be indexed. ``shape`` is (C, H, W); ``class_names`` in the order of their ids.

    ``labels`` (N,) are the class ids of all.
    """

    shape: tuple[int, int, int]
    class_names: list[str]

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def get(self, indices: list[int]) -> Batch: ...


class Stream(Protocol):
    """An endless supply of batches whose position can be saved."""

    def next(self) -> Batch: ...

    def resize(self, size: int) -> None:
        """Batches of ``size`` from now on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a process of this place in a run of as many was."""
        ...

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Go on where all processes of a run were, whose number may have been another."""
        ...


class Subset:
    """The pictures of some classes; names and ids stay."""

    def __init__(self, pictures: Pictures, classes: list[int]):
        self.pictures, self.shape, self.class_names = pictures, pictures.shape, pictures.class_names
        self.indices = torch.isin(pictures.labels, torch.tensor(classes)).nonzero().squeeze(1)
        if len(self.indices) == 0:
            raise UserError(f"classes: no picture is of {classes}; there are classes 0 to {len(self.class_names) - 1}")

    @property
    def labels(self) -> Tensor:
        return self.pictures.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, indices: list[int]) -> Batch:
        return self.pictures.get(self.indices[indices].tolist())


# ---------------------------------------------------------------------------------------------- Fashion-MNIST

FASHION_MNIST_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def _intact(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in FASHION_MNIST_FILES.items()
    )


def _from_debian(folder: Path) -> None:
    """The Debian package, downloaded and unpacked without root."""
    with tempfile.TemporaryDirectory() as temporary:
        run = lambda *command: subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=300)
        run("apt-get", "download", "dataset-fashion-mnist")
        package = next(Path(temporary).glob("*.deb"))
        run("dpkg-deb", "-x", str(package), "unpacked")
        for name in FASHION_MNIST_FILES:
            shutil.copy(Path(temporary) / "unpacked/usr/share/datasets/fashion-mnist" / name, folder / name)


def _from_torchvision(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as temporary:
        FashionMNIST(temporary, download=True)
        for name in FASHION_MNIST_FILES:
            shutil.copy(Path(temporary) / "FashionMNIST/raw" / name, folder / name)


def fetch_fashion_mnist(folder: Path) -> None:
    """Put the four files into ``folder``, from Debian or through torchvision; UserError if neither is reachable."""
    if _intact(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for source in (_from_debian, _from_torchvision):
        try:
            source(folder)
        except (OSError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
            reasons.append(f"{source.__name__[6:]}: {type(error).__name__}")
        if _intact(folder):
            return
    raise UserError(
        f"Fashion-MNIST is not reachable ({', '.join(reasons)}): fetch the Debian package dataset-fashion-mnist "
        f"elsewhere and put its four .gz files into {folder}"
    )


class FashionMNIST:
    """60,000 training or 10,000 test photographs of clothes, 28 x 28 padded to 32 x 32 with background."""

    shape: tuple[int, int, int] = (1, 32, 32)
    class_names: list[str] = FASHION_MNIST_CLASSES

    def __init__(self, folder: Path, train: bool = True):
        if missing := [name for name in FASHION_MNIST_FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} lacks {missing[0]}: run `make data` (or `python -m distill.data {folder}`)")
        prefix = "train" if train else "t10k"
        try:
            raw = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        except (OSError, EOFError) as error:
            raise UserError(f"{folder} is damaged ({error}): delete it and run `make data`") from error
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
        self.pixels = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))).unsqueeze(1)
        self.labels = torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def get(self, indices: list[int]) -> Batch:
        return Batch(self.pixels[indices].float() / 127.5 - 1, Condition(class_ids=self.labels[indices]))


# ------------------------------------------------------------------------------- image folders and HF datasets


def to_tensor(image: Image.Image, size: int, channels: int, background: Background = "white") -> Tensor:
    """Shorter side to ``size``, centre crop; (C, size, size) in [-1, 1]. As it lies: nothing is turned."""
    return _fitted(decode(image, "picture", _mode(channels), upright=False, background=background), size)


def _mode(channels: int) -> Literal["RGB", "L"]:
    return "RGB" if channels == 3 else "L"


def _fitted(image: Image.Image, size: int) -> Tensor:
    """As :func:`to_tensor`, of what is decoded already."""
    scale = size / min(image.size)
    if max(image.size) > 16 * min(image.size):  # long before it is resized to far more than what is kept of it
        half = 8 * min(image.size)
        x, y = (max(0, side // 2 - half) for side in image.size)
        image = image.crop((x, y, min(image.width, x + 2 * half), min(image.height, y + 2 * half)))
    if scale != 1:
        resized = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).reshape(size, size, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class Sample:
    """A picture (C, H, W) in [-1, 1] with its class, or with its captions."""

    image: Tensor
    label: int = 0
    captions: tuple[str, ...] = ()


def collate(samples: Sequence[Sample], told: bool) -> Batch:
    """A batch of samples with captions, or with classes."""
    images = torch.stack([sample.image for sample in samples])
    if not told:
        return Batch(images, Condition(class_ids=torch.tensor([sample.label for sample in samples])))
    choices = tuple(sample.captions for sample in samples)
    several = any(len(texts) > 1 for texts in choices)
    return Batch(images, Condition(), tuple(map(settled, choices)), choices=choices if several else ())


def _following(index: int, labels: Tensor) -> Iterator[int]:
    """``index``, then the other indices of its label, beginning with the next."""
    yield index
    same = (labels == labels[index]).nonzero().squeeze(1).tolist()
    place = same.index(index)
    yield from same[place + 1 :] + same[:place]


class ImageFolder:
    """Pictures in a folder: one sub-folder per class, or all in one, which is class 0, or with captions.

    Upright, on ``background``. Numbers of classes are those of ``known``, the teacher's, if it is given. What cannot be
    used is refused, or with ``skip`` another picture of its class stands in its place. UserError as in
    :mod:`distill.picture_folder`, which says what counts.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        channels: Literal[1, 3] = 3,
        workers: int = 2,
        *,
        background: Background = "white",
        captions_from: CaptionsFrom = "auto",
        caption_column: str = "text",
        caption: str | None = None,
        known: KnownClasses | None = None,
        skip: bool = False,
    ):
        self.content = PictureFolder.read(folder, captions_from, caption_column, caption, skip)
        self.files, self.class_names = self.content.files, self.content.names
        warn_left_out(folder, self.content.walked)
        self.bad = BadSamples(skip)
        self.background: Background = background
        self.shape: tuple[int, int, int] = (channels, size, size)
        if known is not None and self.class_names:
            self._good(0)  # that no picture can be read is told before what their classes are
            ids = known.ids(self.class_names)
            self.files = [(path, ids[label]) for path, label in self.files]
            self.class_names = known.names
        self._pool = ThreadPoolExecutor(workers)

    @property
    def labels(self) -> Tensor:
        if self.content.captions is not None:
            raise UserError("classes: these pictures have captions, not classes")
        return torch.tensor([label for _, label in self.files])

    @property
    def texts(self) -> list[str]:
        """All captions; UserError for pictures of classes."""
        if self.content.captions is None:
            raise UserError("data: these pictures have classes, not captions: add .txt files or metadata.jsonl")
        return _all_texts(self.content.texts, [path for path, _ in self.files], self.bad)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> Sample:
        path, label = self.files[index]
        texts = self.content.texts(path) if self.content.captions is not None else ()
        image = decode(path, str(path), _mode(self.shape[0]), background=self.background)
        return Sample(_fitted(image, self.shape[1]), label, texts)

    def _good(self, index: int) -> Sample:
        try:
            return self._read(index)
        except BadSample:
            labels = torch.tensor([label for _, label in self.files])
            return self.bad.first_good(_following(index, labels), self._read)

    def get(self, indices: list[int]) -> Batch:
        return collate(list(self._pool.map(self._good, indices)), self.content.captions is not None)


def _all_texts(read: Callable[[Any], tuple[str, ...]], values: Sequence[Any], bad: BadSamples) -> list[str]:
    """All that pictures may be told, in order, without those that cannot be used."""
    found: list[str] = []
    for value in values:
        try:
            found += read(value)
        except BadSample as error:
            bad.meet(error)
    return found


@dataclass(frozen=True)
class Columns:
    """Of a Hugging Face data set: the picture's, and that of its class (None: all are one) or of its caption.

    ids:   the teacher's number of each of the data's classes; None: the same
    rule:  which of several captions is told
    """

    image: str
    label: str | None = None
    caption: str | None = None
    rule: str | None = None
    background: Background = "white"
    ids: tuple[int, ...] | None = None

    def class_names(self, features: Any) -> list[str]:
        """Empty for captions and for classes without names; UserError if ``features`` (None: unknown) lack a column."""
        for column in (self.image, self.caption or self.label):
            if column and features is not None and column not in features:
                raise UserError(f"data: the data set has no column '{column}'; it has {sorted(features)}")
        if self.caption:
            return []
        if self.label is None:
            return ["all"]
        label = features[self.label] if features is not None else None
        return list(getattr(label, "names", None) or [])

    def of(self, known: KnownClasses | None, features: Any) -> tuple["Columns", list[str]]:
        """Columns whose class ids are those of ``known``, the teacher's, and its names; as they are without one."""
        names = self.class_names(features)
        if known is None or not names or self.label is None:
            return self, names
        return replace(self, ids=tuple(known.ids(names))), known.names

    def class_id(self, value: Any) -> int:
        """Of what ``label`` has for a picture; UserError if that is no number from 0 on."""
        try:
            number = int(value)
            whole = not isinstance(value, float) or value == number
        except (TypeError, ValueError, OverflowError):
            number, whole = -1, False
        if number < 0 or not whole or (self.ids is not None and number >= len(self.ids)):
            raise UserError(f"data.label_column: '{self.label}' has {value!r:.40} for a class, not a number from 0 on")
        return number if self.ids is None else self.ids[number]

    def texts(self, value: Any, name: str) -> tuple[str, ...]:
        """The captions that ``caption`` has for a picture; BadSample if there are none."""
        return captions_of(value, name, self.rule)

    def sample(self, row: dict[str, Any], shape: tuple[int, int, int], name: str) -> Sample:
        """A row; webdataset's ``cls`` and ``txt`` files arrive as values or as their text.

        BadSample, with the row's ``name``, for a picture or caption that cannot be used.
        """
        source, path = _picture_in(row[self.image], name)
        name = f"{name} ({path})" if path else name
        texts = self.texts(row[self.caption], name) if self.caption else ()
        label = self.class_id(row[self.label]) if self.label and not self.caption else 0
        image = decode(source, name, _mode(shape[0]), background=self.background)
        return Sample(_fitted(image, shape[1]), label, texts)


def _picture_in(value: Any, name: str) -> tuple[bytes | Path | Image.Image, str | None]:
    """What a picture's column has, to be decoded, and its file's name if it has one."""
    match value:
        case None:
            raise BadSample(f"{name} has no picture")
        case bytes() | Image.Image():
            return value, None
        case {"bytes": bytes(data), **rest}:
            return data, rest.get("path")
        case {"path": str(path)} | str(path) if "://" in path:
            from datasets.utils.file_utils import xopen

            try:
                with xopen(path, "rb") as file:
                    return file.read(), path
            except Exception as error:  # of whatever file system it is on
                raise BadSample(f"{name} ({path}) cannot be read: {' '.join(str(error).split())[:200]}") from error
        case {"path": str(path)} | str(path):
            return Path(path), path
        case _:
            raise BadSample(f"{name} has {type(value).__name__} for a picture, not a file's content")


def row_name(row: dict[str, Any], number: int) -> str:
    """What a sample is called in messages: by its shard where it is of one."""
    if "__key__" in row:
        return f"sample {row['__key__']} of {row.get('__url__')}"
    return f"sample {number}"


class HFPictures:
    """A map-style Hugging Face data set. Classes without names are called by their numbers."""

    def __init__(
        self,
        dataset: Any,
        shape: tuple[int, int, int],
        columns: Columns,
        known: KnownClasses | None = None,
        skip: bool = False,
    ):
        self.columns, self.class_names = columns.of(known, dataset.features)
        self.dataset, self.shape, self.bad = dataset, shape, BadSamples(skip)
        if not self.class_names and not columns.caption and len(dataset):
            self.class_names = [str(i) for i in range(int(self.labels.max()) + 1)]

    @property
    def labels(self) -> Tensor:
        if self.columns.caption:
            raise UserError("classes: these pictures have captions, not classes")
        label = self.columns.label
        if not label:
            return torch.zeros(len(self.dataset), dtype=torch.long)
        return torch.tensor([self.columns.class_id(value) for value in self.dataset[label]])

    @property
    def texts(self) -> list[str]:
        """All captions."""
        values = self.dataset[self.columns.caption]
        return _all_texts(
            lambda pair: self.columns.texts(pair[1], f"sample {pair[0]}"), list(enumerate(values)), self.bad
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def _read(self, index: int) -> Sample:
        row = self.dataset[index]
        return self.columns.sample(row, self.shape, row_name(row, index))

    def _good(self, index: int) -> Sample:
        try:
            return self._read(index)
        except BadSample:
            labels = torch.zeros(len(self)) if self.columns.caption else self.labels
            return self.bad.first_good(_following(index, labels), self._read)

    def get(self, indices: list[int]) -> Batch:
        return collate([self._good(i) for i in indices], self.columns.caption is not None)


class SolidsPictures:
    """The solids world: scene i depends on i alone. Captions kept for evaluation are in no scene."""

    def __init__(
        self,
        count: int,
        size: int = 64,
        turntable: float = 0.0,
        pairs: float = 0.0,
        device: str = "cpu",
        workers: int = 0,
        keep: bool = False,
    ):
        self.count, self.shape, self.workers = count, (3, size, size), workers
        self.class_names: list[str] = []
        self.world = Solids(size, captions.held_out(), turntable, pairs, device)
        self._kept: dict[int, tuple[Tensor, str]] | None = {} if keep else None
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
            atexit.register(self._pool.shutdown, cancel_futures=True)

    @property
    def labels(self) -> Tensor:
        raise UserError("classes: the solids world has captions, not classes")

    def __len__(self) -> int:
        return self.count

    def get(self, indices: list[int]) -> Batch:
        if self._kept is None:
            images, prompts = self._rendered(indices)
            return Batch(images, Condition(), tuple(prompts))
        if new := [index for index in indices if index not in self._kept]:
            images, prompts = self._rendered(new)
            pixels = ((images + 1) * 127.5).round().byte()
            self._kept |= zip(new, zip(pixels, prompts, strict=True), strict=True)
        pixels, prompts = zip(*(self._kept[index] for index in indices), strict=True)
        return Batch(torch.stack(pixels).float() / 127.5 - 1, Condition(), prompts)

    def _rendered(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        if self._pool is None:
            return self.world.captioned(indices)
        share = -(-len(indices) // self.workers)
        parts = [indices[i : i + share] for i in range(0, len(indices), share)]
        images, prompts = zip(*self._pool.map(self.world.captioned, parts), strict=True)
        return torch.cat(images), list(itertools.chain(*prompts))


# ------------------------------------------------------------------------------------------------------ streams


class ShuffledStream:
    """Epoch after epoch of a shuffled set. The order is a function of the seed, the position one number.

    ``size`` is this process's batch; processes take consecutive slices of one global batch, so the pictures of a step
    do not depend on how many processes share it. The next batch is prepared while the current one is used.
    With ``groups`` (N,), numbers of the files that pictures are in, those of a file come one after another, which is
    how files that do not fit into memory are read: files in a random order, and what is in them too.
    """

    def __init__(
        self, pictures: Pictures, size: int, seed: int, rank: int = 0, world: int = 1, groups: Tensor | None = None
    ):
        self.pictures, self.size, self.seed, self.rank, self.world = pictures, size, seed, rank, world
        self.groups = groups
        self.position = 0
        self._order: tuple[int, Tensor] | None = None
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._pool = ThreadPoolExecutor(1)

    def _index(self, sample: int) -> int:
        epoch, offset = divmod(sample, len(self.pictures))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(len(self.pictures), generator=generator)
            if self.groups is not None:
                places = torch.randperm(int(self.groups.max()) + 1, generator=generator)
                order = order[places[self.groups[order]].argsort(stable=True)]
            self._order = (epoch, order)
        return int(self._order[1][offset])

    def _load(self, position: int) -> Batch:
        start = position + self.rank * self.size
        return self.pictures.get([self._index(start + i) for i in range(self.size)])

    def next(self) -> Batch:
        if self._ahead is not None and self._ahead[0] == self.position:
            batch = self._ahead[1].result()
        else:
            batch = self._pool.submit(self._load, self.position).result()
        self.position += self.size * self.world
        self._ahead = (self.position, self._pool.submit(self._load, self.position))
        return batch

    def resize(self, size: int) -> None:
        self.size, self._ahead = size, None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "count": len(self.pictures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whatever the number of processes; a line where the number of pictures is another, hence their order."""
        count, before = len(self.pictures), state.get("count")
        self.position = state["position"]
        if before not in (None, count):
            self.position = -(-self.position // before) * count  # the epoch after that one
            if self.rank == 0:
                print(f"data: {count} pictures, not {before} as before: a new epoch is begun", file=sys.stderr)

    def load_states(self, states: list[dict[str, Any]]) -> None:
        self.load_state_dict(states[0])


class StreamedPictures:
    """An iterable Hugging Face data set (streaming, webdataset shards), split over processes.

    Each epoch takes the shards in another order and reads several by turns; pictures within a shard keep theirs, since
    a buffer that shuffles them could not be resumed exactly. Positions are those of :class:`~distill.epochs.Epochs`.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        shape: tuple[int, int, int],
        columns: Columns,
        rank: int = 0,
        world: int = 1,
        skip: bool = False,
    ):
        self.size, self.shape, self.columns = size, shape, columns
        self.rows, self.bad = Epochs(dataset, rank, world), BadSamples(skip)
        self._read, self._good = 0, 0
        """Rows since the stream was opened, for messages; the epoch of the last one that could be used."""

    def next(self) -> Batch:
        samples: list[Sample] = []
        while len(samples) < self.size:
            row = self.rows.next()
            if self.rows.epoch > self._good + 1:
                raise UserError("data: a whole epoch of the stream has no picture, or none that can be used")
            self._read += 1
            try:
                samples.append(self.columns.sample(row, self.shape, row_name(row, self._read - 1)))
                self._good = self.rows.epoch
            except BadSample as error:
                self.bad.meet(error)
        return collate(samples, self.columns.caption is not None)

    def resize(self, size: int) -> None:
        self.size = size

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)
        self._good = self.rows.epoch

    def load_states(self, states: list[dict[str, Any]]) -> None:
        self.rows.load_states(states)
        self._good = self.rows.epoch


# --------------------------------------------------------------------------------------------------- conditions


class Classes:
    """Conditions alone: classes drawn uniformly, of all ``count`` or of ``only``."""

    def __init__(self, count: int, only: list[int] | None = None):
        self.ids = torch.tensor(range(count) if only is None else only)

    def sample(self, draws: Draws) -> Condition:
        """One condition for each row of ``draws``."""
        index = (draws.uniform() * len(self.ids)).long().clamp(max=len(self.ids) - 1)
        return Condition(class_ids=self.ids.to(index.device)[index])


class Captions:
    """Conditions alone: of ``count`` prompts, drawn uniformly; ``embed`` has them by their numbers."""

    def __init__(self, count: int, embed: Callable[[list[int]], Condition]):
        self.count, self.embed = count, embed

    @classmethod
    def of(cls, prompts: Sequence[str], spec: TextSpec) -> "Captions":
        """Of a list of prompts."""
        return cls(len(prompts), lambda indices: spec.text([prompts[i] for i in indices]))

    def sample(self, draws: Draws) -> Condition:
        """One condition for each row of ``draws``."""
        index = (draws.uniform() * self.count).long().clamp(max=self.count - 1)
        return self.embed(index.tolist()).to(draws.device)


def main(folder: tyro.conf.Positional[Path] = Path("data/fashion-mnist")) -> None:
    """Fetch Fashion-MNIST, if it is not there.

    Args:
        folder: Where to.
    """
    fetch_fashion_mnist(folder)
    print(f"Fashion-MNIST is in {folder}")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
