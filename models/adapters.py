"""LoRA (arXiv 2106.09685), three in one: one frozen network whose adapters are the student's and the critic's.

The teacher is the network itself: adapters are on only within a call of the network that owns them. What is trained,
averaged and checkpointed is an adapter's few matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.condition import Condition
from models.denoiser import CoreNetwork
from models.errors import UserError
from models.lora_targets import TARGETS

if TYPE_CHECKING:  # peft takes seconds to import, and few runs have adapters
    from peft.tuners.lora import LoraLayer


def _layers(network: nn.Module) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def switched(layers: Sequence[LoraLayer], adapter: str | None) -> Iterator[None]:
    """A network's adapted ``layers`` with one of their adapters, or none; requires_grad of no parameter is touched.

    peft's own switches set requires_grad, and so stop the training of whatever is switched off before the backward
    pass.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = adapter or "", adapter is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


class Adapted(CoreNetwork):
    """``network`` with a new adapter of its own, as ``network(x, t, cond)``; only the adapter's parameters are its own.

    ``network`` has a part of diffusers named ``core``. Before any training the output is the bare network's, bit by
    bit. UserError if none of its layers that peft can adapt is called as ``targets`` say.
    """

    def __init__(self, network: Any, name: str, rank: int, alpha: int | None = None, targets: Sequence[str] = TARGETS):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.name, self._shared = name, [network]  # a list: not a sub-module
        config = LoraConfig(
            r=rank, lora_alpha=alpha if alpha else rank, target_modules=list(targets), init_lora_weights="gaussian"
        )
        try:
            inject_adapter_in_model(config, network.core, adapter_name=name)
        except ValueError as error:
            raise UserError(f"lora.targets: {list(targets)} name no layer that this network can adapt") from error
        layers = _layers(network)
        self._layers: list[LoraLayer] = []
        for layer in layers.values():
            layer._disable_adapters = True
        matrices = {
            f"{place}.{side}": getattr(layer, side)[name]
            for place, layer in layers.items()
            for side in ("lora_A", "lora_B")
            if name in getattr(layer, side)
        }
        self.adapter = nn.ModuleDict({key.replace(".", "/"): module for key, module in matrices.items()})

    @property
    def network(self) -> Any:
        """The network with all its adapters."""
        return self._shared[0]

    @property
    def core(self) -> Any:
        return self.network.core

    def apart(self) -> list[nn.Module]:
        return self.network.apart()

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if not self._layers:  # by now all adapters are there
            self._layers = list(_layers(self.network).values())
        with switched(self._layers, self.name):
            return self.network(x, t, cond)


def lora_parameters(core: nn.Module) -> set[nn.Parameter]:
    """The matrices of all adapters on it."""
    sides = [side for layer in _layers(core).values() for side in (layer.lora_A, layer.lora_B)]
    return {parameter for side in sides for parameter in side.parameters()}


def merged(network: nn.Module) -> nn.Module:
    """The network with whole weights on the CPU, its adapter added to them; itself if there is nothing to do.

    A sharded network is gathered: all processes must call it.
    """
    from torch.distributed.tensor import DTensor

    bare: Any = network.network if isinstance(network, Adapted) else network
    sharded = any(isinstance(parameter, DTensor) for parameter in bare.parameters())
    if bare is network and not sharded:
        return network
    core = bare.core
    state: dict[str, Tensor] = {}
    for name, value in [*core.named_parameters(), *core.named_buffers()]:
        if ".lora_" not in name:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            state[name.replace(".base_layer.", ".")] = whole.detach().cpu()
    if isinstance(network, Adapted):
        for name, layer in _layers(core).items():
            delta = layer.get_delta_weight(network.name).detach().cpu()  # type: ignore[operator]
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    kind: Any = type(core).__mro__[2] if sharded else type(core)  # behind the class that fully_shard makes
    fresh = kind.from_config(core.config)
    fresh.load_state_dict(state, strict=False)
    clone = copy.copy(bare)
    clone._modules = {name: fresh if module is core else module for name, module in bare._modules.items()}
    return clone


def save_lora(folder: Path, part: str, network: nn.Module) -> None:
    """The adapter as ``pytorch_lora_weights.safetensors``, which a pipeline's ``load_lora_weights`` reads.

    ``part`` is the network's name in the pipeline. Scaled to alpha = rank, as files without an alpha are read.
    """
    if not isinstance(network, Adapted):
        return
    from peft import get_peft_model_state_dict

    layer = next(iter(_layers(network.core).values()))
    scale = layer.scaling[network.name]
    state = {
        f"{part}.{key}": (scale if ".lora_B." in key else 1.0) * value.detach().float().cpu().contiguous()
        for key, value in get_peft_model_state_dict(network.core, adapter_name=network.name).items()
    }
    save_file(state, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def checkpointed(network: Any) -> None:
    """Blocks recompute their activations in the backward pass, with the adapter that was on in the forward pass."""

    layers = list(_layers(network).values())

    def contexts(adapter: str | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), switched(layers, adapter)

    def run(block: Any, *inputs: Any) -> Any:
        adapter = None if layers[0]._disable_adapters else cast(str, layers[0]._active_adapter)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: contexts(adapter))

    network.core.enable_gradient_checkpointing(run)
