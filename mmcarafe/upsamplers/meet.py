"""Upsampled maps meet a finer one: sizes, and guides.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcarafe.ops.carafe import check_map
from mmcarafe.ops.export import is_exporting


def upsample_to_meet(
    upsamplers: 'list[nn.Module]',
    maps: 'list[Tensor]',
    fine: Tensor,
    scale_factor: int = 2,
) -> 'tuple[Tensor, list[Tensor]]':
    """Upsample maps to the size of a finer one, which all of them will meet.

    The finer one is the guide of upsamplers that want one: those whose class
    says ``guided = True``. They are called as ``upsampler(x, guide)``, with a
    guide of exactly S times the size of x, and return the upsampled map, or
    the pair (changed guide, upsampled map).

    Sizes that differ are brought together by :func:`match_size`. To be a
    guide, a finer map that is too small by less than S pixels is extended at
    the bottom and right by repeating its last pixels; one that is not about S
    times as large is resized bilinearly, and what the upsampler changes is
    resized back.

    Args:
        upsamplers (list[nn.Module]): one for each map.
        maps (list[Tensor[N, C_i, H, W]]): the coarser maps.
        fine (Tensor[N, C', H', W']): the map that they will meet.
        scale_factor (int): S, by which all of them upsample.

    Returns:
        tuple[Tensor[N, C', H', W'], list[Tensor[N, C_i, H', W']]]: the finer
        map, or the mean of what several upsamplers changed it to, and the
        upsampled maps.

    Raises:
        ValueError: there are not as many upsamplers as maps.
    """
    if len(upsamplers) != len(maps):
        raise ValueError(
            f'upsamplers has {len(upsamplers)} entries, expected {len(maps)}, '
            'one for each map'
        )
    changed, upsampled = [], []
    for upsampler, x in zip(upsamplers, maps):
        if getattr(upsampler, 'guided', False):
            guide = _as_guide(fine, x, scale_factor)
            x = upsampler(x, guide)
            if isinstance(x, tuple):
                changed_guide, x = x
                changed.append(
                    _change(fine, guide, changed_guide, scale_factor)
                )
        else:
            x = upsampler(x)
        upsampled.append(match_size(x, fine.shape[2:], scale_factor))
    if len(changed) == 1:
        (fine,) = changed
    elif changed:
        fine = torch.stack(changed).mean(0)
    return fine, upsampled


def check_guide(
    x: Tensor,
    guide: Tensor,
    in_channels: int,
    guide_channels: int,
    scale_factor: int,
) -> None:
    """Raise unless x and its guide fit an upsampler and each other."""
    check_map('x', x)
    check_map('guide', guide)
    if x.shape[1] != in_channels:
        raise ValueError(
            f'x has {x.shape[1]} channels, expected in_channels = '
            f'{in_channels}'
        )
    size = [scale_factor * length for length in x.shape[2:]]
    expected = (x.shape[0], guide_channels, *size)
    if tuple(guide.shape) != expected:
        raise ValueError(
            f'guide has shape {tuple(guide.shape)}, expected '
            f'(N, guide_channels, S*H, S*W) = {expected}'
        )


def _as_guide(fine, x, scale_factor):
    """The finer map at exactly S times the size of x."""
    size = [scale_factor * length for length in x.shape[2:]]
    if not _fits(size, fine.shape[2:], scale_factor):
        return F.interpolate(fine, size, mode='bilinear')
    for dim, length in zip((2, 3), size):
        if (
            is_exporting()
            or torch.onnx.is_in_onnx_export()
            or fine.shape[dim] != length
        ):
            pixels = torch.arange(length, device=fine.device)
            last = torch.zeros_like(pixels) + (fine.shape[dim] - 1)
            fine = fine.index_select(dim, torch.minimum(pixels, last))
    return fine


def _change(fine, guide, changed, scale_factor):
    """The finer map, changed as the guide that was made of it."""
    size = fine.shape[2:]
    if _fits(guide.shape[2:], size, scale_factor):
        return match_size(changed, size, scale_factor)
    return fine + match_size(changed - guide, size, scale_factor)


def match_size(
    x: Tensor, size: 'tuple[int, int]', scale_factor: int = 2
) -> Tensor:
    """Bring an upsampled map to the size of the map that it must meet.

    A map that was halved from an odd size comes back one pixel too large: it
    is cropped at the bottom and right, where the halving's padding was. A map
    that is not within S pixels of the size is resized bilinearly.

    Args:
        x (Tensor[N, C, H, W]): upsampled map.
        size (tuple[int, int]): height and width to meet.
        scale_factor (int): S, by which ``x`` was upsampled.

    Returns:
        Tensor[N, C, *size]: a view of ``x`` where it could be cropped.
    """
    height, width = size
    if _fits(x.shape[2:], size, scale_factor):
        if is_exporting() and not torch.onnx.is_in_onnx_export():
            # torch.export specialises on whether a slice is the whole map;
            # index_select does not.
            rows = torch.arange(height, device=x.device)
            columns = torch.arange(width, device=x.device)
            return x.index_select(2, rows).index_select(3, columns)
        return x[:, :, :height, :width]
    return F.interpolate(x, (height, width), mode='bilinear')


def _fits(upsampled, size, scale_factor):
    """Whether an upsampled map is too large by less than S pixels."""
    return all(0 <= a - b < scale_factor for a, b in zip(upsampled, size))
