"""EUCB against its steps, one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcarafe import EUCB


def test_is_its_steps():
    module = EUCB(6, 4).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mixed = torch.cat(
        [
            F.conv2d(repeated[:, c : c + 1], weight[None], padding=1)
            for c, weight in enumerate(module.depthwise.weight)
        ],
        1,
    )
    mean = mixed.mean((0, 2, 3), keepdim=True)
    variance = mixed.var((0, 2, 3), correction=0, keepdim=True)
    positive = ((mixed - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    weight, bias = module.pointwise.weight[..., 0, 0], module.pointwise.bias
    expected = torch.einsum('oc,nchw->nohw', weight, positive)
    expected = expected + bias[:, None, None]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


def test_parameters():
    parameters = sum(p.numel() for p in EUCB(256, 256).parameters())
    assert parameters == 256 * 9 + 2 * 256 + 256 * 256 + 256


def test_initialisation_can_be_repeated():
    module = EUCB(8, 8)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 5)
    module.init_weights()
    assert module.depthwise.weight.abs().max() <= 1 / 3
    assert torch.equal(module.norm.weight, torch.ones(8))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(in_channels=0), 'in_channels is 0, expected an int >= 1'),
        (dict(out_channels=-4), 'out_channels is -4, expected'),
        (dict(scale_factor=0), 'scale_factor is 0, expected'),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EUCB(**{'in_channels': 4, 'out_channels': 4, **arguments})
