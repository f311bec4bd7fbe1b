"""The base of every settings class."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 2**63 - 1
"""Whole number that torch takes."""


class Schema(BaseModel):
    """Unknown keys are errors, numbers are finite and fit 64 bits, values cannot change, and a field's docstring is its
    help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        _check(value)
        return value


def _check(value: Any) -> None:
    """ValueError for a whole number that is too large, in lists too."""
    if isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a whole number beyond 64 bits, {LARGEST} at most")
