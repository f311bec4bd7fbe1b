"""Forward derivatives of the six network classes against central differences; differences along the circle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.derivatives import circle_difference, disagreement, jvp
from models.errors import UserError

Call = Callable[[Tensor, Tensor], Tensor]


class Force64(TorchFunctionMode):
    """float64 wherever a network asks for float32, so that differences are not drowned in its own rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swap = lambda value: torch.float64 if value is torch.float32 else value
        return func(*map(swap, args), **{name: swap(value) for name, value in (kwargs or {}).items()})


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def sana() -> tuple[nn.Module, Call, float]:
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        mlp_ratio=2.0, sample_size=8, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    text, guidance = randn(2, 3, 8), torch.full((2,), 0.45)
    return model, lambda x, t: model(x, encoder_hidden_states=text, timestep=t, guidance=guidance).sample, 0.6


def unet_condition() -> tuple[nn.Module, Call, float]:
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = randn(2, 3, 8)
    return model, lambda x, t: model(x, t, encoder_hidden_states=text).sample, 600.0


def unet() -> tuple[nn.Module, Call, float]:
    model = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    return model, lambda x, t: model(x, t).sample, 600.0


def sd3() -> tuple[nn.Module, Call, float]:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = randn(2, 3, 16), randn(2, 16)
    return model, lambda x, t: model(x, text, pooled, t).sample, 600.0


def dit() -> tuple[nn.Module, Call, float]:
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    labels = torch.tensor([1, 3])
    return model, lambda x, t: model(x, t, class_labels=labels).sample, 600.0


def flux() -> tuple[nn.Module, Call, float]:
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    text, pooled, text_ids = randn(2, 3, 16), randn(2, 16), torch.zeros(3, 3)
    image_ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1).float()

    def call(x: Tensor, t: Tensor) -> Tensor:
        tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        return model(tokens, text, pooled, t, img_ids=image_ids, txt_ids=text_ids).sample

    return model, call, 0.6


# The step h of the central difference, and what is left: of networks that multiply time by 1000 its own error.
FAMILIES = [
    pytest.param(sana, 1e-6, 1e-9, id="SanaTransformer2DModel"),
    pytest.param(unet_condition, 1e-6, 1e-8, id="UNet2DConditionModel"),
    pytest.param(unet, 1e-6, 1e-8, id="UNet2DModel"),
    pytest.param(sd3, 1e-6, 1e-8, id="SD3Transformer2DModel"),
    pytest.param(dit, 1e-6, 1e-8, id="DiTTransformer2DModel"),
    pytest.param(flux, 1e-7, 1e-8, id="FluxTransformer2DModel"),
]
every_family = pytest.mark.parametrize(("build", "h", "tolerance"), FAMILIES)


def make(build: Callable[[], tuple[nn.Module, Call, float]]) -> tuple[nn.Module, Call, tuple[Tensor, ...]]:
    """The network in float64 and evaluation mode, with a point and a direction in (x, t)."""
    torch.manual_seed(0)
    model, call, time = build()
    for parameter in model.parameters():  # zero-initialised output layers would make every derivative 0
        if float(parameter.detach().abs().max()) == 0:
            nn.init.normal_(parameter, std=0.1)
    t = torch.full((2,), time, dtype=torch.float64)
    return model.double().eval(), call, (randn(2, 4, 8, 8), t, randn(2, 4, 8, 8), torch.ones_like(t))


@every_family
def test_jvp_is_the_central_difference(build: Any, h: float, tolerance: float) -> None:
    _, call, (x, t, dx, dt) = make(build)
    with Force64(), torch.no_grad():
        value, derivative = jvp(call, (x, t), (dx, dt))
        assert float((value - call(x, t)).abs().max()) <= 1e-12
        central = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
    assert value.dtype == torch.float64 and float(disagreement(derivative, central)) <= tolerance


@every_family
def test_float32_is_as_good_as_its_rounding(build: Any, h: float, tolerance: float) -> None:
    """Without tricks, in the precision of training; x and t receive gradients through the tangent as well."""
    model, call, point = make(build)
    with Force64(), torch.no_grad():
        _, exact = jvp(call, point[:2], point[2:])
    torch.manual_seed(0)
    network, call, _ = build()
    network.load_state_dict(model.state_dict())
    _capture_float32(call)
    x, t, dx, dt = (value.float() for value in point)
    value, derivative = jvp(call, (x, t), (dx, dt))
    assert value.dtype == torch.float32 and float(disagreement(derivative.double(), exact)) <= 2e-4
    derivative.square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


