"""Tar files that are read to their end, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile, TarInfo
from typing import Self
from unittest import mock


class _Header(TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        """The next header; ReadError for what Python takes for the end without a word: a damaged header, or no bytes
        where the zeros would be that end an archive."""
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            if tarfile.offset == 0:  # no archive at all, which Python says
                raise
            raise ReadError(f"a tar file is cut off or damaged at byte {tarfile.offset}: fetch it again") from error


@contextmanager
def whole_tars() -> Iterator[None]:
    """Archives that libraries read meanwhile raise tarfile.ReadError where they are cut off or damaged."""
    with mock.patch.object(TarFile, "tarinfo", _Header):
        yield
