"""Whose classes are whose: the data's names or numbers against the teacher's."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.errors import UserError

ClassesBy = Literal["name", "position"]
_NUMBER = re.compile(r"(?:(?:class|label)[ _-]?)?(\d+)", re.IGNORECASE)


def number_of(name: str) -> int | None:
    """Of a class that is called by its number: 7, 007, class7, label_7."""
    found = _NUMBER.fullmatch(name)
    return int(found[1]) if found else None


def ordered(names: Sequence[str]) -> list[str]:
    """Alphabetical, or by value where all are numbers."""
    numbers = {name: number_of(name) for name in names}
    if None in numbers.values():
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name))


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


@dataclass(frozen=True)
class KnownClasses:
    """The teacher's classes, in the order of their ids; ``path`` is its, for messages."""

    names: list[str]
    path: str
    by: ClassesBy = "name"

    def ids(self, names: Sequence[str]) -> list[int]:
        """The teacher's id of each of the data's classes: by name, else by number; by place with ``position``.

        Letters' case, spaces, hyphens and underscores do not matter. UserError where a class is none of the teacher's.
        """
        if len(names) > len(self.names):
            raise UserError(f"data: {len(names)} classes, but the teacher {self.path} knows {len(self.names)}")
        if len(self.names) == 1 or self.by == "position":
            return list(range(len(names)))
        found = self._by_name(names) or self._by_number(names)
        if found is None:
            table = self._table()
            other = next((name for name in names if len(table[_folded(name)]) != 1), names[0])
            several = len(table[_folded(other)]) > 1
            known = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
            raise UserError(
                f"data: the class '{other}' is {'several' if several else 'none'} of those that the teacher "
                f"{self.path} knows ({known}): call classes as it does, or by their numbers; `data.classes_by: "
                f"position` makes {', '.join(names[:2])}{', ...' if len(names) > 2 else ''} its classes 0, 1, ..."
            )
        if len(set(found)) < len(found):
            twice = next(i for i in found if found.count(i) > 1)
            same = [name for name, i in zip(names, found, strict=True) if i == twice]
            raise UserError(
                f"data: the classes {', '.join(same)} are all the teacher's '{self.names[twice]}': merge them"
            )
        return found

    def check_places(self, names: Sequence[str]) -> None:
        """UserError if a class that data know by its number has the name of another one of the teacher's."""
        table = self._table()
        for i, name in enumerate(names):
            if (ids := table[_folded(name)]) and i not in ids:
                raise UserError(
                    f"data: class {i} is '{name}', which the teacher {self.path} knows as {min(ids)}: its classes are "
                    "in another order: give pictures in folders of these names, or the teacher that they are made for"
                )

    def _table(self) -> defaultdict[str, set[int]]:
        """Ids by folded name, and by each of its synonyms between commas."""
        table: defaultdict[str, set[int]] = defaultdict(set)
        for i, name in enumerate(self.names):
            for word in {name, *name.split(",")}:
                table[_folded(word)].add(i)
        return table

    def _by_name(self, names: Sequence[str]) -> list[int] | None:
        if all(self.names.count(name) == 1 for name in names):
            return [self.names.index(name) for name in names]
        table = self._table()
        found = [table[_folded(name)] for name in names]
        return [next(iter(ids)) for ids in found] if all(len(ids) == 1 for ids in found) else None

    def _by_number(self, names: Sequence[str]) -> list[int] | None:
        numbers = [number_of(name) for name in names]
        if any(number is None or number >= len(self.names) for number in numbers):
            return None
        return [number for number in numbers if number is not None]
