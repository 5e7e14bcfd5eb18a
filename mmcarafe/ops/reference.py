"""The specification of CARAFE in plain PyTorch; all else must match it.

Letters are those of :mod:`mmcarafe.ops.carafe`. The functions below work on
``scores (Tensor[N, G, K*K, S, S, H, W])``, of which masks and logits are two
views. No K*K-fold copy of the features is built: one tap at a time, on
``_CHUNK`` channels at a time, is multiplied into an accumulator.
"""

import torch
import torch.nn.functional as F

#: What turns scores into weights; cpu.cpp has an enum in this order.
NORMALIZERS = ('softmax', 'sigmoid_normalized', 'sigmoid', None)
#: Those that divide by a sum over the taps, from which a border can be left
#: out; has_sum in cpu.cpp says the same.
SUM_TO_ONE = ('softmax', 'sigmoid_normalized')
#: What becomes of taps outside the map; cpu.cpp has an enum in this order.
BORDERS = ('zeros', 'renormalize')
#: Of features and scores; cpu.cpp has an enum in this order.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Channels per group that are accumulated together. It bounds the extra memory
# and keeps the accumulator of a usual feature map in a CPU's cache.
_CHUNK = 16


def carafe(features, masks, kernel_size, group_size=1, scale_factor=2):
    """See :func:`mmcarafe.ops.carafe`."""
    scores = scores_from_masks(masks, kernel_size, group_size, scale_factor)
    return reassemble(features, scores, None)


def carafe_from_logits(
    features,
    logits,
    kernel_size,
    group_size=1,
    scale_factor=2,
    normalizer='softmax',
    border='zeros',
):
    """See :func:`mmcarafe.ops.carafe_from_logits`."""
    scores = scores_from_logits(logits, kernel_size, group_size, scale_factor)
    return reassemble(features, scores, normalizer, border)


def scores_from_masks(masks, kernel_size, group_size, scale_factor):
    """View ``[N, G*K*K, S*H, S*W]`` as ``[N, G, K*K, S, S, H, W]``."""
    n, _, height, width = masks.shape
    s = scale_factor
    return masks.view(
        n, group_size, kernel_size**2, height // s, s, width // s, s
    ).permute(0, 1, 2, 4, 6, 3, 5)


def masks_from_scores(scores):
    """The inverse of :func:`scores_from_masks`; a view where it can be."""
    n, groups, taps, s, _, height, width = scores.shape
    return scores.permute(0, 1, 2, 5, 3, 6, 4).reshape(
        n, groups * taps, s * height, s * width
    )


def scores_from_logits(logits, kernel_size, group_size, scale_factor):
    """View ``[N, G*K*K*S*S, H, W]`` as ``[N, G, K*K, S, S, H, W]``."""
    n, _, height, width = logits.shape
    s = scale_factor
    return logits.view(n, group_size, kernel_size**2, s, s, height, width)


def reassemble(features, scores, normalizer, border='zeros'):
    """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``."""
    w = normalize(exclude_outside(accumulable(scores), border), normalizer)
    out = empty_map(features, features.shape[1], scores.shape[3])
    x = _split_groups(features, w.shape[1])  # [N, G, C/G, H, W]
    y = _split_subpixels(out, w)  # [N, G, C/G, S, S, H, W]
    for c in range(0, x.shape[2], _CHUNK):
        x_c = accumulable(x[:, :, c : c + _CHUNK, None, None])
        y_c = y[:, :, c : c + _CHUNK]
        acc = torch.zeros(y_c.shape, dtype=w.dtype, device=w.device)
        for k, here, there in _taps(w):
            acc[here].addcmul_(x_c[there], w[:, :, k, None][here])
        y_c.copy_(acc)
    return out


def reassemble_grad_features(grad, scores, normalizer, border='zeros'):
    """Gather ``grad [N, C, S*H, S*W]`` back to ``[N, C, H, W]``."""
    w = normalize(exclude_outside(accumulable(scores), border), normalizer)
    out = empty_map(grad, grad.shape[1], 1, w.shape[-2:])
    x = _split_groups(out, w.shape[1])  # [N, G, C/G, H, W]
    g = _split_subpixels(grad, w)  # [N, G, C/G, S, S, H, W]
    for c in range(0, x.shape[2], _CHUNK):
        g_c = accumulable(g[:, :, c : c + _CHUNK])
        x_c = x[:, :, c : c + _CHUNK]
        acc = torch.zeros(x_c.shape, dtype=w.dtype, device=w.device)
        for k, here, there in _taps(w):
            acc[there] += (g_c[here] * w[:, :, k, None][here]).sum((3, 4))
        x_c.copy_(acc)
    return out


def reassemble_grad_weights(
    grad, features, scores, normalizer, border='zeros'
):
    """Correlate ``grad`` and features to ``[N, G, K*K, S, S, H, W]``."""
    acc = torch.zeros_like(accumulable(scores))
    x = _split_groups(features, scores.shape[1])  # [N, G, C/G, H, W]
    g = _split_subpixels(grad, scores)  # [N, G, C/G, S, S, H, W]
    for c in range(0, x.shape[2], _CHUNK):
        x_c = accumulable(x[:, :, c : c + _CHUNK, None, None])
        g_c = accumulable(g[:, :, c : c + _CHUNK])
        for k, here, there in _taps(scores):
            acc[:, :, k][here] += (g_c[here] * x_c[there]).sum(2)
    grad_scores = normalize_backward(
        acc, exclude_outside(accumulable(scores), border), normalizer
    )
    return torch.empty_like(scores).copy_(grad_scores)


