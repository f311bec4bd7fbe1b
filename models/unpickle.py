"""Pickles from outside, read without running code: tensors, arrays, plain containers, and modules as records.

NVIDIA's EDM and EDM2 pickle their networks with the source of their classes, to be executed when they are loaded. Here
a module becomes a :class:`Record` of its class's name and its state; the source is dropped unread.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError

VERSION = 6
"""Of NVIDIA's format; it has stayed the same from StyleGAN2-ADA to EDM2."""


class _Sealed(type):
    """Classes that a pickle may name but not change: its BUILD instruction can set attributes of any object."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class Record(metaclass=_Sealed):
    """An object that was not built: the name of its class, and its attributes."""

    __slots__ = ("class_name", "state")

    class_name: str
    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of {type(self).__name__} is {type(state).__name__}, not a dict")
        self.class_name, self.state = type(self).__name__, state

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """What an object of NVIDIA's was made with."""
        return self.state["_init_kwargs"]

    @property
    def modules(self) -> "dict[str, Record]":
        """A torch module's own modules."""
        return {name: module for name, module in self.state["_modules"].items() if module is not None}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """A torch module's parameters and buffers under the names of its ``state_dict``."""
        own = self.state["_parameters"] | self.state["_buffers"]
        passing = self.state["_non_persistent_buffers_set"]
        found = {prefix + name: value for name, value in own.items() if value is not None and name not in passing}
        for name, module in self.modules.items():
            found |= module.tensors(f"{prefix}{name}.")
        return found


class _Call(metaclass=_Sealed):
    """A function in the place of one that the file names; without attributes that the file could set."""

    __slots__ = ()


class _Persistent(_Call):
    __slots__ = ()

    def __call__(self, meta: Any) -> Record:
        """In the place of torch_utils.persistence._reconstruct_persistent_obj, which would execute the source."""
        known = isinstance(meta, dict) and {"type", "version", "class_name", "state"} <= meta.keys()
        if not known or meta["type"] != "class" or not isinstance(meta["class_name"], str):
            raise pickle.UnpicklingError("it asks for a persistent object that is not of a class")
        if meta["version"] != VERSION:
            raise pickle.UnpicklingError(f"it has version {meta['version']} of persistent objects, not {VERSION}")
        record = _record_class(meta["class_name"])()
        record.__setstate__({} if meta["state"] is None else meta["state"])
        return record


class _Storage(_Call):
    __slots__ = ()

    def __call__(self, content: bytes) -> torch.TypedStorage:
        """In the place of torch.storage._load_from_bytes, which would unpickle anything."""
        try:
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise pickle.UnpicklingError(
                f"it asks for {named[1]}" if named else "it has a tensor that is not one"
            ) from error
        if not isinstance(storage, torch.TypedStorage):
            raise pickle.UnpicklingError("it has a tensor that is not one")
        return storage


class _TensorOf(_Call):
    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        """In the place of torch._utils._rebuild_tensor_v2, without its hooks and with a check of the bounds."""
        if not isinstance(storage, torch.TypedStorage):
            raise pickle.UnpicklingError("it has a tensor without numbers")
        flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)  # type: ignore[call-overload]
        return flat.as_strided(size, stride, offset)


class _Encode(_Call):
    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        """In the place of _codecs.encode, with which old protocols write bytes."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
        return text.encode("latin1")


class _Parameter(_Call):
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Tensor:
        """In the place of torch._utils._rebuild_parameter."""
        if not isinstance(data, Tensor):
            raise pickle.UnpicklingError("it has a parameter that is no tensor")
        return data


class _Number:
    """In the place of a numpy dtype; its state may swap the bytes, nothing else."""

    __slots__ = ("dtype",)

    def __init__(self, text: str):
        if not re.fullmatch(r"[biufc]\d+", text):
            raise pickle.UnpicklingError(f"it asks for an array of {text}, not of numbers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumberOf(_Call):
    __slots__ = ()

    def __call__(self, text: str, *_: Any) -> _Number:
        """In the place of numpy.dtype, which would make pointers too."""
        return _Number(text)


class _Array(np.ndarray):
    """An array of numbers whose state cannot make it one of pointers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        _, shape, number, fortran, content = state
        super().__setstate__((1, shape, number.dtype, fortran, content))  # type: ignore[misc]


class _ArrayType(_Call):
    """In the place of numpy.ndarray: to be named, not to be called."""

    __slots__ = ()


class _ArrayOf(_Call):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        """In the place of numpy's _reconstruct: an empty one, whose state follows."""
        return _Array((0,), np.int8)


class _ArrayFrom(_Call):
    __slots__ = ()

    def __call__(self, content: bytes, number: _Number, shape: tuple[int, ...], order: Any, axes: Any = None) -> _Array:
        """In the place of numpy's _frombuffer."""
        array = np.frombuffer(content, number.dtype)
        array = array.reshape(shape, order=order) if axes is None else array.reshape(shape).transpose(axes)
        return array.copy().view(_Array)


class _Scalar(_Call):
    __slots__ = ()

    def __call__(self, number: _Number, content: bytes) -> Any:
        """In the place of numpy's scalar."""
        return np.frombuffer(content, number.dtype)[0]


NUMPY = {
    "_reconstruct": _ArrayOf(),
    "_frombuffer": _ArrayFrom(),
    "ndarray": _ArrayType(),
    "dtype": _NumberOf(),
    "scalar": _Scalar(),
}


def _record_class(name: str) -> type[Record]:
    return _Sealed(name, (Record,), {"__slots__": ()})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "torch_utils.persistence", "_reconstruct_persistent_obj":
                return _Persistent()
            case "torch.storage", "_load_from_bytes":
                return _Storage()
            case "torch._utils", "_rebuild_tensor_v2":
                return _TensorOf()
            case "torch._utils", "_rebuild_parameter":
                return _Parameter()
            case ("dnnlib.util", "EasyDict") | ("collections", "OrderedDict"):
                return dict
            case ("builtins", "set") | ("__builtin__", "set"):
                return set
            case "_codecs", "encode":
                return _Encode()
            case "torch", _ if isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
        if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and name.isidentifier():
            return _record_class(name)
        if module.partition(".")[0] == "numpy" and name in NUMPY:
            return NUMPY[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load(path: Path, key: str) -> Any:
    """What the pickle ``path`` holds. UserError, which begins with ``key``, if it is damaged or asks for anything else.

    Nothing that the file names is called.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # a hostile file can make any of them happen
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{key}: {path} is refused or damaged: {reason}") from error
