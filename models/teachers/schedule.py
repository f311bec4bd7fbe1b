"""What a scheduler's config says of a checkpoint's noise process, and the stock scheduler that asks a student at the
times it was trained at."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from models.errors import UserError
from models.parameterization import Prediction
from models.process import DiscreteVP, Process, RectifiedFlow
from models.teachers.base import StepTimes
from models.teachers.keys import SCHEDULE

MOST_STEPS = 4
"""A student's steps are 1 to this many."""
LEAST_ALPHA = 2**-24
"""Of ``alphas_cumprod`` where a table says zero terminal SNR, as diffusers' own schedulers have it."""


def process_of(scheduler: dict[str, Any], tokens: int) -> tuple[Process, Prediction]:
    """Noise process and kind of prediction that a scheduler's config tells of; ``tokens`` of a picture bend a flow's
    grid where the config says so. UserError for a scheduler that is neither a flow nor a discrete process."""
    name = scheduler["_class_name"]
    if is_flow(scheduler):
        if (count := scheduler.get("num_train_timesteps", 1000)) != 1000:
            raise UserError(f"teacher: num_train_timesteps {count} of its scheduler: flows are read with 1000 alone")
        return RectifiedFlow(_shift(scheduler, tokens), t_max=0.9999), "velocity"
    if "num_train_timesteps" not in scheduler or "beta_schedule" not in scheduler:
        raise UserError(f"teacher: its scheduler {name} is neither a flow nor a table of noise levels")
    kinds: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"teacher: prediction_type {kind} of its scheduler is not one of {sorted(kinds)}")
    try:
        table = DDPMScheduler.from_config(plain(scheduler)).alphas_cumprod.double()  # type: ignore[union-attr]
    except NotImplementedError as error:
        known = "linear, scaled_linear, squaredcos_cap_v2, laplace, sigmoid or trained_betas"
        raise UserError(
            f"teacher: beta_schedule {scheduler['beta_schedule']} of its scheduler is not known: {known}"
        ) from error
    if len(table) != scheduler["num_train_timesteps"]:
        raise UserError(
            f"teacher: its scheduler has {len(table)} trained_betas, but num_train_timesteps "
            f"{scheduler['num_train_timesteps']}: one of them is another checkpoint's"
        )
    if kind == "epsilon" and float(table[-1]) == 0:
        raise UserError(
            "teacher: its scheduler has zero terminal SNR (rescale_betas_zero_snr) and predicts noise, which at the "
            "last time says nothing of the picture: give prediction_type v_prediction if it was trained so, else "
            "rescale_betas_zero_snr false"
        )
    table[-1] = table[-1] or LEAST_ALPHA
    return DiscreteVP(table), kinds[kind]


def is_flow(scheduler: dict[str, Any]) -> bool:
    return scheduler["_class_name"].startswith("FlowMatch") or bool(scheduler.get("use_flow_sigmas"))


def _shift(scheduler: dict[str, Any], tokens: int) -> float:
    if not scheduler.get("use_dynamic_shifting"):
        return scheduler.get("shift") or scheduler.get("flow_shift") or 1.0
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    first, last = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = first + (tokens - low) * (last - first) / (high - low)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


def scheduler_config(pipe: Any) -> dict[str, Any]:
    """With its class's name."""
    return dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}


def plain(scheduler: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler's config says of the noise levels and the prediction."""
    return {key: scheduler[key] for key in (*SCHEDULE, "prediction_type") if key in scheduler}


def student_scheduler(process: Process, config: dict[str, Any], given: bool) -> Any:
    """A stock scheduler which makes the student's 1 to 4 steps: each answer is noised afresh for the next step.

    ``given``: its pipeline gives a flow's scheduler the times 1, 1 - 1/n, ..., 1/n to be shifted. Another pipeline's
    scheduler goes from 1 down to 1/1000, shifted twice, whatever n: the shift is such that it ends where the fourth of
    four shifted steps is.
    """
    if isinstance(process, RectifiedFlow):
        if given:
            return FlowMatchEulerDiscreteScheduler(shift=process.shift, stochastic_sampling=True)
        odds = process.shift / (MOST_STEPS - 1)  # s^2 / (999 + s^2), its last time, has the odds s^2 / 999
        return FlowMatchEulerDiscreteScheduler(
            shift=math.sqrt(999 * odds), use_exponential_sigmas=True, stochastic_sampling=True
        )
    levels = plain(config)
    table: Any = DDPMScheduler.from_config(levels)
    if float(table.alphas_cumprod[-1]) == 0:  # at LCM's own last time there would be no signal at all
        betas = [*table.betas[:-1].tolist(), 1 - LEAST_ALPHA / float(table.alphas_cumprod[-2])]
        levels |= {"rescale_betas_zero_snr": False, "trained_betas": betas}
    return LCMScheduler.from_config(levels, original_inference_steps=MOST_STEPS, clip_sample=False, steps_offset=1)


def step_times(scheduler: Any, given: bool) -> StepTimes:
    """Times at which a stock pipeline with the student's ``scheduler`` asks the network, for each number of steps."""
    rows: list[list[float]] = []
    for count in range(1, MOST_STEPS + 1):
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas: Sequence[float] | None = np.linspace(1.0, 1 / count, count).tolist() if given else None
            scheduler.set_timesteps(count, sigmas=sigmas)  # type: ignore[arg-type]
            rows.append(torch.as_tensor(scheduler.sigmas)[:-1].tolist())
        else:
            scheduler.set_timesteps(count)
            rows.append([float(t) for t in scheduler.timesteps])
    return StepTimes(rows)
