"""What becomes of samples that cannot be used: an end of the run, or a count."""

import atexit
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from models.errors import BadSample, UserError

T = TypeVar("T")


class BadSamples:
    """``skip``: they are left out, each said once while they are few; else the first is a UserError."""

    def __init__(self, skip: bool = False):
        self.skip, self._met, self._lock = skip, set[str](), threading.Lock()

    def __len__(self) -> int:
        return len(self._met)

    def meet(self, error: BadSample) -> None:
        """Count it; UserError unless such samples are to be skipped."""
        if not self.skip:
            raise UserError(f"data: {error}; `data.on_bad_picture: skip` leaves such samples out") from error
        with self._lock:
            if str(error) in self._met:
                return
            self._met.add(str(error))
            count = len(self._met)
            if count == 1:
                atexit.register(self._total)
        if count <= 10 or str(count).strip("0") == "1":
            print(f"warning: data: {' '.join(str(error).split())}: left out ({count} up to now)", file=sys.stderr)

    def _total(self) -> None:
        print(f"warning: data: {len(self)} samples could not be used and were left out", file=sys.stderr)

    def first_good(self, indices: Iterable[int], read: Callable[[int], T]) -> T:
        """What ``read`` makes of the first of ``indices`` that can be used."""
        for index in indices:
            try:
                return read(index)
            except BadSample as error:
                self.meet(error)
        raise UserError("data: no sample can be used: every picture, or every one of a class, is damaged or untold")
