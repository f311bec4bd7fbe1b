"""What a generator is asked for: one typed value whatever the kind of conditioning."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor

NULL_CLASS = -1
"""Class id that stands for 'unconditional'; networks map it to their own extra embedding."""


@dataclass(frozen=True)
class Condition:
    """A batch of conditions; every field is None or has the batch as its first dimension.

    class_ids:     (B,) int64, :data:`NULL_CLASS` for unconditional
    text:          (B, L, D) token embeddings, with ``text_mask`` (B, L)
    pooled:        (B, D) pooled text embedding
    control:       (B, C, H, W) control image in [-1, 1]
    camera:        (B, 16) camera-to-world matrix, row by row
    guidance:      (B,) guidance scale for networks that embed it
    null_text, null_text_mask, null_pooled: what ``null()`` puts in place of text, first dimension 1
    """

    class_ids: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    control: Tensor | None = None
    camera: Tensor | None = None
    guidance: Tensor | None = None
    null_text: Tensor | None = None
    null_text_mask: Tensor | None = None
    null_pooled: Tensor | None = None

    def _batched(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("null_")}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        """Batch size; 0 for an unconditional batch, whose size only the images know."""
        return next((len(value) for value in self._batched().values()), 0)

    def __getitem__(self, index: Tensor | slice) -> Condition:
        return replace(self, **{name: value[index] for name, value in self._batched().items()})

    def to(self, device: torch.device | str) -> Condition:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})

    def null(self) -> Condition:
        """The unconditional counterpart: null class, null text; control, camera and guidance are kept."""
        changes: dict[str, Tensor] = {}
        if self.class_ids is not None:
            changes["class_ids"] = torch.full_like(self.class_ids, NULL_CLASS)
        for name in ("text", "text_mask", "pooled"):
            value, null = getattr(self, name), getattr(self, f"null_{name}")
            if value is None:
                continue
            if null is None:
                raise ValueError(f"this condition carries no null_{name}: it cannot be made unconditional")
            changes[name] = null.expand_as(value)
        return replace(self, **changes)

    def dropped(self, keep: Tensor) -> Condition:
        """Unconditional in the rows where ``keep`` (B,) is False, which is how guidance is trained."""
        null, changes = self.null(), {}
        for name, value in self._batched().items():
            other = cast(Tensor, getattr(null, name))
            changes[name] = torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, other)
        return replace(self, **changes)

    @staticmethod
    def cat(parts: list[Condition]) -> Condition:
        """Concatenate along the batch; all parts must have the same fields."""
        names = set(parts[0]._batched())
        if any(set(part._batched()) != names for part in parts):
            raise ValueError(f"conditions with different fields cannot be joined: {sorted(names)} and others")
        joined = {name: torch.cat([cast(Tensor, getattr(part, name)) for part in parts]) for name in names}
        return replace(parts[0], **joined)
