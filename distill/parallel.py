"""Networks over processes: a copy in each (DDP), or a part in each (FSDP2, torch's fully_shard).

Under FSDP2 what diffusers gave us is sharded, block by block, trained or frozen. What is small stays whole and goes by
DDP: discriminators, and LoRA's matrices, whose frozen network is sharded. Tensors are divided along their first
dimension.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from models.adapters import lora_parameters
from models.denoiser import CoreNetwork
from models.errors import UserError


def check_launch(accelerator: Accelerator) -> None:
    """UserError for what accelerate can be configured to but several networks trained in turns cannot run under."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "accelerate: DeepSpeed trains one network with one optimizer, these runs train several: "
            "launch with configs/accelerate/multi_gpu.yaml, or fsdp2.yaml and --train.parallel fsdp2"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "accelerate: the run shards its networks itself: launch with configs/accelerate/fsdp2.yaml and "
            "--train.parallel fsdp2"
        )


def _networks(network: nn.Module) -> list[CoreNetwork]:
    return [module for module in network.modules() if isinstance(module, CoreNetwork)]


def _cores(network: nn.Module) -> list[nn.Module]:
    return [module.core for module in _networks(network)]


def shard(networks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Divide the diffusers networks within ``networks`` over all processes; each once, on the device first."""
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for one in (part for network in networks for part in _networks(network)):
        core: nn.Module = one.core
        if not isinstance(core, FSDPModule):
            core.to(device)
            whole = lora_parameters(core)
            for part in one.apart():  # gathered by its own call, whoever calls it
                fully_shard(part, mesh=mesh, ignored_params=whole)
            for child in core.children():
                for block in child if isinstance(child, nn.ModuleList) else []:
                    fully_shard(block, mesh=mesh, ignored_params=whole)
            fully_shard(core, mesh=mesh, ignored_params=whole)


def is_sharded(network: nn.Module) -> bool:
    """Whether its parameters are; UserError if only some are."""
    kinds = {isinstance(parameter, DTensor) for parameter in network.parameters()}
    if len(kinds) > 1:
        raise UserError(
            "train.parallel: fsdp2 shards diffusers' networks alone; this run trains other parameters beside them "
            "(adaptive_weight, a text encoder): use ddp"
        )
    return kinds == {True}


def no_sync(wrapped: nn.Module, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Gradients of a micro-batch stay on their process."""
    return _unsynchronised(wrapped) if is_sharded(wrapped) else accelerator.no_sync(wrapped)


@contextmanager
def _unsynchronised(network: nn.Module) -> Iterator[None]:
    parts = [core for core in _cores(network) if isinstance(core, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True)


def clip_grad_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """As torch's; the norm over all processes' parts."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """``parameters`` as they were, afterwards."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
