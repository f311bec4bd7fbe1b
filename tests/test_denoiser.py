"""Feature taps: which blocks run, which record gradients; conditions."""

import pytest
import torch

from models.condition import NULL_CLASS, Condition
from models.denoiser import Denoiser, Guided
from models.discriminator import Discriminator, feature_channels
from models.process import EDM
from models.teachers.embedded import PatchUNet

TAPS = ["unet.down_blocks.0", "unet.mid_block"]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = PatchUNet.create(1, 16, 4, [8, 32], patch=2, layers=1)
    return Denoiser(network, EDM(), "edm").requires_grad_(False).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    return (
        torch.randn(3, 1, 16, 16),
        torch.tensor([0.1, 1.0, 10.0]),
        Condition(class_ids=torch.tensor([0, 3, NULL_CLASS])),
    )


def test_features_stop_behind_the_last_tap(denoiser: Denoiser):
    ran: list[str] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name, block in denoiser.network.named_modules()
        if name in (*TAPS, "unet.up_blocks.0", "unet.conv_out")
    ]
    features = denoiser.features(*inputs(), TAPS)
    assert ran == TAPS and [f.shape[:2] for f in features] == [(3, 8), (3, 32)]
    denoiser.denoise(*inputs())
    assert ran[2:] == [*TAPS, "unet.up_blocks.0", "unet.conv_out"]
    for handle in handles:
        handle.remove()


def test_one_pass_gives_x0_without_and_features_with_gradient(denoiser: Denoiser):
    x_t, t, cond = inputs()
    x_t.requires_grad_()
    x0, features = denoiser.denoise_and_features(x_t, t, cond, TAPS)
    torch.testing.assert_close(x0, denoiser.denoise(x_t, t, cond).detach())
    assert not x0.requires_grad and all(feature.requires_grad for feature in features) and torch.is_grad_enabled()
    (one_pass,) = torch.autograd.grad(features[-1].square().sum(), x_t)
    (separate,) = torch.autograd.grad(denoiser.features(x_t, t, cond, TAPS)[-1].square().sum(), x_t)
    torch.testing.assert_close(one_pass, separate)
    assert one_pass.abs().sum() > 0
    with torch.no_grad():
        assert not denoiser.denoise_and_features(x_t, t, cond, TAPS)[1][0].requires_grad
        assert not torch.is_grad_enabled()


def test_an_error_inside_the_network_leaves_gradients_on_and_no_hooks(denoiser: Denoiser):
    x_t, t, _ = inputs()
    with pytest.raises(ValueError, match="no class_ids"):
        denoiser.denoise_and_features(x_t, t, Condition(), TAPS)
    with pytest.raises(ValueError, match="no block named"):
        denoiser.features(x_t, t, Condition(), ["unet.nothing"])
    assert torch.is_grad_enabled() and not any(m._forward_hooks for m in denoiser.modules())


def test_guided_features_are_the_conditional_ones(denoiser: Denoiser):
    x_t, t, cond = inputs()
    x0, features = Guided(denoiser, 2.0).denoise_and_features(x_t, t, cond, TAPS)
    plain, expected = denoiser.denoise_and_features(x_t, t, cond, TAPS)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    unconditional = denoiser.denoise(x_t, t, cond.null())
    torch.testing.assert_close(x0, unconditional + 2 * (plain - unconditional), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(x0[:2], plain[:2])


def test_discriminator_fits_the_taps_and_sees_every_sample(denoiser: Denoiser):
    channels = feature_channels(denoiser, TAPS, (1, 16, 16))
    torch.manual_seed(0)
    discriminator = Discriminator(channels, width=8)
    x_t, t, cond = inputs()
    x_t.requires_grad_()
    logits = discriminator(denoiser.features(x_t, t, cond, TAPS))
    (gradient,) = torch.autograd.grad(logits.sum(), x_t)
    assert channels == [8, 32] and logits.shape == (3,) and bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_conditions_join_and_refuse_to(denoiser: Denoiser):
    _, _, cond = inputs()
    assert cond.null().class_ids is not None and cond.null().class_ids.tolist() == [-1, -1, -1]
    assert len(Condition.cat([cond, cond.null()])) == 6 and len(cond[:2]) == 2
    with pytest.raises(ValueError, match="different fields"):
        Condition.cat([cond, Condition(pooled=torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="no null_text"):
        Condition(text=torch.zeros(2, 3, 4)).null()
    text = Condition(text=torch.ones(2, 3, 4), null_text=torch.zeros(1, 3, 4))
    assert text.null().text is not None and text.null().text.shape == (2, 3, 4)
