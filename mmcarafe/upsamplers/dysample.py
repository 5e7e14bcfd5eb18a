"""DySample: upsampling by sampling at predicted positions.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcarafe.ops.carafe import check_divides, check_int
from mmcarafe.ops.export import is_compiling, is_exporting
from mmcarafe.ops.reference import unknown

STYLES = ('lp', 'pl')


class DySample(nn.Module):
    """Upsample by reading the features between pixels, where they fit best.

    `Learning to Upsample by Learning to Sample
    <https://arxiv.org/abs/2308.15085>`_: a 1×1 convolution predicts, for each
    output pixel and group of channels, how far from its own place the features
    are read, bilinearly. A fresh module is close to bilinear interpolation.

    Parameter names are those of the public implementation, so its state dicts
    load: with or without a bias in ``scope``, and without need for their
    buffer ``init_pos``.

    Positions are computed in fp32 at least. The result is exported to ONNX
    with four reads at whole positions, in place of ``GridSample``. Where
    :func:`torch.use_deterministic_algorithms` asks for it, that is also what
    runs on a GPU: the backward of ``grid_sample`` adds in any order there.

    Args:
        in_channels (int): C.
        scale_factor (int): S.
        style (str): ``'lp'`` predicts the offsets of the S*S output pixels of
            a source pixel from this one; ``'pl'`` first shuffles the features
            to C/(S*S) channels of the output's size, and predicts each offset
            from its own pixel there. S*S divides C.
        groups (int): G, of channels read at the same place. Divides C.
        dyscope (bool): also predict how far offsets may reach: the "+" of the
            paper's names.
    """

    def __init__(
        self,
        in_channels,
        scale_factor=2,
        style='lp',
        groups=4,
        dyscope=False,
    ):
        super().__init__()
        check_int('in_channels', in_channels)
        check_int('scale_factor', scale_factor)
        check_int('groups', groups)
        if style not in STYLES:
            raise ValueError(unknown('style', style, STYLES))
        subpixels = scale_factor**2
        check_divides('groups', groups, 'in_channels', in_channels)
        if style == 'pl' and in_channels % subpixels:
            raise ValueError(
                f"style is 'pl' and in_channels {in_channels}, expected a "
                f'multiple of scale_factor squared, {subpixels}'
            )
        self.scale_factor = scale_factor
        self.style = style
        self.groups = groups
        channels, offsets = in_channels, 2 * groups * subpixels
        if style == 'pl':
            channels, offsets = channels // subpixels, 2 * groups
        self.offset = nn.Conv2d(channels, offsets, 1)
        if dyscope:
            self.scope = nn.Conv2d(channels, offsets, 1, bias=False)
        self.dyscope = dyscope
        self._register_load_state_dict_pre_hook(self._adapt)
        self.init_weights()

    def init_weights(self):
        """Start near bilinear interpolation: offsets of almost zero."""
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)
        if self.dyscope:
            nn.init.zeros_(self.scope.weight)
            if self.scope.bias is not None:
                nn.init.zeros_(self.scope.bias)

    def _adapt(self, state_dict, prefix, *_):
        # The positions of the subpixels follow from S: they are no parameter.
        state_dict.pop(f'{prefix}init_pos', None)
        bias = state_dict.get(f'{prefix}scope.bias')
        if self.dyscope and bias is not None and self.scope.bias is None:
            self.scope.bias = nn.Parameter(
                self.scope.weight.new_zeros(self.scope.out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``."""
        return sample(x, self.offsets(x), self.groups, self.scale_factor)

    def offsets(self, x: Tensor) -> Tensor:
        """How far from its own place each output pixel is read.

        From ``[N, C, H, W]`` to ``[N, 2*G, S*H, S*W]``: see :func:`sample`.
        """
        s = self.scale_factor
        source = pixel_shuffle(x, s) if self.style == 'pl' else x
        offset = self.offset(source)
        if self.dyscope:
            offset = offset * 0.5 * self.scope(source).sigmoid()
        else:
            offset = offset * 0.25
        if self.style == 'lp':
            offset = pixel_shuffle(offset, s)  # [N, 2*G, S*H, S*W]
        return offset


