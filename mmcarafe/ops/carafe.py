r"""The CARAFE operator: its contract and its checks.

Letters, here and everywhere in the project:

``N`` batch · ``C`` channels · ``H W`` source size · ``K`` kernel_size ·
``G`` groups · ``S`` scale

and words: the *low* map ``[N, C, H, W]`` is upsampled to the *high* map
``[N, C, S*H, S*W]`` · a *tap* is one of the K*K places in the window around a
source pixel, counted row by row · a *subpixel* is one of the S*S output pixels
that lie in a source pixel · the normaliser turns *scores* into *weights*;
without one they are the weights · a *band* is a matrix of weights that is zero
except where one pixel is in the window of another

Content-aware reassembly (Wang et al., `CARAFE: Content-Aware ReAssembly of
FEatures <https://arxiv.org/abs/1905.02188>`_, ICCV 2019, section 3.2) makes
each output pixel the weighted sum of the K×K window around the source pixel
it lies in. For output pixel (S*h + i, S*w + j) of a channel c of group g:

.. math::
    y_{c, Sh+i, Sw+j} = \sum_{k=0}^{K^2-1} weight_{g,k,i,j,h,w} \cdot
        x_{c,\; h + \lfloor k/K \rfloor - \lfloor K/2 \rfloor,\;
           w + k \bmod K - \lfloor K/2 \rfloor}

Taps outside the map read zero, and the other weights stay as they are, unless
``border='renormalize'`` leaves them out of the normalisation.

Values that are not finite spread as far as the formula says, no further. A
feature that is NaN or infinite makes its channel so in all output pixels in
whose window it lies; where its weight is zero, NaN. A score of minus infinity
is a weight of zero, unless the normaliser divides by a sum and all scores of
the window are so. A score that is NaN, or plus infinity under softmax, makes
its output pixel NaN in the channels of its group. Gradients follow suit.
"""

import torch
from torch import Tensor

from mmcarafe.ops import export, operators, reference
from mmcarafe.ops.reference import DTYPES, SUM_TO_ONE


def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
) -> Tensor:
    """Upsample features with given reassembly weights.

    The contract is that of ``mmcv.ops.carafe``, on any device, for any
    strides. fp16 and bf16 accumulate in fp32. Gradients of any order exist.
    The formula is at the top of this module (section 3.2 of the paper).

    Args:
        features (Tensor[N, C, H, W]): floating-point feature map. N may be 0.
        masks (Tensor[N, G*K*K, S*H, S*W]): normalised reassembly weights,
            group-major, then row-major over the K×K window. Same dtype and
            device as features (under autocast the wider of the two wins).
        kernel_size (int): K, odd, in source pixels.
        group_size (int): G, the number of channel groups with weights of
            their own. Divides C.
        scale_factor (int): S >= 1.

    Returns:
        Tensor[N, C, S*H, S*W]: upsampled features, in the dtype and memory
        format of ``features``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    _check_hyperparameters(kernel_size, group_size, scale_factor)
    _check_features(features, group_size)
    _check_scores(
        'masks',
        masks,
        features,
        ('G*K*K', group_size * kernel_size**2),
        ('S*H, S*W', scale_factor),
    )
    scores = reference.scores_from_masks(
        masks, kernel_size, group_size, scale_factor
    )
    return _reassemble(
        features, scores, None, 'zeros', kernel_size, group_size, scale_factor
    )


def carafe_from_logits(
    features: Tensor,
    logits: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
    normalizer: 'str | None' = 'softmax',
    border: str = 'zeros',
) -> Tensor:
    """Upsample features with the weights that a network predicts.

    Pixel shuffle, normalisation over the K*K taps (section 3.2 of the paper,
    "kernel normalizer") and :func:`carafe` in one operator. Training keeps
    features and logits alone for backward.

    Args:
        features (Tensor[N, C, H, W]): as in :func:`carafe`.
        logits (Tensor[N, G*K*K*S*S, H, W]): channel
            ``(g*K*K + k)*S*S + i*S + j`` is tap k of group g for output pixel
            (S*h + i, S*w + j), which is what ``pixel_shuffle`` expects.
        kernel_size (int): as in :func:`carafe`.
        group_size (int): as in :func:`carafe`.
        scale_factor (int): as in :func:`carafe`.
        normalizer (str, optional): ``'softmax'``, ``'sigmoid_normalized'``
            (sigmoids divided by their sum), ``'sigmoid'``, or None for
            logits that are used as they are.
        border (str): ``'zeros'``, as in mmcv: a tap outside the map reads zero
            and keeps its weight, so a constant map gets darker at its border;
            or ``'renormalize'``: such a tap takes no part in the
            normalisation, so the weights inside sum to one, and a constant
            map stays as it is. Only with the first two normalisers.

    Returns:
        Tensor[N, C, S*H, S*W]: as in :func:`carafe`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    _check_hyperparameters(kernel_size, group_size, scale_factor)
    check_normalizer(normalizer, border)
    _check_features(features, group_size)
    _check_scores(
        'logits',
        logits,
        features,
        ('G*K*K*S*S', group_size * (kernel_size * scale_factor) ** 2),
        ('H, W', 1),
    )
    scores = reference.scores_from_logits(
        logits, kernel_size, group_size, scale_factor
    )
    return _reassemble(
        features,
        scores,
        normalizer,
        border,
        kernel_size,
        group_size,
        scale_factor,
    )


