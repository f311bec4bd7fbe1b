"""Pictures in a folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distill.bad_samples import BadSamples
from distill.class_names import KnownClasses
from distill.data.batch import Batch
from distill.data.sample import Sample, all_texts, collate, fitted, following, mode_of
from distill.picture_folder import PictureFolder
from distill.settings.data import CaptionsFrom
from eval.pictures import warn_left_out
from models.errors import BadSample, UserError
from models.pictures import Background, decode


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
        return all_texts(self.content.texts, [path for path, _ in self.files], self.bad)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> Sample:
        path, label = self.files[index]
        texts = self.content.texts(path) if self.content.captions is not None else ()
        image = decode(path, str(path), mode_of(self.shape[0]), background=self.background)
        return Sample(fitted(image, self.shape[1]), label, texts)

    def _good(self, index: int) -> Sample:
        try:
            return self._read(index)
        except BadSample:
            labels = torch.tensor([label for _, label in self.files])
            return self.bad.first_good(following(index, labels), self._read)

    def get(self, indices: list[int]) -> Batch:
        return collate(list(self._pool.map(self._good, indices)), self.content.captions is not None)
