"""What a run learns from."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.class_names import ClassesBy
from distill.schema import Schema
from models.pictures import Background

CaptionsFrom = Literal["auto", "files", "metadata", "none"]


class FashionMNISTData(Schema):
    """Fashion-MNIST: 60,000 training photographs, 32 x 32 with padding, ten classes."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    path: Path = Path("data/fashion-mnist")
    """Folder of the four .gz files; `make data` fills it."""


class RealPictures(Schema):
    """How files of pictures become samples; see docs/pictures.md."""

    background: Background = "white"
    """Colour behind transparent pixels."""
    on_bad_picture: Literal["refuse", "skip"] = "refuse"
    """What a damaged picture, or one without the caption asked for, does: end the run, or be left out and counted."""
    classes_by: ClassesBy = "name"
    """name: a class is the teacher's of the same name, or of its number; position: the teacher's in the same place."""
    caption: str | None = None
    """Which caption of several is told: first, random, whole (of a .txt of several lines), or the key of a mapping."""


class ImageFolderData(RealPictures):
    """Pictures in a folder, one sub-folder per class, or with captions."""

    kind: Literal["image_folder"] = "image_folder"
    path: Path
    """The folder."""
    captions_from: CaptionsFrom = "auto"
    """files: name.txt beside name.png; metadata: metadata.jsonl; auto: whichever is there, for teachers of prompts."""
    caption_column: str = "text"
    """Key of the captions in metadata.jsonl."""
    size: int = Field(default=32, gt=0)
    """Side in pixels: shorter side resized to it (Lanczos), then centre crop."""
    channels: Literal[1, 3] = 3
    """1 gray, 3 RGB."""
    workers: int = Field(default=2, gt=0)
    """Threads that decode pictures."""


class HFData(RealPictures):
    """A data set of the Hugging Face `datasets` library: hub id, local folder, or a builder such as webdataset."""

    kind: Literal["hf_dataset"] = "hf_dataset"
    path: str
    """Hub id, folder, or builder name (webdataset, parquet, imagefolder)."""
    data_files: str | None = None
    """Files for a builder, with wildcards: "shards/*.tar"."""
    split: str = "train"
    """Split to use."""
    streaming: bool = False
    """Read as a stream: no random access, exact position kept; shards are split over processes."""
    image_column: str = "image"
    """Column of pictures (webdataset: the file suffix, e.g. "png")."""
    label_column: str | None = "label"
    """Column of class ids; null: all pictures are class 0."""
    caption_column: str | None = None
    """Column of captions (webdataset: "txt"), for teachers that are asked for prompts, in label_column's place."""
    prompts: Path | None = None
    """Text file with a prompt in each line, what a student is asked for; null: the captions of all pictures."""
    size: int = Field(default=32, gt=0)
    """Side in pixels."""
    channels: Literal[1, 3] = 3
    """1 gray, 3 RGB."""

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.caption_column is not None and self.label_column not in (None, "label"):
            raise ValueError("caption_column: pictures have captions or classes: leave out one of the two columns")
        return self


class SolidsData(Schema):
    """The solids world: scenes of one to four coloured solids with captions, rendered as they are needed."""

    kind: Literal["solids"] = "solids"
    count: int = Field(default=1_000_000, gt=0)
    """Scenes of an epoch."""
    size: int = Field(default=64, gt=0)
    """Side in pixels."""
    turntable: float = Field(default=0.0, ge=0, le=1)
    """Share of pictures of one solid in the middle, from all sides, whose captions say from where."""
    pairs: float = Field(default=0.0, ge=0, le=1)
    """Share of the others that show two solids named apart, the hardest captions; the rest are of any of six tasks."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """Where pictures are rendered: cpu, or cuda for a GPU."""
    workers: int = Field(default=0, ge=0)
    """Processes that render; 0: this one."""
    keep: bool = False
    """Keep what was rendered, a byte a value, for the next epochs of this process."""


class ConditionsOnly(Schema):
    """No pictures: the student learns from the teacher alone. For methods without a discriminator."""

    kind: Literal["conditions_only"] = "conditions_only"
    prompts: Path | None = None
    """Text file with a prompt in each line, for teachers that are asked for prompts; classes need none."""


class PrecomputedData(Schema):
    """Latents and text embeddings that `python -m distill.precompute` made, of pictures or of prompts alone.

    Neither autoencoder nor text encoder is asked in training; a student is asked for the prompts of all samples.
    """

    kind: Literal["precomputed"] = "precomputed"
    path: Path
    """The folder."""
    streaming: bool = False
    """Read shard after shard, in a random order, for data that do not fit into memory; false: anything at any time."""


Data = Annotated[
    FashionMNISTData | ImageFolderData | HFData | SolidsData | ConditionsOnly | PrecomputedData,
    Field(discriminator="kind"),
]
