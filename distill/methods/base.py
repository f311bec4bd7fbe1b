"""What the training loop knows of a method."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from distill.data import Batch
from models.condition import Condition
from models.seeds import Draws

Logs = dict[str, Tensor | tuple[Tensor, Tensor]]
"""Detached values to average over steps and processes: a scalar each, or a pair of sums and counts per bin."""


@dataclass(frozen=True)
class Turn:
    """One micro-batch of one turn: its number, random numbers of its own, and pictures if the method asked for them."""

    micro: int
    draws: Draws
    real: Batch | None


class Method(Protocol):
    """Two losses over named networks.

    networks:      what is trained, by the names that checkpoints use; "student" is one of them. The loop puts wrapped
                   (DDP) versions of the networks in turn here, and bare ones of the others.
    buffers:       modules without parameters whose state belongs to a checkpoint
    frozen:        modules that are only used; never written to a checkpoint
    critic_turns:  critic turns after each student turn
    pictures:      which turns need real pictures, of "student" and "critic"
    """

    networks: dict[str, nn.Module]
    buffers: dict[str, nn.Module]
    frozen: list[nn.Module]
    critic_turns: int
    pictures: set[str]

    def student_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        """Scalar loss of the network "student", and what to log."""
        ...

    def critic_loss(self, turn: Turn) -> tuple[Tensor, Logs]:
        """Scalar loss of all other networks."""
        ...

    def sample(self, z: Tensor, cond: Condition) -> Tensor:
        """Pictures (B, C, H, W) from unit noise, as the finished student would make them."""
        ...

    def reference(self, z: Tensor, cond: Condition, steps: int) -> Tensor | None:
        """The teacher's pictures from the same noise with ``steps`` steps; None if there is no teacher."""
        ...

    def diagnose(self) -> Logs:
        """What else tells whether the run is well; asked for with every sample grid, of the averaged weights."""
        ...

    def exported(self) -> nn.Module:
        """The bare network whose weights are the result of the run."""
        ...
