"""Optimizers, the loop, and the scoring at its end."""

from typing import Any, Literal

from pydantic import Field, field_validator

from distill.schema import Schema


class Optimizer(Schema):
    """AdamW."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """First-moment decay."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Second-moment decay."""
    eps: float = Field(default=1e-8, gt=0)
    """Denominator offset."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    eight_bit: bool = False
    """Moments in 8 bits (bitsandbytes); for GPUs."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, in student steps."""
    final: float = Field(default=1.0, ge=0, le=1)
    """Cosine decay after the warm-up to this fraction of lr at the last step; 1 keeps lr constant."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm, network by network."""


class Train(Schema):
    """The loop."""

    steps: int = Field(gt=0)
    """Student optimizer steps."""
    batch_size: int = Field(gt=0)
    """Pictures per student step over all processes and accumulation steps."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches that one turn is split into."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16: autocast over float32 master weights; auto: bf16 where the device computes in it, else no."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _bare_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    channels_last: bool = False
    """Memory layout of the convolutions' weights."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: a copy of every network in each process; fsdp2: networks of diffusers are divided over the processes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time, far less memory."""
    compile: bool = False
    """torch.compile every network."""
    cpu_threads: int | None = Field(default=None, gt=0)
    """Threads of each process on a CPU; null: the machine's cores shared by its processes."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the student's moving average per student step, warmed up as 1 - (1 + n)^-0.75."""
    log_every: int = Field(default=20, gt=0)
    """Student steps between two lines of metrics.jsonl (each is a mean over them)."""
    sample_every: int = Field(default=500, gt=0)
    """Student steps between two sample grids."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Student steps between two checkpoints."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Save also when so many minutes have gone since the last checkpoint; null: by steps alone."""
    checkpoints_total_limit: int = Field(default=2, gt=0)
    """Checkpoints to keep."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers beside metrics.jsonl."""


class Evaluation(Schema):
    """Scoring at the end of the run."""

    num_images: int = Field(default=0, ge=0)
    """Pictures to score the student on; 0: no scoring."""
    teacher_steps: int = Field(default=18, gt=0)
    """Heun steps of the teacher that it is compared with."""
