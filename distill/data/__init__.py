"""What a run learns from: pictures with conditions, and conditions alone, with a position that can be resumed."""

from distill.data.batch import Batch, Pictures, Stream, Subset
from distill.data.conditions import Captions, Classes
from distill.data.fashion_mnist import FashionMNIST
from distill.data.folder import ImageFolder
from distill.data.hub import Columns, HFPictures
from distill.data.sample import to_tensor
from distill.data.solids import SolidsPictures
from distill.data.streams import ShuffledStream, StreamedPictures

__all__ = [
    "Batch",
    "Captions",
    "Classes",
    "Columns",
    "FashionMNIST",
    "HFPictures",
    "ImageFolder",
    "Pictures",
    "ShuffledStream",
    "SolidsPictures",
    "Stream",
    "StreamedPictures",
    "Subset",
    "to_tensor",
]