def pixel_shuffle(x: Tensor, scale_factor: int) -> Tensor:
    """torch's, but the gradient of an empty batch has the right shape, too.

    From ``[N, C*S*S, H, W]`` to ``[N, C, S*H, S*W]``.
    """
    if x.shape[0] > 0:
        return F.pixel_shuffle(x, scale_factor)
    _, channels, height, width = x.shape
    s = scale_factor
    return x.reshape(0, channels // s**2, s * height, s * width)


def sample(
    x: Tensor, offset: Tensor, groups: int, scale_factor: int = 1
) -> Tensor:
    """Read each output pixel at a distance from its own place, bilinearly.

    Beyond the border of the map, the border is read. Positions are computed
    in fp32 at least.

    Args:
        x (Tensor[N, C, H, W]): the map.
        offset (Tensor[N, 2*G, S*H, S*W]): the distances, in pixels of x: to
            the right for all groups, then downwards.
        groups (int): G, of channels read at the same place. Divides C.
        scale_factor (int): S.

    Returns:
        Tensor[N, C, S*H, S*W]: in the dtype of x; contiguous.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # [N, 2, G, S*H, S*W]
    offset = offset.to(dtype).unflatten(1, (2, groups))
    columns = _centres(x.shape[3], scale_factor, offset) + offset[:, 0]
    rows = _centres(x.shape[2], scale_factor, offset).unsqueeze(1)
    rows = rows + offset[:, 1]
    # Sizes one by one: torch's older ONNX exporter would take those of an
    # unflattened map, or of a slice of the shape, for constants.
    maps = x.to(dtype).reshape(
        -1, x.shape[1] // groups, x.shape[2], x.shape[3]
    )  # [N*G, C/G, H, W]
    out = _sample(maps, columns.flatten(0, 1), rows.flatten(0, 1))
    # [N, C, S*H, S*W]
    return out.unflatten(0, (-1, groups)).flatten(1, 2).to(x.dtype)


def _centres(size, s, like):
    """Where the centres of the S*size output pixels lie, in source pixels."""
    steps = torch.arange(size * s, dtype=like.dtype, device=like.device)
    return (steps + 0.5) / s - 0.5


def _sample(x, columns, rows):
    """Read ``x [M, C, H, W]`` at positions ``[M, H', W']``, bilinearly.

    Positions count pixels; those outside the map read its border.
    """
    if (
        torch.onnx.is_in_onnx_export()
        or is_exporting()
        or (x.is_cuda and torch.are_deterministic_algorithms_enabled())
    ):
        return _sample_by_reading(x, columns, rows)
    if is_compiling():  # whose gradients are of first order
        return _sample_by_grid(x, columns, rows)
    return _Sample.apply(x, columns, rows)


def _sample_by_reading(x, columns, rows):
    columns, left, right = _neighbours(columns, x.shape[3])
    rows, top, bottom = _neighbours(rows, x.shape[2])
    flat = x.flatten(2)

    def read(row, column):
        index = (row * x.shape[3] + column).flatten(1).unsqueeze(1)
        index = index.expand(-1, x.shape[1], -1)
        return flat.gather(2, index).reshape(
            -1, x.shape[1], row.shape[1], row.shape[2]
        )

    columns, rows = columns.unsqueeze(1), rows.unsqueeze(1)
    upper = torch.lerp(read(top, left), read(top, right), columns)
    lower = torch.lerp(read(bottom, left), read(bottom, right), columns)
    return torch.lerp(upper, lower, rows)


def _neighbours(position, size):
    """Its distance from the pixel before it, that pixel and the next one."""
    # A tensor, because torch.jit.trace makes constants of clamp's bounds.
    last = position.new_zeros(()) + (size - 1)
    # On the border and beyond it, the position has no gradient.
    inside = (position > 0) & (position < last)
    nearest = torch.minimum(position.detach().clamp(min=0), last)
    position = torch.where(inside, position, nearest)
    before = position.detach().floor()
    after = torch.minimum(before + 1, last)
    return position - before, before.long(), after.long()


class _Sample(torch.autograd.Function):
    """torch's ``grid_sample``, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, columns, rows):
        ctx.save_for_backward(x, columns, rows)
        return _sample_by_grid(x, columns, rows)

    @staticmethod
    def backward(ctx, grad):
        x, columns, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            inputs = [t for t in (x, columns, rows) if t.requires_grad]
            out = _sample_by_reading(x, columns, rows)
            grads = iter(
                torch.autograd.grad(out, inputs, grad, create_graph=True)
            )
            return tuple(
                next(grads) if t.requires_grad else None
                for t in (x, columns, rows)
            )
        grad_x, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad,
            x,
            _grid(x, columns, rows),
            0,  # bilinear
            1,  # border
            False,
            [ctx.needs_input_grad[0], True],
        )
        h, w = x.shape[2:]
        return grad_x, grad_grid[..., 0] * (2 / w), grad_grid[..., 1] * (2 / h)


def _sample_by_grid(x, columns, rows):
    grid = _grid(x, columns, rows)
    return F.grid_sample(x, grid, 'bilinear', 'border', False)


def _grid(x, columns, rows):
    """Positions from -1, the map's first edge, to 1, its last."""
    h, w = x.shape[2:]
    return torch.stack(((2 * columns + 1) / w - 1, (2 * rows + 1) / h - 1), -1)
