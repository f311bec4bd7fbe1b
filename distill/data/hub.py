"""Pictures of a Hugging Face data set."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distill.bad_samples import BadSamples
from distill.class_names import KnownClasses
from distill.data.batch import Batch
from distill.data.sample import Sample, all_texts, collate, fitted, following, mode_of
from models.errors import BadSample, UserError
from models.pictures import Background, decode
from models.prompts import captions as captions_of


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
        image = decode(source, name, mode_of(shape[0]), background=self.background)
        return Sample(fitted(image, shape[1]), label, texts)


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
        return all_texts(
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
            return self.bad.first_good(following(index, labels), self._read)

    def get(self, indices: list[int]) -> Batch:
        return collate([self._good(i) for i in indices], self.columns.caption is not None)
