"""What volume rendering will need before it is begun: the worst case is known from the sizes alone."""

import torch

from models.errors import UserError
from models.scene.fields import FieldSizes

SHARE = 0.6
"""Of the free memory that rendering may take."""
FEWEST = 8
"""Samples a ray below which a picture is no good."""


def point_bytes(field: FieldSizes) -> int:
    """What one sample keeps for the backward pass, with its gradients: features, decoder, place, colour."""
    match field.kind:
        case "triplane":
            features = 4 * field.channels + 2 * field.width
        case "voxels":
            features = 8
        case "hash":
            features = field.levels * (8 * 5 + 2) + 2 * field.width
    return 4 * 2 * (features + 32)


def rendering_bytes(field: FieldSizes, views: int, size: int, samples: int) -> int:
    """Of ``views`` pictures of ``size`` x ``size`` with no cell known to be empty, as in the first steps."""
    return views * size**2 * samples * point_bytes(field)


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
    fitting = min(samples, int(SHARE * free) // rendering_bytes(field, views, size, 1))
    if fitting < FEWEST:
        need = rendering_bytes(field, views, size, FEWEST) / SHARE / 2**30
        raise UserError(
            f"method.stages.resolutions: {views} views of {size} x {size} need {need:.1f} GiB free and there are "
            f"{free / 2**30:.1f}; lower the resolution or train.batch_size (more gradient_accumulation_steps)"
        )
    return fitting