def window_similarity(
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
) -> Tensor:
    """Compare each output pixel with the window that it would be made of.

    Scalar products, in the layout of the masks of :func:`carafe`, so that
    ``carafe(x, window_similarity(y, x, K).softmax(1), K)`` reassembles x by
    its similarity to y. It is the gradient that the masks have in
    :func:`carafe`, without a K*K-fold copy of the key. fp16 and bf16
    accumulate in fp32. Gradients of any order exist.

    Args:
        query (Tensor[N, C, S*H, S*W]): floating-point map of output pixels.
            N may be 0.
        key (Tensor[N, C, H, W]): map whose windows are read. Same dtype and
            device as query (under autocast the wider of the two wins).
        kernel_size (int): K, odd, in pixels of the key.
        group_size (int): G. A product takes the channels of one of G groups.
            Divides C.
        scale_factor (int): S >= 1.

    Returns:
        Tensor[N, G*K*K, S*H, S*W]: group-major, then row-major over the K×K
        window; zero for taps outside the key. In the dtype of ``query``, under
        autocast in the wider of the two.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.
    """
    hyperparameters = kernel_size, group_size, scale_factor
    _check_hyperparameters(*hyperparameters)
    _check_features(key, group_size, 'key')
    n, channels, height, width = key.shape
    s = scale_factor
    _check_scores('query', query, key, ('C', channels), ('S*H, S*W', s), 'key')
    if query.dtype != key.dtype:  # under autocast
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    if torch.onnx.is_in_onnx_export():
        return export.window_similarity(query, key, *hyperparameters)
    # Says what the shape and the strides of the result are; never read.
    masks = query.new_empty(
        n, group_size * kernel_size**2, s * height, s * width
    )
    scores = torch.ops.mmcarafe.reassemble_grad_weights.default(
        query, key, reference.scores_from_masks(masks, *hyperparameters), None
    )
    return reference.masks_from_scores(scores)


def _reassemble(features, scores, normalizer, border, *hyperparameters):
    if torch.onnx.is_in_onnx_export():
        # The exporters may trace shapes, so K, G and S go in as plain ints.
        return export.reassemble(
            features, scores, normalizer, border, *hyperparameters
        )
    return torch.ops.mmcarafe.reassemble.default(
        features, scores, normalizer, border
    )


# Arguments are checked once, here; what serves a device trusts them.


def check_int(name: str, value: int, odd: bool = False) -> None:
    """Raise unless ``value`` is an int >= 1 (and odd, where asked for)."""
    expected = 'an odd int >= 1' if odd else 'an int >= 1'
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f'{name} is a {type(value).__name__}, expected {expected}'
        )
    if value < 1 or (odd and value % 2 == 0):
        raise ValueError(f'{name} is {value}, expected {expected}')


def check_divides(name: str, value: int, of: str, channels: int) -> None:
    """Raise unless ``value`` divides ``channels``, the argument ``of``."""
    if channels % value:
        raise ValueError(
            f'{name} is {value}, expected a divisor of {of} = {channels}'
        )


def check_normalizer(normalizer: 'str | None', border: str) -> None:
    """Raise unless both are known and go together."""
    reference.check_options(normalizer, border)
    if border == 'renormalize' and normalizer not in SUM_TO_ONE:
        raise ValueError(
            f"border is 'renormalize' and normalizer {normalizer!r}, expected "
            f'one of {SUM_TO_ONE}, whose weights sum to one'
        )


def _check_hyperparameters(kernel_size, group_size, scale_factor):
    check_int('kernel_size', kernel_size, odd=True)
    check_int('group_size', group_size)
    check_int('scale_factor', scale_factor)


def check_map(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a map that the operators take."""
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} is a {type(x).__name__}, expected a Tensor')
    if x.dim() != 4:
        raise ValueError(
            f'{name} has {x.dim()} dimensions {tuple(x.shape)}, expected 4'
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f'{name} has dtype {x.dtype}, expected one of {DTYPES}'
        )


def _check_features(features, group_size, name='features'):
    check_map(name, features)
    _, channels, height, width = features.shape
    # not min() of them, which torch.export takes for a fact about the sizes
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(
            f'{name} has shape {tuple(features.shape)}, '
            'expected C, H and W >= 1'
        )
    if channels % group_size:
        raise ValueError(
            f'{name} has {channels} channels, '
            f'expected a multiple of group_size = {group_size}'
        )


def _check_scores(name, scores, features, channels, size, other='features'):
    check_map(name, scores)
    if scores.device != features.device:
        raise ValueError(
            f'{name} is on {scores.device}, '
            f'expected {features.device}, where {other} is'
        )
    if scores.dtype != features.dtype and not operators.autocast_enabled(
        features.device.type
    ):
        raise TypeError(
            f'{name} has dtype {scores.dtype}, '
            f'expected {features.dtype}, as {other}'
        )
    n, _, height, width = features.shape
    if scores.shape[0] != n:
        raise ValueError(
            f'{name} has batch size {scores.shape[0]}, '
            f'expected {n}, as {other}'
        )
    letters, expected = channels
    if scores.shape[1] != expected:
        raise ValueError(
            f'{name} has {scores.shape[1]} channels, '
            f'expected {letters} = {expected}'
        )
    letters, scale = size
    expected = (scale * height, scale * width)
    if tuple(scores.shape[2:]) != expected:
        raise ValueError(
            f'{name} has size {tuple(scores.shape[2:])}, '
            f'expected ({letters}) = {expected}'
        )
