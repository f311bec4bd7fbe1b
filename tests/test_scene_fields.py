"""Cameras, fields and the volume renderer against closed forms."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distill.estimate import LiveBytes
from models.errors import UserError
from models.scene import saved, volume
from models.scene.backdrops import Learned, Plain, Studio
from models.scene.cameras import Camera, Orbit, rays
from models.scene.doctor import findings
from models.scene.fields import Blob, Box, Field, FieldSizes, HashEncoding, HashGrid
from models.scene.memory import fitting_samples, rendering_bytes
from models.scene.particles import Fields, Views
from models.scene.volume import Occupancy, render, span

BOX = Box((0.1, -0.2, 0.3), 1.5)
KINDS = [FieldSizes(side=8), FieldSizes("voxels", side=8), FieldSizes("hash", levels=4, log_table=8, finest=32)]


class Slab(Field):
    """Density ``rho`` between two heights, colour by the height."""

    def __init__(self, rho: float, low: float, high: float):
        super().__init__(Box((0.0, 0.0, 0.0), 1.0), Blob())
        self.rho, self.low, self.high = rho, low, high

    def raw(self, scaled: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        height = points[:, 1]
        inside = (height > self.low) & (height < self.high)
        return self.rho * inside.float(), torch.stack([(height + 1) / 2, 0 * height, 0 * height + 0.25], 1)


def test_a_slab_is_rendered_as_beer_and_lambert_say():
    field, samples = Slab(3.0, -0.5, 0.25), 2000
    slant = torch.tensor([[0.0, -1.0, 0.0], [0.6, -0.8, 0.0]])
    origins = torch.tensor([[0.0, 3.0, 0.0], [-2.25, 3.0, 0.0]])
    met = render(field, origins, slant, samples)
    thickness = 0.75 / slant[:, 1].abs()
    opacity = 1 - torch.exp(-3.0 * thickness)
    torch.testing.assert_close(met.opacity, opacity, atol=2e-3, rtol=0)
    # int_0^L rho e^{-rho s} colour(s) ds with a colour that falls linearly along the ray
    slope = slant[:, 1].abs() / 2
    mean = 1.25 / 2 * opacity - slope * (1 / 3.0 - (thickness + 1 / 3.0) * torch.exp(-3.0 * thickness))
    torch.testing.assert_close(met.colour[:, 0], mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(met.colour[:, 2], 0.25 * opacity, atol=1e-3, rtol=0)


def test_rays_enter_and_leave_the_box_where_geometry_says():
    box = Box((1.0, 0.0, 0.0), 0.5)
    origins = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 2.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    near, far, meets = span(box, origins, directions)
    assert meets.tolist() == [True, True, False]
    torch.testing.assert_close(near[:2], torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(far[:2], torch.tensor([2.5, 0.5]))


@pytest.mark.parametrize("sizes", KINDS, ids=lambda s: s.kind)
def test_fields_start_as_the_blob_and_learn(sizes: FieldSizes):
    torch.manual_seed(0)
    field = sizes.new(BOX, Blob(10.0, 0.5, (0.0, 0.2, 0.0)))
    centre = BOX.world(torch.tensor([[0.0, 0.2, 0.0], [0.0, 0.2, 0.9]]))
    density, colour = field(centre)
    assert density[0] > 5 and density[1] < 0.01 and bool(((colour > 0) & (colour < 1)).all())
    field.density(BOX.world(torch.rand(500, 3) * 2 - 1)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in field.parameters())


def test_a_hollow_scene_starts_empty_in_the_middle():
    field = FieldSizes(side=8).new(Box(), Blob(-10.0, 0.5))
    density = field.density(torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.0, 0.0]]))
    assert density[0] < 0.1 and density[1] > 5


def test_hash_encoding_interpolates_its_table():
    """A dense level: the value at a place of the grid is that of the table; between two it is the mean."""
    torch.manual_seed(0)
    encoding = HashEncoding(1, 10, 4, 4)
    at = lambda *cell: torch.tensor([[(c - 0.5) / 3 for c in cell]])  # cell + 0.5 = 3 x + 0.5
    index = 1 + 2 * 4 + 1 * 16
    torch.testing.assert_close(encoding(at(1, 2, 1))[0], encoding.table[index])
    between = encoding(at(1.5, 2, 1))[0]
    torch.testing.assert_close(between, (encoding.table[index] + encoding.table[index + 1]) / 2)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("tinycudann") is None, reason="tiny-cuda-nn is not installed")
def test_the_fused_encoding_gives_the_same_numbers():
    sizes = FieldSizes("hash", levels=8, log_table=12, finest=128)
    own = sizes.new(Box(), Blob()).cuda()
    fused = FieldSizes("hash", levels=8, log_table=12, finest=128, fused=True).new(Box(), Blob()).cuda()
    fused.encoding.params.data.copy_(own.encoding.table.data.flatten())  # type: ignore[union-attr]
    x = torch.rand(1000, 3, device="cuda")
    torch.testing.assert_close(fused.encoding(x), own.encoding(x), atol=1e-4, rtol=1e-3)


class Fused(nn.Module):
    """tiny-cuda-nn's encoding as it is documented: all values in one vector."""

    def __init__(self, inputs: int, settings: dict[str, Any], dtype: torch.dtype):
        super().__init__()
        self.plain = (HashEncoding(settings["n_levels"], settings["log2_hashmap_size"], 16, 32),)  # not a sub-module
        self.params = nn.Parameter(torch.zeros(self.plain[0].table.numel()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.plain[0], {"table": self.params.view(-1, 2)}, (x,))


def test_fused_fields_are_saved_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which a machine without tiny-cuda-nn reads, and the next stage fuses again."""
    module = ModuleType("tinycudann")
    module.Encoding = Fused  # type: ignore[attr-defined]
    sizes, points = FieldSizes("hash", levels=2, log_table=8, finest=32, fused=True), torch.rand(9, 3)
    scene = saved.Scene("a", "a", 1, Orbit(), Box(), Blob(), sizes, "white", 8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tinycudann", module)
        torch.manual_seed(0)
        fields = scene.new()
        saved.save(tmp_path / "scene", scene, fields.tensors(), "card")
    its_scene, plain = saved.load_fields(tmp_path / "scene")
    assert not its_scene.field.fused and torch.equal(plain.particle(0)(points)[1], fields.particle(0)(points)[1])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tinycudann", module)
        cast(HashGrid, plain.particle(0)).fuse()
    assert "fields.0.encoding.params" in plain.state_dict()
    assert torch.equal(plain.particle(0)(points)[1], fields.particle(0)(points)[1])


@pytest.mark.skipif(importlib.util.find_spec("tinycudann") is not None, reason="tiny-cuda-nn is installed")
def test_without_tiny_cuda_nn_the_setting_is_named():
    with pytest.raises(UserError, match=r"method\.field\.fused.*doctor"):
        FieldSizes("hash", levels=2, log_table=8, finest=32, fused=True).new(Box(), Blob())


def test_occupancy_drops_what_is_empty_and_changes_no_picture():
    torch.manual_seed(0)
    field = FieldSizes(side=8).new(Box(), Blob(20.0, 0.4))
    occupancy = Occupancy(field.box, side=16, threshold=0.05)
    camera = Camera(20, 10, 4)
    origins, directions = rays([camera], 16)
    origins, directions = origins.expand(256, 3), directions[0].flatten(1).T
    before = render(field, origins, directions, 64)
    occupancy.update(field)
    share = occupancy.cells.float().mean()
    after = render(field, origins, directions, 64, occupancy)
    assert share < 0.3
    torch.testing.assert_close(after.opacity, before.opacity, atol=0.02, rtol=0)
    again = Occupancy(field.box, side=16, threshold=0.05)
    again.update(field)
    assert torch.equal(again.peak, occupancy.peak)


def test_orbit_keeps_to_its_ranges_and_sectors():
    orbit = Orbit((20.0, 40.0), (10.0, 50.0), (3.0, 4.0), (30.0, 60.0), sphere=1.0, sectors=3)
    draws = torch.rand(4000, 6, generator=torch.Generator().manual_seed(0)).tolist()
    cameras = [orbit.camera(row) for row in draws]
    assert {int(c.azimuth // 120) for c in cameras} == {0, 1, 2}
    assert all(20 <= c.azimuth % 120 <= 40 and 10 <= c.elevation <= 50 and 3 <= c.radius <= 4 for c in cameras)
    heights = torch.tensor([math.sin(math.radians(c.elevation)) for c in cameras])
    middle = (math.sin(math.radians(10)) + math.sin(math.radians(50))) / 2
    assert abs(float(heights.mean()) - middle) < 0.01  # uniform on the sphere: uniform in height


@pytest.mark.parametrize("backdrop", [Plain(None), Plain((0.2, 0.4, 0.6)), Learned(), Studio()])
def test_backdrops_are_pictures(backdrop: torch.nn.Module):
    cameras = [Camera(10), Camera(200)]
    origins, directions = rays(cameras, 8)
    noise = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    behind = backdrop(origins, directions, torch.tensor([10.0, 200.0]), noise)
    assert behind.shape == (2, 3, 8, 8) and bool(((behind >= 0) & (behind <= 1)).all())


def test_views_of_several_particles_keep_their_places():
    torch.manual_seed(0)
    sizes = FieldSizes(side=8)
    fields = Fields([sizes.new(Box(), Blob()) for _ in range(3)], Plain((1.0, 1.0, 1.0)), samples=8)
    cameras = [Camera(a) for a in (0, 90, 180, 270)]
    noise = torch.rand(4, 4)
    mixed = fields(Views(cameras, [2, 0, 2, 1], 8, noise)).images
    for row, particle in enumerate([2, 0, 2, 1]):
        alone = fields(Views([cameras[row]], [particle], 8, noise[row : row + 1])).images[0]
        torch.testing.assert_close(mixed[row], alone)


@pytest.mark.parametrize(("views", "size", "samples"), [(1, 24, 32), (2, 32, 8)])
@pytest.mark.parametrize(
    "sizes",
    [
        FieldSizes(side=16),
        FieldSizes(side=16, channels=4, width=64),
        FieldSizes("voxels", side=16),
        FieldSizes("hash", levels=4, log_table=10, finest=64),
        FieldSizes("hash", levels=16, log_table=8, finest=256, width=64),
    ],
)
def test_rendering_takes_what_is_foreseen(sizes: FieldSizes, views: int, size: int, samples: int):
    """Never more, and not much less: rays that all meet the box, and from the usual distance, where a fifth do not."""
    foreseen = rendering_bytes(sizes, views, size, samples)
    for radius, most in ((1.5, 1.2), (4.0, 1.5)):
        torch.manual_seed(0)
        fields = Fields([sizes.new(Box(), Blob())], Learned(), samples)
        cameras = [Camera(40 * view, 10, radius) for view in range(views)]
        jitter = torch.rand(views, size, size)
        with LiveBytes() as live:
            drawn = fields(Views(cameras, [0] * views, size, torch.rand(views, 4), jitter))
            (drawn.images.square().mean() + drawn.terms["entropy"]).backward()
        assert live.peak <= foreseen < most * live.peak, foreseen / live.peak


@pytest.mark.parametrize("sizes", KINDS, ids=lambda s: s.kind)
def test_fields_are_drawn_in_float32_beside_a_teacher_in_bfloat16(sizes: FieldSizes):
    torch.manual_seed(0)
    fields = Fields([sizes.new(Box(), Blob())], Plain((1.0, 1.0, 1.0)), samples=8)
    views = Views.plain([Camera(30)], 0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        images = fields(views).images
    images.square().mean().backward()
    assert torch.equal(images, fields(views).images)


def test_pictures_without_a_gradient_are_marched_in_parts(monkeypatch: pytest.MonkeyPatch):
    """Of a few rays each, whatever their number; the pictures are the same."""
    torch.manual_seed(0)
    fields = Fields([FieldSizes(side=8).new(Box(), Blob())], Plain((1.0, 1.0, 1.0)), samples=16)
    views = Views([Camera(0), Camera(90)], [0, 0], 16, torch.rand(2, 4), torch.rand(2, 16, 16))
    whole = fields(views).images
    asked: list[int] = []
    fields.particle(0).register_forward_pre_hook(lambda _field, inputs: asked.append(len(inputs[0])))
    monkeypatch.setattr(volume, "CHUNK", 500)
    with torch.no_grad(), LiveBytes() as live:
        torch.testing.assert_close(fields(views).images, whole)
    assert len(asked) > 10 and max(asked) <= 500
    assert live.peak < rendering_bytes(FieldSizes(side=8), 2, 16, 16) / 4


def test_samples_are_lowered_before_memory_runs_out():
    sizes = FieldSizes(side=8)
    for samples in (48, 24):
        need = rendering_bytes(sizes, 2, 64, samples)
        assert fitting_samples(sizes, 2, 64, 48, int(need / 0.6) + 1000) == samples
    assert fitting_samples(sizes, 2, 64, 48, None) == 48
    with pytest.raises(UserError, match=r"resolutions: 2 views of 512 x 512 need .* GiB.*train\.batch_size"):
        fitting_samples(sizes, 2, 512, 48, 1 << 20)


def test_the_doctor_knows_what_is_installed():
    found = {finding.name: finding for finding in findings()}
    assert found["torch on the CPU"].usable
    assert found["tinycudann"].usable == (importlib.util.find_spec("tinycudann") is not None)
    assert str(found["tinycudann"]).startswith(("yes", "no "))
