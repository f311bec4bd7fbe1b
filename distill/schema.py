"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Unknown keys are errors, values cannot change, and the docstring under a field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
