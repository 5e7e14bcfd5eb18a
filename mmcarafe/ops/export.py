"""What ONNX exporters get instead: standard operators, dynamic sizes.

CARAFE becomes Pad, Slice, Mul, Add and DepthToSpace, without a K*K-fold copy
of the features.
"""

import torch
import torch.nn.functional as F

from mmcarafe.ops import reference

# torch >= 2.7
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
# torch >= 2.3, else older
is_compiling = (
    getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling
)


def reassemble(
    features,
    scores,
    normalizer,
    border,
    kernel_size,
    group_size,
    scale_factor,
):
    """See :func:`mmcarafe.ops.reference.reassemble`."""
    height, width = scores.shape[-2:]
    r = kernel_size // 2
    w = reference.exclude_outside(
        reference.accumulable(scores), border, kernel_size
    )
    if normalizer == 'sigmoid_normalized':
        # Exporters write log(sigmoid(x)) for torch's own, which is minus
        # infinity where a sigmoid is too small for fp32.
        w = w.clamp(max=0) - (-w.abs()).exp().log1p()
        normalizer = 'softmax'
    w = reference.normalize(w, normalizer)
    w = w.flatten(3, 4)  # [N, G, K*K, S*S, H, W]
    x = F.pad(reference.accumulable(features), (r, r, r, r))
    x = x.unflatten(1, (group_size, -1, 1))  # [N, G, C/G, 1, H+2r, W+2r]
    y = 0
    for k in range(kernel_size**2):
        top, left = divmod(k, kernel_size)
        y = y + (
            x[..., top : top + height, left : left + width] * w[:, :, k, None]
        )  # [N, G, C/G, S*S, H, W]
    y = y.flatten(1, 3)  # [N, C*S*S, H, W]
    return F.pixel_shuffle(y, scale_factor).to(features.dtype)


def window_similarity(query, key, kernel_size, group_size, scale_factor):
    """See :func:`mmcarafe.ops.window_similarity`."""
    height, width = key.shape[-2:]
    r = kernel_size // 2
    q = F.pixel_unshuffle(reference.accumulable(query), scale_factor)
    # [N, G, C/G, S*S, H, W] and [N, G, C/G, 1, H+2r, W+2r]
    q = q.unflatten(1, (group_size, -1, scale_factor**2))
    x = F.pad(reference.accumulable(key), (r, r, r, r))
    x = x.unflatten(1, (group_size, -1, 1))
    products = []
    for k in range(kernel_size**2):
        top, left = divmod(k, kernel_size)
        window = x[..., top : top + height, left : left + width]
        products.append((q * window).sum(2))  # [N, G, S*S, H, W]
    out = torch.stack(products, 2).flatten(1, 3)  # [N, G*K*K*S*S, H, W]
    return F.pixel_shuffle(out, scale_factor).to(query.dtype)


def adaptive_avg_pool2d(x, size):
    """``F.adaptive_avg_pool2d`` as two matrix products.

    ONNX has no such pooling for a map whose size is known at run time only.
    """
    rows, columns = (
        _averages(bins, length, x) for bins, length in zip(size, x.shape[2:])
    )
    return rows @ x @ columns.transpose(0, 1)


def _averages(bins, length, like):
    """Matrix ``[bins, length]``, each row of which averages one bin."""
    i = torch.arange(bins, device=like.device)[:, None]
    first = i * length // bins
    behind = ((i + 1) * length + bins - 1) // bins
    j = torch.arange(length, device=like.device)
    inside = ((first <= j) & (j < behind)).to(like.dtype)
    return inside / (behind - first)