def _capture_float32(call: Call) -> None:
    """The tensors that ``call`` closes over, such as text, in float32 too."""
    for cell in call.__closure__ or ():
        if isinstance(cell.cell_contents, Tensor) and cell.cell_contents.dtype == torch.float64:
            cell.cell_contents = cell.cell_contents.float()


def test_integer_times_are_refused() -> None:
    field = lambda x, t: x * t[:, None]
    x, t = torch.randn(2, 3), torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"argument 1 is torch.int64.*\.float\(\)"):
        jvp(field, (x, t), (x, t))
    with pytest.raises(TypeError, match=r"argument 1 is torch.float32 with a tangent of torch.float64"):
        jvp(field, (x, t.float()), (x, t.double()))


def test_a_fused_attention_without_derivative_is_named_not_ignored() -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(UserError, match="no forward derivative: choose its native") as caught:
        jvp(field, (x, torch.ones(1)), (x, torch.ones(1)))
    assert "\n" not in str(caught.value)


def test_nothing_global_is_left_behind() -> None:
    """Backends, gradient mode and the processors of the model are as before, after success and after failure."""
    backends = lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
    )
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    model, call, (x, t, dx, dt) = make(flux)
    before = backends(), registry.get_active_backend(), [type(m) for m in model.modules()]
    with Force64():
        jvp(call, (x, t), (dx, dt))

    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jvp(broken, (x, t), (dx, dt))
    assert (backends(), registry.get_active_backend(), [type(m) for m in model.modules()]) == before
    attention = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (attention,), (attention,))


def test_a_function_without_dependence_has_the_derivative_zero() -> None:
    value, derivative = jvp(lambda x: torch.ones(3), (torch.randn(3),), (torch.randn(3),))
    assert torch.equal(value, torch.ones(3)) and torch.equal(derivative, torch.zeros(3))


# ---------------------------------------------------------------------------------------------- along the circle


def smooth(factor: float) -> Call:
    """A field whose dependence on time is that of an embedding of ``factor t``."""
    return lambda x, t: torch.tanh(1.3 * x + torch.cos(factor * t)[:, None]) + x * torch.sin(factor * t)[:, None]


@pytest.mark.parametrize("central", [True, False])
def test_circle_differences_converge_with_their_order(central: bool) -> None:
    torch.manual_seed(0)
    x, d, t, field = randn(16, 3), randn(16, 3), torch.linspace(0.3, 1.4, 16, dtype=torch.float64), smooth(1.0)
    value, exact = jvp(field, (x, t), (d, torch.ones_like(t)))
    errors = [
        float(disagreement(circle_difference(field, value, x, t, d, h, 1.57, central), exact)) for h in (0.04, 0.02)
    ]
    assert errors[1] <= (1e-3 if central else 5e-2)
    assert errors[0] / errors[1] == pytest.approx(4 if central else 2, rel=0.1)


def test_circle_differences_stay_in_the_range_of_times() -> None:
    asked: list[Tensor] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return smooth(1.0)(x, t)

    x, t = randn(3, 2), torch.tensor([1e-3, 1.0, 1.5])
    for central in (True, False):
        found = circle_difference(field, smooth(1.0)(x, t), x, t, x, 0.1, 1.5, central)
        assert bool(found.isfinite().all())
    assert float(torch.cat(asked).min()) > 0 and float(torch.cat(asked).max()) <= 1.5
    assert all(times.dtype == torch.float32 for times in asked)


def test_differences_are_useless_where_time_is_multiplied_by_1000() -> None:
    torch.manual_seed(0)
    x, d, t = randn(64, 3), randn(64, 3), torch.linspace(0.3, 1.4, 64, dtype=torch.float64)
    for factor, low, high in ((1.0, 0.0, 0.01), (1000.0, 0.5, 10.0)):
        value, exact = jvp(smooth(factor), (x, t), (d, torch.ones_like(t)))
        found = float(disagreement(circle_difference(smooth(factor), value, x, t, d, 0.02, 1.57, True), exact))
        assert low <= found <= high
