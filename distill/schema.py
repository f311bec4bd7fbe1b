"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Unknown keys are errors, numbers are finite, values cannot change, and a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
