"""Upsampled maps that meet a finer one: sizes and guides."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcarafe.upsamplers import match_size, upsample_to_meet


class Nearest(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Guided(nn.Module):
    """Nearest, plus the guide; may change the guide, too."""

    guided = True

    def __init__(self, factor=None):
        super().__init__()
        self.factor = factor

    def forward(self, x, guide):
        assert guide.shape[2:] == (2 * x.shape[2], 2 * x.shape[3])
        out = F.interpolate(x, scale_factor=2) + guide
        return out if self.factor is None else (self.factor * guide, out)


def test_crops_what_was_halved_from_an_odd_size():
    x = torch.randn(1, 2, 8, 6)
    assert torch.equal(match_size(x, (7, 6)), x[:, :, :7])
    assert match_size(x, (8, 6)).data_ptr() == x.data_ptr()


def test_crops_up_to_the_scale_factor():
    x = torch.randn(1, 2, 9, 6)
    assert torch.equal(match_size(x, (7, 5), 3), x[:, :, :7, :5])
    resized = F.interpolate(x, (7, 5), mode='bilinear')
    assert torch.equal(match_size(x, (7, 5), 2), resized)


@pytest.mark.parametrize('size', [(6, 6), (9, 6), (8, 11)], ids=str)
def test_resizes_what_is_not_about_twice_as_large(size):
    x = torch.randn(1, 2, 8, 6)
    assert torch.equal(
        match_size(x, size), F.interpolate(x, size, mode='bilinear')
    )


def test_without_guides_the_finer_map_stays():
    x, y = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 5, 7)
    fine, (out,) = upsample_to_meet([Nearest()], [x], y)
    assert fine is y
    assert torch.equal(out, F.interpolate(x, scale_factor=2)[..., :5, :7])


def test_a_guide_of_odd_size_repeats_its_last_pixels():
    x, y = torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 5, 7)
    seen = []

    class Spy(Guided):
        def forward(self, x, guide):
            seen.append(guide)
            return super().forward(x, guide)

    fine, (out,) = upsample_to_meet([Spy()], [x], y)
    (guide,) = seen
    expected = F.pad(y, (0, 1, 0, 1), mode='replicate')
    assert torch.equal(guide, expected)
    assert fine is y
    assert torch.equal(out, y)


def test_a_changed_guide_takes_the_finer_maps_place():
    x, y = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 7)
    fine, (out,) = upsample_to_meet([Guided(3)], [x], y)
    assert torch.equal(fine, 3 * y)
    assert out.shape == y.shape


def test_of_several_changed_guides_the_mean_does():
    maps = [torch.randn(1, 2, 3, 4) for _ in range(4)]
    y = torch.randn(1, 2, 6, 8)
    upsamplers = [Guided(1), Guided(), Nearest(), Guided(4)]
    fine, outs = upsample_to_meet(upsamplers, maps, y)
    torch.testing.assert_close(fine, 2.5 * y)
    assert torch.equal(outs[0], F.interpolate(maps[0], scale_factor=2) + y)
    assert torch.equal(outs[2], F.interpolate(maps[2], scale_factor=2))


def test_a_finer_map_that_is_not_twice_as_large_keeps_its_details():
    """As after a dilated backbone: only the change is resized."""
    x, y = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 6)
    fine, (out,) = upsample_to_meet([Guided(1)], [x], y)
    assert torch.equal(fine, y)
    fine, _ = upsample_to_meet([Guided(3)], [x], y)
    guide = F.interpolate(y, (8, 12), mode='bilinear')
    change = F.interpolate(2 * guide, (4, 6), mode='bilinear')
    torch.testing.assert_close(fine, y + change)
    assert out.shape == y.shape


def test_as_many_upsamplers_as_maps():
    with pytest.raises(ValueError, match='upsamplers has 2 entries, expected'):
        upsample_to_meet(
            [Nearest(), Nearest()],
            [torch.zeros(1, 2, 3, 4)],
            torch.zeros(1, 2, 6, 8),
        )