def exclude_outside(scores, border, kernel_size=None):
    """Apply ``border`` to the scores of the taps outside the map.

    With ``'renormalize'`` these become minus infinity, so that such taps have
    no share in a sum over the taps, and no weight; with ``'zeros'`` they stay,
    and the zero that such a tap reads keeps its weight.

    Args:
        scores (Tensor[N, G, K*K, S, S, H, W]): of all taps.
        border (str): one of :data:`BORDERS`.
        kernel_size (int, optional): K, where the shape may be traced.
    """
    if border == 'zeros':
        return scores
    if border != 'renormalize':
        raise unknown('border', border, BORDERS)
    rows, columns = (
        _is_inside(kernel_size or int(scores.shape[2] ** 0.5), length, scores)
        for length in scores.shape[-2:]
    )
    inside = rows[:, None, :, None] & columns[None, :, None, :]  # [K, K, H, W]
    inside = inside.flatten(0, 1)[:, None, None]  # [K*K, 1, 1, H, W]
    return torch.where(inside, scores, float('-inf'))


def _is_inside(kernel_size, length, like):
    """Which taps of which pixels lie inside, in one direction: ``[K, L]``."""
    pixel = torch.arange(length, device=like.device)
    tap = torch.arange(kernel_size, device=like.device)[:, None]
    read = pixel + tap - kernel_size // 2
    return (read >= 0) & (read < length)


def normalize(scores, normalizer):
    """Turn scores into weights over the K*K taps (dimension 2)."""
    if normalizer == 'softmax':
        return scores.softmax(2)
    if normalizer == 'sigmoid_normalized':
        # sigmoid(l) / sum sigmoid(l), but never 0 / 0, for very negative l
        return F.logsigmoid(scores).softmax(2)
    if normalizer == 'sigmoid':
        return scores.sigmoid()
    if normalizer is None:
        return scores
    raise unknown('normalizer', normalizer, NORMALIZERS)


def normalize_backward(grad, scores, normalizer):
    """Gradient of :func:`normalize` with respect to the scores."""
    if normalizer is None:
        return grad
    w = normalize(scores, normalizer)
    if normalizer == 'sigmoid':
        return grad * w * (1 - w)
    grad = w * (grad - (w * grad).sum(2, keepdim=True))
    if normalizer == 'softmax':
        return grad
    if normalizer == 'sigmoid_normalized':
        return grad * torch.sigmoid(-scores)
    raise unknown('normalizer', normalizer, NORMALIZERS)


def check_options(normalizer, border):
    """Raise unless both are known."""
    if normalizer not in NORMALIZERS:
        raise unknown('normalizer', normalizer, NORMALIZERS)
    if border not in BORDERS:
        raise unknown('border', border, BORDERS)


def unknown(name, value, known):
    """The error for a value that is not one of the known ones."""
    return ValueError(f'{name} is {value!r}, expected one of {known}')


def empty_map(like, channels, scale_factor, size=None):
    """New ``[N, C, S*H, S*W]`` in the memory format of ``like``."""
    n, _, height, width = like.shape
    height, width = size or (height * scale_factor, width * scale_factor)
    shape = n, channels, height, width
    if not like.is_contiguous() and channels > 1 and like.stride(1) == 1:
        return torch.empty(
            shape,
            dtype=like.dtype,
            device=like.device,
            memory_format=torch.channels_last,
        )
    return like.new_empty(shape)


def _taps(scores):
    """Yield each tap k, the pixels it serves, and the pixels it reads.

    Both are index expressions for the last two dimensions, H and W. Pixels
    that would read outside the map are left out: they add zero.
    """
    taps, height, width = scores.shape[2], *scores.shape[-2:]
    kernel_size = int(taps**0.5)
    for k in range(taps):
        dy = k // kernel_size - kernel_size // 2
        dx = k % kernel_size - kernel_size // 2
        if abs(dy) < height and abs(dx) < width:
            here = (
                ...,
                slice(max(0, -dy), height - max(0, dy)),
                slice(max(0, -dx), width - max(0, dx)),
            )
            there = (
                ...,
                slice(max(0, dy), height - max(0, -dy)),
                slice(max(0, dx), width - max(0, -dx)),
            )
            yield k, here, there


def accumulable(x):
    """fp16 and bf16 accumulate in fp32, fp32 in fp32, fp64 in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split_groups(x, groups):
    n, channels, height, width = x.shape
    return x.view(n, groups, channels // groups, height, width)


def _split_subpixels(y, scores):
    n, groups, _, s, _, height, width = scores.shape
    return y.view(
        n, groups, y.shape[1] // groups, height, s, width, s
    ).permute(0, 1, 2, 4, 6, 3, 5)  # [N, G, C/G, S, S, H, W]
