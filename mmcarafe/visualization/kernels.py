"""What upsamplers did to one input: their kernels, and maps before and after.

torch is all that this needs. Letters are those of :mod:`mmcarafe.ops.carafe`;
(row, column) counts pixels, and a pixel's centre has whole numbers.
"""

import math
import re
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmcarafe.ops import reference
from mmcarafe.upsamplers import UPSAMPLERS, DySample
from mmcarafe.upsamplers.dysample import sample

_TYPES = tuple({row.cls for row in UPSAMPLERS.values()})


@dataclass
class Record:
    """One call of one upsampler.

    Attributes:
        name (str): the module's dotted name in the model.
        kind (str): the name of its class.
        scale_factor (int): S.
        before (Tensor[N, C, H, W]): the map that went in.
        after (Tensor[N, C', S*H, S*W]): the one that came out. It is
            ``before`` reassembled with ``weights``, or read at ``positions``,
            unless the module does more: CARAFE with ``out_channels``,
            FreqFusion with ``feature_resample``.
        kernel_size (int, optional): K; None without weights.
        group_size (int, optional): G; None without kernels.
        weights (Tensor[N, G, K*K, S, S, H, W], optional): the normalised
            reassembly weights, in fp32 at least. A tap outside the map has
            weight zero with ``border='renormalize'``; otherwise it keeps its
            weight, and reads zero.
        positions (Tensor[N, G, 2, S*H, S*W], optional): row and column at
            which DySample reads ``before``, bilinearly. Beyond the border, the
            border is read.
    """

    name: str
    kind: str
    scale_factor: int
    before: Tensor
    after: Tensor
    kernel_size: Optional[int] = None
    group_size: Optional[int] = None
    weights: Optional[Tensor] = None
    positions: Optional[Tensor] = None

    @property
    def has_kernels(self) -> bool:
        return self.weights is not None or self.positions is not None


