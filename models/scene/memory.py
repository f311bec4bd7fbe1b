"""What volume rendering will need before it is begun: the worst case is known from the sizes alone."""

import torch

from models.errors import UserError
from models.scene.fields import FieldSizes

SHARE = 0.6
"""Of the free memory that rendering may take."""
FEWEST = 8
"""Samples a ray below which a picture is no good."""
RAY_BYTES = 4 * 120
"""What a ray takes beside its samples, with the backdrop behind it."""


def point_bytes(field: FieldSizes) -> int:
    """The most that one sample takes at a time, with what it keeps for the backward pass: while its features are made,
    in the decoder, or on the way back through it. Counted in floats of torch's operators; tiny-cuda-nn takes less."""
    wide, channels, levels = field.width, field.channels, field.levels
    match field.kind:
        case "triplane":
            floats = 24 + max(5 * channels, 4 * channels + 2 * wide, channels + 3 * wide - 16)
        case "voxels":
            floats = 28
        case "hash":
            floats = max(18 * levels + max(120, 3 * wide), 20 * levels + 2 * wide + 18, 22 * levels + 70)
    return 4 * floats


def rendering_bytes(field: FieldSizes, views: int, size: int, samples: int) -> int:
    """Of ``views`` pictures of ``size`` x ``size`` with no cell known to be empty, as in the first steps, and every ray
    through the box; parameters and their gradients aside."""
    return views * size**2 * (samples * point_bytes(field) + RAY_BYTES)


def free_bytes(device: torch.device) -> int | None:
    """Free memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def fitting_samples(field: FieldSizes, views: int, size: int, samples: int, free: int | None) -> int:
    """``samples``, or as many as fit into :data:`SHARE` of ``free`` bytes at the largest size of a schedule.

    UserError where fewer than :data:`FEWEST` do.
    """
    if free is None:
        return samples
    rays = views * size**2
    fitting = min(samples, (int(SHARE * free) // rays - RAY_BYTES) // point_bytes(field))
    if fitting < FEWEST:
        need = rendering_bytes(field, views, size, FEWEST) / SHARE / 2**30
        raise UserError(
            f"method.stages.resolutions: {views} views of {size} x {size} need {need:.1f} GiB free and there are "
            f"{free / 2**30:.1f}; lower the resolution or train.batch_size (more gradient_accumulation_steps)"
        )
    return fitting