class KernelRecorder:
    """Records what each upsampler of a model does, while it is entered.

    ::

        with KernelRecorder(model) as recorder:
            model(image)
        for record in recorder.records:  # in the order of the calls
            print(record.name, record.kind, record.kernel_size)

    CARAFE (mmcv's, too, with :mod:`mmcarafe.drop_in`), the dynamic filter,
    SAPA and FreqFusion (its low-pass kernels) are recorded with weights, and
    DySample with positions. The other types of ``UPSAMPLERS`` are recorded
    with neither; so is a module that a subclass has changed beyond
    recognition. Weights are those that the operator got, not computed anew.

    A record holds copies, which take memory: K*K*S*S*G/C times the map's for
    the weights. The model computes what it does without the recorder. Modules
    must run uncompiled.

    Args:
        model (nn.Module): with upsamplers at any depth, or one itself.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f'model is a {type(model).__name__}, expected an nn.Module'
            )
        self.records = []
        self.model = model
        self._handles = []
        self._calls = []  # of upsamplers that are running, innermost last
        self._mode = _Listener(self._calls)

    def __enter__(self):
        for name, module in self.model.named_modules():
            if isinstance(module, _TYPES) or is_mmcv_carafe(module):
                self._handles += [
                    module.register_forward_pre_hook(self._begin),
                    module.register_forward_hook(self._end(name)),
                ]
        self._mode.__enter__()
        return self

    def __exit__(self, *error):
        self._mode.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def _begin(self, module, inputs):
        self._calls.append([])

    def _end(self, name):
        @torch.no_grad()
        def hook(module, inputs, out):
            x, calls = inputs[0], self._calls.pop()
            if isinstance(out, tuple):  # (changed guide, upsampled map)
                _, out = out
            record = Record(
                name,
                type(module).__name__,
                round(out.shape[2] / x.shape[2]) if x.shape[2] else 1,
                _copy(x),
                _copy(out),
            )
            weights = _find_weights(x, calls, record.scale_factor)
            if weights is not None:
                record.weights = weights
                record.group_size = weights.shape[1]
                record.kernel_size = math.isqrt(weights.shape[2])
            elif isinstance(module, DySample):
                offset = module.offsets(x)
                record.group_size = module.groups
                record.positions = _positions(offset, record)
            self.records.append(record)

        return hook


def is_mmcv_carafe(module: nn.Module) -> bool:
    """Whether it is mmcv's, which :mod:`mmcarafe.drop_in` runs on ours.

    It goes by name, because mmcv may be missing.
    """
    return any(cls.__name__ == 'CARAFEPack' for cls in type(module).__mro__)


class _Listener(TorchDispatchMode):
    """Appends the calls of the operator to the last of several lists."""

    def __init__(self, lists):
        super().__init__()
        self._lists = lists

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mmcarafe.reassemble.default and self._lists:
            self._lists[-1].append(args)
        return out


def _copy(x):
    return x.detach().clone()


def _find_weights(x, calls, scale_factor):
    """Of the call that upsampled x; FreqFusion upsamples other maps, too."""
    for features, scores, normalizer, *border in calls:
        if (
            features.shape == x.shape
            and features.data_ptr() == x.data_ptr()
            and scores.shape[3] == scale_factor
        ):
            scores = reference.accumulable(scores.detach())
            scores = reference.exclude_outside(scores, *(border or ['zeros']))
            return reference.normalize(scores, normalizer).clone()
    return None


def _positions(offset, record):
    """From ``[N, 2*G, S*H, S*W]``, to the right first, to rows and columns."""
    offset = reference.accumulable(offset.detach())
    offset = offset.unflatten(1, (2, -1)).flip(1).transpose(1, 2)
    return offset + own_places(
        record.before.shape[2:], record.scale_factor, offset
    )


def own_places(
    size: 'tuple[int, int]', scale_factor: int, like: Tensor
) -> Tensor:
    """Where the centres of the output pixels lie in the source map.

    Args:
        size (tuple[int, int]): H, W.
        scale_factor (int): S.
        like (Tensor): of the dtype and device that are wanted.

    Returns:
        Tensor[2, S*H, S*W]: row and column, in source pixels.
    """
    lines = (
        (torch.arange(length * scale_factor, dtype=like.dtype) + 0.5)
        / scale_factor
        - 0.5
        for length in size
    )
    return _mesh(*lines).to(like.device)


def _mesh(rows, columns):
    """Row and column of each place, ``[2, len(rows), len(columns)]``."""
    return torch.stack(torch.meshgrid(rows, columns, indexing='ij'))


def as_maps(weights: Tensor) -> Tensor:
    """View ``[N, G, K*K, S, S, H, W]`` as ``[N, G, K*K, S*H, S*W]``."""
    masks = reference.masks_from_scores(weights)
    return masks.unflatten(1, weights.shape[1:3])


def entropy(weights: Tensor, normalized: bool = True) -> Tensor:
    """How evenly each kernel spreads over its K*K taps.

    Weights that do not sum to one are divided by their sum.

    Args:
        weights (Tensor[N, G, K*K, S, S, H, W]): not negative.
        normalized (bool): divide by log(K*K), so that 1 is the mean of the
            window and 0 a single tap. Otherwise the unit is bits.

    Returns:
        Tensor[N, G, S*H, S*W]

    Raises:
        ValueError: a weight is negative.
    """
    if (weights < 0).any():
        raise ValueError(
            f'weights are as low as {weights.min().item():.3g}, expected >= '
            '0: without a normaliser, kernels have no entropy'
        )
    p = as_maps(weights)
    p = p / p.sum(2, keepdim=True)
    taps = p.shape[2]
    unit = math.log(taps if normalized and taps > 1 else 2)
    return torch.special.entr(p).sum(2) / unit


def center_of_mass(record: Record) -> Tensor:
    """How far from its own place each output pixel is read, on the mean.

    Zero for bilinear interpolation, inside the map. The mean is weighted by
    the kernel, taps outside the map included; for DySample, it is the distance
    that it predicts.

    Args:
        record (Record): with weights or positions.

    Returns:
        Tensor[N, G, 2, S*H, S*W]: downwards and to the right, in source
        pixels.

    Raises:
        ValueError: the record has neither.
    """
    _check_kernels(record)
    if record.positions is not None:
        places = record.positions
    else:
        p = as_maps(record.weights)
        tap = torch.arange(record.kernel_size, dtype=p.dtype, device=p.device)
        tap = tap - record.kernel_size // 2
        window = _mesh(tap, tap).flatten(1)  # [2, K*K]
        moved = torch.einsum('ngkhw,ak->ngahw', p, window)
        moved = moved / p.sum(2)[:, :, None]
        # rows and columns of the source pixels that the windows lie around
        s = record.scale_factor
        height, width = p.shape[-2:]
        rows = torch.arange(height, device=p.device) // s
        columns = torch.arange(width, device=p.device) // s
        places = moved + _mesh(rows, columns)
    return places - own_places(
        record.before.shape[2:], record.scale_factor, places
    )


def _check_kernels(record):
    if not record.has_kernels:
        raise ValueError(
            f'{record.name} is a {record.kind}, expected an upsampler with '
            'kernels or positions, such as CARAFE or DySample'
        )


def chains(records: 'list[Record]') -> 'dict[str, list[Record]]':
    """Sort the records into lists of modules that follow each other.

    Of modules in one list of the model (``neck.upsample_modules.0`` and
    ``.1``), those that lead from a coarse map to the finest are a chain: each
    one's output is as large as the next one's input, but for the rows and
    columns that are cropped where a size was odd. Where several modules end
    at the same size, the chain starts with the one called last.

    Args:
        records (list[Record]): in the order of the calls. Those without
            kernels are left out.

    Returns:
        dict[str, list[Record]]: name of the list -> chain, finest first.
    """
    groups = {}
    for record in records:
        if record.has_kernels:
            name = re.sub(r'(\.\d+)+$', '', record.name)
            groups.setdefault(name, []).append(record)
    found = {}
    for name, group in groups.items():
        chain = [group[-1]]
        for record in reversed(group[:-1]):
            if _follows(chain[-1], record):
                chain.append(record)
        found[name] = chain
    return found


def _follows(finer, coarser):
    """Whether the finer one's input is the coarser one's output, cropped."""
    return len(finer.before) == len(coarser.before) and all(
        0 <= made - used < coarser.scale_factor
        for made, used in zip(coarser.after.shape[2:], finer.before.shape[2:])
    )


def trace(chain: 'list[Record]', row: int, column: int) -> 'list[Tensor]':
    """Where a pixel of the finest map comes from, at each coarser level.

    With the kernels as they are, upsampling is linear. The influence of a
    pixel of a coarser map is what one more there would add to the pixel of the
    finest map, through the upsamplers alone, in the mean over the groups of
    channels. Without losses at the border, it sums to one.

    Args:
        chain (list[Record]): finest first, as :func:`chains` returns it. Of a
            batch, the first image is traced.
        row (int): of the output of ``chain[0]``.
        column (int): the same.

    Returns:
        list[Tensor[H_i, W_i]]: one for each record, of the size of its
        ``before``.

    Raises:
        ValueError: the pixel is outside the map, or the records do not follow
            each other.
    """
    if not chain:
        raise ValueError('chain is empty, expected at least one record')
    height, width = chain[0].after.shape[2:]
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f'the pixel is ({row}, {column}), expected one of a map of '
            f'{height} x {width}'
        )
    for record in chain:
        _check_kernels(record)
    groups = 1  # the least common multiple
    for record in chain:
        groups *= record.group_size // math.gcd(groups, record.group_size)
    finest = chain[0]
    like = finest.weights if finest.positions is None else finest.positions
    # one channel for each group of channels that may be treated alike
    influence = like.new_zeros(1, groups, height, width)
    influence[:, :, row, column] = 1
    maps = []
    for finer, record in zip([None, *chain], chain):
        if finer is not None:
            if not _follows(finer, record):
                raise ValueError(
                    f'{record.name} makes a map of '
                    f'{tuple(record.after.shape[2:])} and {finer.name} takes '
                    f'one of {tuple(finer.before.shape[2:])}, expected a '
                    'chain, finest first'
                )
            below, right = (
                made - used
                for made, used in zip(
                    record.after.shape[2:], finer.before.shape[2:]
                )
            )
            influence = F.pad(influence, (0, right, 0, below))
        influence = _pull_back(record, influence)
        maps.append(influence[0].mean(0))
    return maps


def _pull_back(record, grad):
    """What ``grad [1, G', S*H, S*W]`` of the output is of the input."""
    if record.weights is not None:
        weights = record.weights[:1].to(grad.dtype)
        return reference.reassemble_grad_features(grad, weights, None)
    height, width = record.before.shape[2:]
    x = grad.new_zeros(1, grad.shape[1], height, width, requires_grad=True)
    positions = record.positions[:1].to(grad.dtype)
    offset = positions - own_places(
        (height, width), record.scale_factor, positions
    )
    offset = offset.transpose(1, 2).flip(1).flatten(1, 2)  # to the right first
    with torch.enable_grad():
        out = sample(x, offset, record.group_size, record.scale_factor)
        return torch.autograd.grad(out, x, grad)[0]


def principal_colors(fitted: Tensor, maps: 'list[Tensor]') -> 'list[Tensor]':
    """Show feature maps in colours that mean the same in all of them.

    The first three principal components of ``fitted`` become red, green and
    blue; 0 and 1 are its 2nd and 98th percentiles in each of them.

    Args:
        fitted (Tensor[C, H, W]): what components and range are taken from.
        maps (list[Tensor[C, H_i, W_i]]): what is shown.

    Returns:
        list[Tensor[H_i, W_i, 3]]: from 0 to 1. With less than three channels,
        the last colours are 0.5 everywhere.
    """
    pixels = fitted.detach().flatten(1).T.double()  # [H*W, C]
    mean = pixels.mean(0)
    _, _, axes = torch.linalg.svd(pixels - mean, full_matrices=False)
    axes = axes[:3]
    # The sign is free: the largest entry is positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    known = (pixels - mean) @ axes.T  # [H*W, at most 3]
    low, high = (torch.quantile(known, q, dim=0) for q in (0.02, 0.98))
    span = (high - low).clamp(min=1e-12)
    colors = []
    for each in maps:
        shares = (each.detach().permute(1, 2, 0).double() - mean) @ axes.T
        shares = ((shares - low) / span).clamp(0, 1)
        colors.append(F.pad(shares, (0, 3 - shares.shape[-1]), value=0.5))
    return colors
