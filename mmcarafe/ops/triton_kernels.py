"""The GPU kernels. See :mod:`mmcarafe.ops.triton`, which launches them.

Letters are those of :mod:`mmcarafe.ops.carafe`, with C the channels of one
group. Two-dimensional tiles have pixels last: NCHW is then read along its
rows, and the compiler sees by itself that channels_last wants the other order.
Triton 3.7 sees no reason for either order where offsets are quotients and
remainders, and takes pixels for the lanes; 3.6 takes the other. There
``max_contiguous`` decides for pixels, and ``multiple_of(..., 1)`` keeps it
from claiming vectors.

Every program finds its tile in one grid axis, because only the first one is
large enough for any batch; BLOCKS is the number of channel blocks it takes.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['H', 'W', 'BLOCKS'])
def reassemble_plain(
    x_ptr,
    w_ptr,
    y_ptr,
    xs,
    ws,
    ys,
    C,
    H,
    W,
    G,
    BLOCKS,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    SUBPIXELS: tl.constexpr,
    HOISTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write outputs with plain FMAs: BLOCK_W source pixels of SUBPIXELS each.

    A loaded feature serves SUBPIXELS outputs. HOISTED weights of a pixel stay
    in registers, all of them, while its channels pass by; otherwise the weight
    of a tap is loaded (and exponentiated) once per BLOCK_C channels.
    """
    pixels = H.to(INDEX) * W
    pid, block = _split(tl.program_id(0), tl.cdiv(pixels, BLOCK_W))
    pid, c0 = _split(pid, tl.cdiv(C, BLOCKS * BLOCK_C))
    pid, part = _split(pid, S * S // SUBPIXELS)
    n, g = _split(pid, G)
    c0 *= BLOCKS * BLOCK_C
    x_ptr += n.to(tl.int64) * xs[0] + (g * C).to(tl.int64) * xs[1]
    w_ptr += n.to(tl.int64) * ws[0] + g.to(tl.int64) * ws[1]
    y_ptr += n.to(tl.int64) * ys[0] + (g * C).to(tl.int64) * ys[1]

    # Rows are one after another, so that narrow maps fill their blocks too.
    p = block.to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    inside = p < pixels
    h, w = p // W, p % W
    x_offset = h * xs[2] + w * xs[3]
    if ROWS:
        x_offset = tl.max_contiguous(tl.multiple_of(x_offset, 1), 16)
    w_offset = h * ws[5] + w * ws[6]

    starts = ()  # of each subpixel
    for s in tl.static_range(SUBPIXELS):
        at = _at_subpixel(part * SUBPIXELS + s, ws[3], ws[4], S, INDEX)
        starts += (w_ptr + at,)
    if HOISTED:
        # Two dimensions from the start: the compiler is faster then.
        pixel = inside[None, :], h[None, :], w[None, :]
        weights = ()  # of each subpixel, all taps: [1, BLOCK_W]
        for s in tl.static_range(SUBPIXELS):
            weights += _load_weights(
                starts[s], ws[2], w_offset[None, :], *pixel, H, W,
                K, NORMALIZER, BORDER, INDEX,
            )  # fmt: skip
        R: tl.constexpr = K // 2
        whole = inside & (h >= R) & (h < H - R) & (w >= R) & (w < W - R)
        whole = (C % BLOCK_C == 0) & (tl.min(whole.to(tl.int32), 0) != 0)
    else:
        peaks, scales = (), ()  # of each subpixel: [BLOCK_W]
        for s in tl.static_range(SUBPIXELS):
            peak, scale = _peak_and_scale(
                starts[s], ws[2], w_offset, inside, h, w, H, W,
                K, NORMALIZER, BORDER, INDEX,
            )  # fmt: skip
            peaks, scales = peaks + (peak,), scales + (scale,)

    for c_block in range(c0, min(c0 + BLOCKS * BLOCK_C, C), BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)  # [BLOCK_C]
        real = c < C
        x_tile = x_ptr + c[:, None] * xs[1] + x_offset[None, :]
        if HOISTED:
            if whole:
                sums = _sum_taps(
                    x_tile, xs, weights, real[:, None], *pixel, H, W,
                    K, SUBPIXELS, BLOCK_C, BLOCK_W, True,
                )  # fmt: skip
            else:
                sums = _sum_taps(
                    x_tile, xs, weights, real[:, None], *pixel, H, W,
                    K, SUBPIXELS, BLOCK_C, BLOCK_W, False,
                )  # fmt: skip
        else:
            sums = _zeros(SUBPIXELS, BLOCK_C, BLOCK_W)
            for ky in range(K):
                dy = ky - K // 2
                row = inside & (h + dy >= 0) & (h + dy < H)
                for kx in tl.static_range(K):
                    dx = kx - K // 2
                    there = row & (w + dx >= 0) & (w + dx < W)
                    x = tl.load(
                        x_tile + (dy * xs[2] + dx * xs[3]),
                        real[:, None] & there[None, :],
                        other=0,
                    ).to(tl.float32)  # [BLOCK_C, BLOCK_W]
                    new = ()
                    for s in tl.static_range(SUBPIXELS):
                        logit = _load_logit(
                            starts[s], ws[2], w_offset, inside, ky, kx, h, w,
                            H, W, K, NORMALIZER, BORDER, INDEX,
                        )  # fmt: skip
                        weight = _unscaled(logit, peaks[s], NORMALIZER)
                        new += (sums[s] + x * weight[None, :],)
                    sums = new
            scaled = ()
            for s in tl.static_range(SUBPIXELS):
                scaled += (sums[s] * scales[s][None, :],)
            sums = scaled
        if ROWS and S == 2:
            # Both columns of a source pixel at once: whole sectors. The
            # divisions change nothing: they show the compiler pairs.
            q = tl.arange(0, 2 * BLOCK_W)
            p2 = block.to(INDEX) * BLOCK_W + q // 2
            x2 = p2 % W * 2 + q % 2
            mask = real[:, None] & (p2 < pixels)[None, :]
            y_c, y_h = ys[1] // 2 * 2, ys[2] // 2 * 2
            for i in tl.static_range(2):
                y = tl.interleave(sums[2 * i], sums[2 * i + 1])
                offset = (p2 // W * 2 + i) * y_h + x2
                offset = tl.max_contiguous(tl.multiple_of(offset, 2), 2)
                tl.store(
                    y_ptr + c[:, None] * y_c + offset[None, :],
                    y.to(y_ptr.dtype.element_ty),
                    mask,
                )  # [BLOCK_C, 2*BLOCK_W]
        else:
            mask = real[:, None] & inside[None, :]
            for s in tl.static_range(SUBPIXELS):
                i = (part * SUBPIXELS + s) // S
                j = (part * SUBPIXELS + s) % S
                offset = (h * S + i) * ys[2] + (w * S + j) * ys[3]
                tl.store(
                    y_ptr + c[:, None] * ys[1] + offset[None, :],
                    sums[s].to(y_ptr.dtype.element_ty),
                    mask,
                )  # [BLOCK_C, BLOCK_W]


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return zeros


@triton.jit
def _sum_taps(
    x_tile,
    xs,
    weights,
    real,
    inside,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    SUBPIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Sums [BLOCK_C, BLOCK_W] of each subpixel; WHOLE windows need no mask."""
    sums = _zeros(SUBPIXELS, BLOCK_C, BLOCK_W)
    for ky in tl.static_range(K):
        for kx in tl.static_range(K):
            x = _load_tap(
                x_tile, xs, ky, kx, real, inside, h, w, H, W, K, WHOLE
            )
            new = ()
            for s in tl.static_range(SUBPIXELS):
                new += (sums[s] + x * weights[s * K * K + ky * K + kx],)
            sums = new
    return sums


@triton.jit
def _load_tap(
    x_tile,
    xs,
    ky,
    kx,
    real,
    inside,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The features [BLOCK_C, BLOCK_W] of one tap of the pixels (h, w)."""
    dy, dx = ky - K // 2, kx - K // 2
    at = x_tile + dy * xs[2] + dx * xs[3]
    if WHOLE:
        x = tl.load(at)
    else:
        there = inside & _is_inside(h + dy, w + dx, H, W)
        x = tl.load(at, real & there, other=0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=['H', 'W'])
def reassemble_grad_weights_hoisted(
    y_ptr,
    x_ptr,
    w_ptr,
    grad_ptr,
    ys,
    xs,
    ws,
    grads,
    C,
    H,
    W,
    G,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write all taps of BLOCK_W source pixels, with plain FMAs.

    The sums of a pixel stay in registers, all K*K*S*S of them, while its
    channels pass by, BLOCK_C at a time.
    """
    pixels = H.to(INDEX) * W
    pid, block = _split(tl.program_id(0), tl.cdiv(pixels, BLOCK_W))
    n, g = _split(pid, G)
    x_ptr += n.to(tl.int64) * xs[0] + (g * C).to(tl.int64) * xs[1]
    y_ptr += n.to(tl.int64) * ys[0] + (g * C).to(tl.int64) * ys[1]
    w_ptr += n.to(tl.int64) * ws[0] + g.to(tl.int64) * ws[1]
    grad_ptr += n.to(tl.int64) * grads[0] + g.to(tl.int64) * grads[1]

    p = (block.to(INDEX) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    inside = p < pixels  # [1, BLOCK_W]
    h, w = p // W, p % W
    x_offset = h * xs[2] + w * xs[3]
    if ROWS:
        x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, 1)), (1, 16))
    y_offset = h * S * ys[2] + w * S * ys[3]
    R: tl.constexpr = K // 2
    whole = inside & (h >= R) & (h < H - R) & (w >= R) & (w < W - R)
    whole = (C % BLOCK_C == 0) & (tl.min(whole.to(tl.int32)) != 0)

    sums = _zeros(K * K * S * S, BLOCK_C, BLOCK_W)
    for c_block in range(0, C, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)[:, None]
        real = c < C
        x_tile = x_ptr + c * xs[1] + x_offset
        y_tile = y_ptr + c * ys[1] + y_offset
        y = ()  # of each subpixel: [BLOCK_C, BLOCK_W]
        for s in tl.static_range(S * S):
            offset = _at_subpixel(s, ys[2], ys[3], S, INDEX)
            one = tl.load(y_tile + offset, real & inside, other=0)
            y += (one.to(tl.float32),)
        if whole:
            sums = _add_taps(
                sums, y, x_tile, xs, real, inside, h, w, H, W, K, S * S, True
            )  # fmt: skip
        else:
            sums = _add_taps(
                sums, y, x_tile, xs, real, inside, h, w, H, W, K, S * S, False
            )  # fmt: skip

    w_offset = h * ws[5] + w * ws[6]
    grad_offset = h * grads[5] + w * grads[6]
    for s in tl.static_range(S * S):
        start = w_ptr + _at_subpixel(s, ws[3], ws[4], S, INDEX)
        grad = ()  # of all taps: [1, BLOCK_W]
        for k in tl.static_range(K * K):
            total = tl.sum(sums[k * S * S + s], 0)[None, :]
            if NORMALIZER is None or NORMALIZER == 'sigmoid':  # _load_logit
                near_h, near_w = h + (k // K - K // 2), w + (k % K - K // 2)
                total = tl.where(_is_inside(near_h, near_w, H, W), total, 0)
            grad += (total,)
        if NORMALIZER == 'softmax' or NORMALIZER == 'sigmoid_normalized':
            weights = _load_weights(
                start, ws[2], w_offset, inside, h, w, H, W,
                K, NORMALIZER, BORDER, INDEX,
            )  # fmt: skip
            mean = tl.zeros_like(weights[0])
            for k in tl.static_range(K * K):
                mean += weights[k] * grad[k]
        for k in tl.static_range(K * K):
            value = grad[k]
            if NORMALIZER == 'softmax' or NORMALIZER == 'sigmoid_normalized':
                value = weights[k] * (value - mean)
            if NORMALIZER == 'sigmoid_normalized':
                logit = _load_logit(
                    start, ws[2], w_offset, inside, k // K, k % K, h, w, H, W,
                    K, NORMALIZER, BORDER, INDEX,
                )  # fmt: skip
                value *= tl.sigmoid(-logit)
            elif NORMALIZER == 'sigmoid':
                tap = tl.cast(k, INDEX)
                logit = tl.load(start + tap * ws[2] + w_offset, inside, 0)
                weight = tl.sigmoid(logit.to(tl.float32))
                value *= weight * (1 - weight)
            else:
                tl.static_assert(
                    NORMALIZER == 'softmax' or NORMALIZER is None,
                    'unknown normalizer',
                )
            offset = _at_subpixel(s, grads[3], grads[4], S, INDEX)
            offset += tl.cast(k, INDEX) * grads[2]
            tl.store(
                grad_ptr + offset + grad_offset,
                value.to(grad_ptr.dtype.element_ty),
                inside,
            )


@triton.jit
def _add_taps(
    sums,
    ys,
    x_tile,
    xs,
    real,
    inside,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    SUBPIXELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add x * y for each tap and subpixel; WHOLE windows need no mask."""
    new = ()
    for ky in tl.static_range(K):
        for kx in tl.static_range(K):
            x = _load_tap(
                x_tile, xs, ky, kx, real, inside, h, w, H, W, K, WHOLE
            )
            for s in tl.static_range(SUBPIXELS):
                new += (sums[(ky * K + kx) * SUBPIXELS + s] + x * ys[s],)
    return new


# In the kernels below all weights of a tile form one matrix: it is zero
# outside a band, because an output pixel reads K*K of the tile's source pixels
# only, and dense products are what the tensor cores do. ``M`` counts the
# pixels written, ``PATCH`` (a power of two) the pixels read.


@triton.jit(do_not_specialize=['H', 'W', 'BLOCKS'])
def reassemble_banded(
    x_ptr,
    w_ptr,
    y_ptr,
    xs,
    ws,
    ys,
    C,
    H,
    W,
    G,
    BLOCKS,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGN: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Write BLOCK_H x BLOCK_W output pixels.

    y [C, M] = x [C, PATCH] @ band [PATCH, M].
    """
    M: tl.constexpr = BLOCK_H * BLOCK_W
    W = W // ALIGN * ALIGN  # unchanged: shows the compiler whole vectors
    x_c, x_h = xs[1] // ALIGN * ALIGN, xs[2] // ALIGN * ALIGN
    y_c, y_h = ys[1] // ALIGN * ALIGN, ys[2] // ALIGN * ALIGN
    pid, block_w = _split(tl.program_id(0), tl.cdiv(S * W, BLOCK_W))
    pid, block_h = _split(pid, tl.cdiv(S * H, BLOCK_H))
    pid, c0 = _split(pid, tl.cdiv(C, BLOCKS * BLOCK_C))
    n, g = _split(pid, G)
    c0 *= BLOCKS * BLOCK_C
    x_ptr += n.to(tl.int64) * xs[0] + (g * C).to(tl.int64) * xs[1]
    w_ptr += n.to(tl.int64) * ws[0] + g.to(tl.int64) * ws[1]
    y_ptr += n.to(tl.int64) * ys[0] + (g * C).to(tl.int64) * ys[1]

    m = tl.arange(0, M).to(INDEX)
    oy, ox = block_h * BLOCK_H + m // BLOCK_W, block_w * BLOCK_W + m % BLOCK_W
    written = (oy < S * H) & (ox < S * W)  # [M]
    h0, w0 = block_h * BLOCK_H // S, _source(block_w, BLOCK_W, S)
    p = tl.arange(0, PATCH).to(INDEX)
    h, w = h0 - K // 2 + p // PATCH_W, w0 - K // 2 + p % PATCH_W
    read = (p < PATCH_H * PATCH_W) & (h >= 0) & (h < H) & (w >= 0) & (w < W)

    logits = _load_logits(
        w_ptr, ws, oy, ox, written, H, W, K, S, BORDER, INDEX, TAPS
    )
    weights = _normalize(logits, K, NORMALIZER, TAPS)  # [TAPS, M]
    at_h, at_w = _source_in_patch(block_h, block_w, S, BLOCK_H, BLOCK_W)
    ky = (tl.arange(0, PATCH) // PATCH_W)[:, None] - at_h[
        None, :
    ]  # [PATCH, M]
    kx = (tl.arange(0, PATCH) % PATCH_W)[:, None] - at_w[None, :]
    band = _pick(weights, ky, kx, K, TAPS)  # [PATCH, M]
    if NORMALIZER is None or NORMALIZER == 'sigmoid':  # as in _load_logit
        band = tl.where(read[:, None], band, 0)
    band, rest = _halves(band, x_ptr)

    x_offset = h * x_h + w * xs[3]
    y_offset = oy * y_h + ox * ys[3]
    end = min(c0 + BLOCKS * BLOCK_C, C)
    spoilt = tl.zeros((BLOCK_C,), tl.float32)
    for c_block in range(c0, end, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)
        x = tl.load(
            x_ptr + c[:, None] * x_c + x_offset[None, :],
            (c < C)[:, None] & read[None, :],
            other=0,
        )  # [BLOCK_C, PATCH]
        y = tl.zeros((BLOCK_C, M), tl.float32)
        y = _dot(x, band, rest, y, NORMALIZER)
        spoilt += tl.sum(y * 0, 1)
        tl.store(
            y_ptr + c[:, None] * y_c + y_offset[None, :],
            y.to(y_ptr.dtype.element_ty),
            (c < C)[:, None] & written[None, :],
        )
    if tl.sum(spoilt, 0) != 0:  # NaN
        tl.debug_barrier()  # other threads may write what this one wrote
        _rewrite(
            x_ptr, w_ptr, y_ptr, xs, ws, ys, block_h, block_w, c0, end,
            C, H, W, K, S, NORMALIZER, BORDER, INDEX, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit(noinline=True)
def _rewrite(
    x_ptr,
    w_ptr,
    y_ptr,
    xs,
    ws,
    ys,
    block_h,
    block_w,
    c0,
    end,
    C,
    H,
    W,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write outputs (oy, ox) [M] again, each from its own window alone.

    A feature that is not finite makes every product with it not finite, also
    those with the zeros of a band.
    """
    BLOCK_C: tl.constexpr = 16
    M: tl.constexpr = BLOCK_H * BLOCK_W
    m = tl.arange(0, M).to(INDEX)
    oy, ox = block_h * BLOCK_H + m // BLOCK_W, block_w * BLOCK_W + m % BLOCK_W
    written = (oy < S * H) & (ox < S * W)  # [M]
    h, w = oy // S, ox // S
    start = w_ptr + (oy % S) * ws[3] + (ox % S) * ws[4]
    w_offset = h * ws[5] + w * ws[6]
    peak, scale = _peak_and_scale(
        start, ws[2], w_offset, written, h, w, H, W,
        K, NORMALIZER, BORDER, INDEX,
    )  # fmt: skip
    for c_block in range(c0, end, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)
        y = tl.zeros((BLOCK_C, M), tl.float32)
        for k in range(K * K):
            ky, kx = k // K, k % K
            near_h, near_w = h + (ky - K // 2), w + (kx - K // 2)
            there = written & _is_inside(near_h, near_w, H, W)
            offset = near_h * xs[2] + near_w * xs[3]
            x = tl.load(
                x_ptr + c[:, None] * xs[1] + offset[None, :],
                (c < C)[:, None] & there[None, :],
                other=0,
            ).to(tl.float32)  # [BLOCK_C, M]
            logit = _load_logit(
                start, ws[2], w_offset, written, ky, kx, h, w, H, W,
                K, NORMALIZER, BORDER, INDEX,
            )  # fmt: skip
            weight = _unscaled(logit, peak, NORMALIZER) * scale
            y += x * weight[None, :]
        y_offset = oy * ys[2] + ox * ys[3]
        tl.store(
            y_ptr + c[:, None] * ys[1] + y_offset[None, :],
            y.to(y_ptr.dtype.element_ty),
            (c < C)[:, None] & written[None, :],
        )


@triton.jit(do_not_specialize=['H', 'W', 'BLOCKS'])
def reassemble_grad_features_banded(
    y_ptr,
    w_ptr,
    x_ptr,
    ys,
    ws,
    xs,
    C,
    H,
    W,
    G,
    BLOCKS,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGN: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PATCH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write BLOCK_H x BLOCK_W source pixels: x [C, M] = y [C, PATCH] @ band.

    The patch of output pixels that read a source pixel grows with S*S, so it
    is taken in PARTS of PATCH pixels.
    """
    M: tl.constexpr = BLOCK_H * BLOCK_W
    W = W // ALIGN * ALIGN  # unchanged: shows the compiler whole vectors
    x_c, x_h = xs[1] // ALIGN * ALIGN, xs[2] // ALIGN * ALIGN
    y_c, y_h = ys[1] // ALIGN * ALIGN, ys[2] // ALIGN * ALIGN
    pid, block_w = _split(tl.program_id(0), tl.cdiv(W, BLOCK_W))
    pid, block_h = _split(pid, tl.cdiv(H, BLOCK_H))
    pid, c0 = _split(pid, tl.cdiv(C, BLOCKS * BLOCK_C))
    n, g = _split(pid, G)
    c0 *= BLOCKS * BLOCK_C
    x_ptr += n.to(tl.int64) * xs[0] + (g * C).to(tl.int64) * xs[1]
    w_ptr += n.to(tl.int64) * ws[0] + g.to(tl.int64) * ws[1]
    y_ptr += n.to(tl.int64) * ys[0] + (g * C).to(tl.int64) * ys[1]

    m = tl.arange(0, M).to(INDEX)
    h, w = block_h * BLOCK_H + m // BLOCK_W, block_w * BLOCK_W + m % BLOCK_W
    written = (h < H) & (w < W)  # [M]
    if PARTS == 1:
        band, y_offset, read = _grad_features_band(
            w_ptr, ws, y_h, ys[3], block_h, block_w, 0, H, W,
            K, S, NORMALIZER, BORDER, INDEX, TAPS,
            BLOCK_H, BLOCK_W, PATCH,
        )  # fmt: skip
        band, rest = _halves(band, y_ptr)
    end = min(c0 + BLOCKS * BLOCK_C, C)
    spoilt = tl.zeros((BLOCK_C, M), tl.float32)
    for c_block in range(c0, end, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)
        y_tile = y_ptr + c[:, None] * y_c
        x = tl.zeros((BLOCK_C, M), tl.float32)
        for part in range(PARTS):
            if PARTS > 1:
                band, y_offset, read = _grad_features_band(
                    w_ptr, ws, y_h, ys[3], block_h, block_w, part, H, W,
                    K, S, NORMALIZER, BORDER, INDEX, TAPS,
                    BLOCK_H, BLOCK_W, PATCH,
                )  # fmt: skip
                band, rest = _halves(band, y_ptr)
            y = tl.load(
                y_tile + y_offset[None, :],
                (c < C)[:, None] & read[None, :],
                other=0,
            )  # [BLOCK_C, PATCH]
            x = _dot(y, band, rest, x, NORMALIZER)
        spoilt += x * 0  # not a sum: it would spill registers
        tl.store(
            x_ptr + c[:, None] * x_c + (h * x_h + w * xs[3])[None, :],
            x.to(x_ptr.dtype.element_ty),
            (c < C)[:, None] & written[None, :],
        )
    if tl.sum(spoilt) != 0:  # NaN
        tl.debug_barrier()  # other threads may write what this one wrote
        _rewrite_grad_features(
            y_ptr, w_ptr, x_ptr, ys, ws, xs, block_h, block_w, c0, end,
            C, H, W, K, S, NORMALIZER, BORDER, INDEX,
            BLOCK_C, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit(noinline=True)
def _rewrite_grad_features(
    y_ptr,
    w_ptr,
    x_ptr,
    ys,
    ws,
    xs,
    block_h,
    block_w,
    c0,
    end,
    C,
    H,
    W,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write source pixels (h, w) [M] again, as ``_rewrite`` does outputs.

    Slow, because each tap belongs to another pixel, whose weights are
    normalised for it.
    """
    M: tl.constexpr = BLOCK_H * BLOCK_W
    m = tl.arange(0, M).to(INDEX)
    h, w = block_h * BLOCK_H + m // BLOCK_W, block_w * BLOCK_W + m % BLOCK_W
    written = (h < H) & (w < W)  # [M]
    for c_block in range(c0, end, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(INDEX)
        x = tl.zeros((BLOCK_C, M), tl.float32)
        for k in range(K * K):
            ky, kx = k // K, k % K
            from_h, from_w = h - (ky - K // 2), w - (kx - K // 2)
            there = written & _is_inside(from_h, from_w, H, W)
            w_offset = from_h * ws[5] + from_w * ws[6]
            for s in range(S * S):
                start = w_ptr + _at_subpixel(s, ws[3], ws[4], S, INDEX)
                peak, scale = _peak_and_scale(
                    start, ws[2], w_offset, there, from_h, from_w, H, W,
                    K, NORMALIZER, BORDER, INDEX,
                )  # fmt: skip
                logit = _load_logit(
                    start, ws[2], w_offset, there, ky, kx, from_h, from_w,
                    H, W, K, NORMALIZER, BORDER, INDEX,
                )  # fmt: skip
                weight = _unscaled(logit, peak, NORMALIZER) * scale
                offset = (from_h * S + s // S) * ys[2]
                offset += (from_w * S + s % S) * ys[3]
                y = tl.load(
                    y_ptr + c[:, None] * ys[1] + offset[None, :],
                    (c < C)[:, None] & there[None, :],
                    other=0,
                ).to(tl.float32)  # [BLOCK_C, M]
                x += y * weight[None, :]
        tl.store(
            x_ptr + c[:, None] * xs[1] + (h * xs[2] + w * xs[3])[None, :],
            x.to(x_ptr.dtype.element_ty),
            (c < C)[:, None] & written[None, :],
        )


@triton.jit
def _grad_features_band(
    w_ptr,
    ws,
    y_h,
    y_w,
    block_h,
    block_w,
    part,
    H,
    W,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Band [PATCH, M] of one part, and where its PATCH output pixels lie."""
    M: tl.constexpr = BLOCK_H * BLOCK_W
    PATCH_H: tl.constexpr = (BLOCK_H + K - 1) * S
    PATCH_W: tl.constexpr = (BLOCK_W + K - 1) * S
    p = part * PATCH + tl.arange(0, PATCH).to(INDEX)
    oy = (block_h * BLOCK_H - K // 2) * S + p // PATCH_W
    ox = (block_w * BLOCK_W - K // 2) * S + p % PATCH_W
    read = (p < PATCH_H * PATCH_W) & (oy >= 0) & (oy < S * H)
    read &= (ox >= 0) & (ox < S * W)  # [PATCH]

    logits = _load_logits(
        w_ptr, ws, oy, ox, read, H, W, K, S, BORDER, INDEX, TAPS
    )
    weights = _normalize(logits, K, NORMALIZER, TAPS)  # [TAPS, PATCH]
    m = tl.arange(0, M)
    at = part * PATCH + tl.arange(0, PATCH)
    ky = (m // BLOCK_W + K - 1)[:, None] - (at // PATCH_W // S)[None, :]
    kx = (m % BLOCK_W + K - 1)[:, None] - (at % PATCH_W // S)[None, :]
    band = tl.trans(_pick(weights, ky, kx, K, TAPS))  # [PATCH, M]
    return band, oy * y_h + ox * y_w, read


@triton.jit(do_not_specialize=['H', 'W'])
def reassemble_grad_weights_banded(
    y_ptr,
    x_ptr,
    w_ptr,
    grad_ptr,
    ys,
    xs,
    ws,
    grads,
    C,
    H,
    W,
    G,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGN: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Write all taps of BLOCK_H x BLOCK_W output pixels.

    band [PATCH, M] = x [C, PATCH]^T @ y [C, M], of which K*K entries a
    column matter.
    """
    M: tl.constexpr = BLOCK_H * BLOCK_W
    W = W // ALIGN * ALIGN  # unchanged: shows the compiler whole vectors
    x_c, x_h = xs[1] // ALIGN * ALIGN, xs[2] // ALIGN * ALIGN
    y_c, y_h = ys[1] // ALIGN * ALIGN, ys[2] // ALIGN * ALIGN
    pid, block_w = _split(tl.program_id(0), tl.cdiv(S * W, BLOCK_W))
    pid, block_h = _split(pid, tl.cdiv(S * H, BLOCK_H))
    n, g = _split(pid, G)
    x_ptr += n.to(tl.int64) * xs[0] + (g * C).to(tl.int64) * xs[1]
    y_ptr += n.to(tl.int64) * ys[0] + (g * C).to(tl.int64) * ys[1]
    w_ptr += n.to(tl.int64) * ws[0] + g.to(tl.int64) * ws[1]
    grad_ptr += n.to(tl.int64) * grads[0] + g.to(tl.int64) * grads[1]

    m = tl.arange(0, M).to(INDEX)
    oy, ox = block_h * BLOCK_H + m // BLOCK_W, block_w * BLOCK_W + m % BLOCK_W
    written = (oy < S * H) & (ox < S * W)  # [M]
    h0, w0 = block_h * BLOCK_H // S, _source(block_w, BLOCK_W, S)
    p = tl.arange(0, PATCH).to(INDEX)
    h, w = h0 - K // 2 + p // PATCH_W, w0 - K // 2 + p % PATCH_W
    read = (p < PATCH_H * PATCH_W) & (h >= 0) & (h < H) & (w >= 0) & (w < W)

    x_offset = h * x_h + w * xs[3]
    y_offset = oy * y_h + ox * ys[3]
    band = tl.zeros((PATCH, M), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(INDEX)
        x = tl.load(
            x_ptr + c[:, None] * x_c + x_offset[None, :],
            (c < C)[:, None] & read[None, :],
            other=0,
        )  # [BLOCK_C, PATCH]
        y = tl.load(
            y_ptr + c[:, None] * y_c + y_offset[None, :],
            (c < C)[:, None] & written[None, :],
            other=0,
        )  # [BLOCK_C, M]
        band = tl.dot(tl.trans(x), y, band, input_precision='ieee')

    k = tl.arange(0, TAPS)
    taps = k < K * K
    at_h, at_w = _source_in_patch(block_h, block_w, S, BLOCK_H, BLOCK_W)
    at = (k // K * PATCH_W + k % K)[:, None] + (at_h * PATCH_W + at_w)[None, :]
    grad = tl.gather(band, tl.where(taps[:, None], at, 0), 0)  # [TAPS, M]
    if NORMALIZER is None or NORMALIZER == 'sigmoid':  # as in _load_logit
        inside = _is_inside(
            (oy // S)[None, :] + (k // K - K // 2)[:, None],
            (ox // S)[None, :] + (k % K - K // 2)[:, None],
            H,
            W,
        )
        grad = tl.where(inside, grad, 0)
    if NORMALIZER is not None:
        logits = _load_logits(
            w_ptr, ws, oy, ox, written, H, W, K, S, BORDER, INDEX, TAPS
        )
        grad = _normalize_backward(grad, logits, K, NORMALIZER, TAPS)
    grad_offset = (
        (oy % S) * grads[3]
        + (ox % S) * grads[4]
        + (oy // S) * grads[5]
        + (ox // S) * grads[6]
    )
    grad_offset = tl.max_contiguous(tl.multiple_of(grad_offset, 1), 16)
    tl.store(
        grad_ptr + (k.to(INDEX) * grads[2])[:, None] + grad_offset[None, :],
        grad.to(grad_ptr.dtype.element_ty),
        taps[:, None] & written[None, :],
    )


@triton.jit
def _split(pid, size):
    return pid // size, pid % size


@triton.jit
def _at_subpixel(s, row, column, S: tl.constexpr, INDEX: tl.constexpr):
    """Offset of subpixel s, from the strides of its row and column."""
    return tl.cast(s // S, INDEX) * row + tl.cast(s % S, INDEX) * column


@triton.jit
def _source(block, BLOCK: tl.constexpr, S: tl.constexpr):
    """First source pixel of a block of outputs; whole blocks stay aligned."""
    if BLOCK % S == 0:
        return block * (BLOCK // S)
    return block * BLOCK // S


@triton.jit
def _source_in_patch(
    block_h,
    block_w,
    S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Row and column in the patch where the window of each [M] begins."""
    m = tl.arange(0, BLOCK_H * BLOCK_W)
    at_h = (block_h * BLOCK_H % S + m // BLOCK_W) // S
    at_w = (block_w * BLOCK_W % S + m % BLOCK_W) // S
    return at_h, at_w


@triton.jit
def _load_logits(
    w_ptr,
    ws,
    oy,
    ox,
    mask,
    H,
    W,
    K: tl.constexpr,
    S: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
    TAPS: tl.constexpr,
):
    """All taps [TAPS, M] of output pixels (oy, ox) [M].

    Taps that take no part, as in
    :func:`mmcarafe.ops.reference.exclude_outside`, are minus infinity.
    """
    k = tl.arange(0, TAPS)
    offset = (oy % S) * ws[3] + (ox % S) * ws[4]
    offset += (oy // S) * ws[5] + (ox // S) * ws[6]
    offset = tl.max_contiguous(tl.multiple_of(offset, 1), 16)
    logits = tl.load(
        w_ptr + (k.to(INDEX) * ws[2])[:, None] + offset[None, :],
        (k < K * K)[:, None] & mask[None, :],
        other=0,
    ).to(tl.float32)
    if BORDER == 'renormalize':
        inside = _is_inside(
            (oy // S)[None, :] + (k // K - K // 2)[:, None],
            (ox // S)[None, :] + (k % K - K // 2)[:, None],
            H,
            W,
        )
        # Pixels beyond the map, which need not have a tap inside, keep their
        # zeros: all taps at minus infinity would make their weights NaN.
        logits = tl.where(inside | ~mask[None, :], logits, float('-inf'))
    else:
        tl.static_assert(BORDER == 'zeros', 'unknown border')
    return logits


@triton.jit
def _is_inside(h, w, H, W):
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _pick(weights, ky, kx, K: tl.constexpr, TAPS: tl.constexpr):
    """Entry [a, b] is tap (ky, kx)[a, b] of weights [TAPS, B], or zero.

    K*K is odd, so TAPS is larger and the last of the taps is padding: zero.
    """
    # As unsigned numbers, negative ones are larger than K.
    hit = (ky.to(tl.uint32) < K) & (kx.to(tl.uint32) < K)
    return tl.gather(weights, tl.where(hit, ky * K + kx, TAPS - 1), 0)


@triton.jit
def _halves(band, like):
    """A band in the dtype of ``like``, and what that rounds away."""
    rounded = band.to(like.dtype.element_ty)
    rest = (band - rounded.to(tl.float32)).to(like.dtype.element_ty)
    return rounded, rest


@triton.jit
def _dot(x, band, rest, y, NORMALIZER: tl.constexpr):
    """y + x @ (band + rest); ready masks are exact in their own dtype."""
    if NORMALIZER is not None and x.dtype != tl.float32:
        y = tl.dot(x, rest, y)
    return tl.dot(x, band, y, input_precision='ieee')


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _normalize(
    logits, K: tl.constexpr, NORMALIZER: tl.constexpr, TAPS: tl.constexpr
):
    """:func:`mmcarafe.ops.reference.normalize` of a tile [TAPS, M].

    The padding, logits of zero beyond tap K*K, becomes weights of zero.
    """
    real = (tl.arange(0, TAPS) < K * K)[:, None]
    if NORMALIZER == 'sigmoid':
        logits = tl.where(real, tl.sigmoid(logits), 0)
    elif NORMALIZER == 'softmax' or NORMALIZER == 'sigmoid_normalized':
        if NORMALIZER == 'sigmoid_normalized':
            logits = _log_sigmoid(logits)
        logits = tl.where(real, logits, float('-inf'))
        logits = tl.exp(logits - tl.max(logits, 0)[None, :])
        # If a logit is NaN, the padding is too.
        logits = tl.where(real, logits / tl.sum(logits, 0)[None, :], 0)
    else:
        tl.static_assert(NORMALIZER is None, 'unknown normalizer')
    return logits


@triton.jit
def _normalize_backward(
    grad,
    logits,
    K: tl.constexpr,
    NORMALIZER: tl.constexpr,
    TAPS: tl.constexpr,
):
    """:func:`mmcarafe.ops.reference.normalize_backward`, [TAPS, M]."""
    weights = _normalize(logits, K, NORMALIZER, TAPS)
    if NORMALIZER == 'sigmoid':
        grad = grad * weights * (1 - weights)
    else:
        grad = weights * (grad - tl.sum(weights * grad, 0)[None, :])
        if NORMALIZER == 'sigmoid_normalized':
            grad *= tl.sigmoid(-logits)
        else:
            tl.static_assert(NORMALIZER == 'softmax', 'unknown normalizer')
    return grad


@triton.jit
def _peak_and_scale(
    w_ptr,
    tap_stride,
    offset,
    mask,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Largest logit and inverse sum: weight = _unscaled(...) * scale.

    One tap at a time: a tile of taps would have a layout of its own, and
    every weight would go through shared memory to that of the features.
    """
    peak = tl.zeros_like(offset).to(tl.float32)
    scale = peak + 1
    if NORMALIZER == 'softmax' or NORMALIZER == 'sigmoid_normalized':
        peak += float('-inf')
        for ky in range(K):
            for kx in tl.static_range(K):
                logit = _load_logit(
                    w_ptr, tap_stride, offset, mask, ky, kx, h, w, H, W,
                    K, NORMALIZER, BORDER, INDEX,
                )  # fmt: skip
                if NORMALIZER == 'sigmoid_normalized':
                    logit = _log_sigmoid(logit)
                peak = tl.maximum(peak, logit)
        total = tl.zeros_like(peak)
        for ky in range(K):
            for kx in tl.static_range(K):
                logit = _load_logit(
                    w_ptr, tap_stride, offset, mask, ky, kx, h, w, H, W,
                    K, NORMALIZER, BORDER, INDEX,
                )  # fmt: skip
                total += _unscaled(logit, peak, NORMALIZER)
        scale = 1 / total
    else:
        tl.static_assert(
            NORMALIZER == 'sigmoid' or NORMALIZER is None, 'unknown normalizer'
        )
    return peak, scale


@triton.jit
def _load_weights(
    w_ptr,
    tap_stride,
    offset,
    mask,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The normalised weights of all taps, each [BLOCK_W]."""
    logits = ()
    for ky in tl.static_range(K):
        for kx in tl.static_range(K):
            logit = _load_logit(
                w_ptr, tap_stride, offset, mask, ky, kx, h, w, H, W,
                K, NORMALIZER, BORDER, INDEX,
            )  # fmt: skip
            if NORMALIZER == 'sigmoid_normalized':
                logit = _log_sigmoid(logit)
            logits += (logit,)
    weights = ()
    if NORMALIZER == 'softmax' or NORMALIZER == 'sigmoid_normalized':
        peak = logits[0]
        for k in tl.static_range(1, K * K):
            peak = tl.maximum(peak, logits[k])
        unscaled, total = (), tl.zeros_like(peak)
        for k in tl.static_range(K * K):
            weight = tl.exp(logits[k] - peak)
            unscaled, total = unscaled + (weight,), total + weight
        for k in tl.static_range(K * K):
            weights += (unscaled[k] * (1 / total),)
    elif NORMALIZER == 'sigmoid':
        for k in tl.static_range(K * K):
            weights += (tl.sigmoid(logits[k]),)
    else:
        tl.static_assert(NORMALIZER is None, 'unknown normalizer')
        weights = logits
    return weights


@triton.jit
def _load_logit(
    w_ptr,
    tap_stride,
    offset,
    mask,
    ky,
    kx,
    h,
    w,
    H,
    W,
    K: tl.constexpr,
    NORMALIZER: tl.constexpr,
    BORDER: tl.constexpr,
    INDEX: tl.constexpr,
):
    """One tap of source pixels (h, w); see ``_load_logits``."""
    other = 0
    if NORMALIZER is None or NORMALIZER == 'sigmoid':
        # A tap outside reads zero: nothing, even if its weight is infinite.
        mask &= _is_inside(h + (ky - K // 2), w + (kx - K // 2), H, W)
    elif BORDER == 'renormalize':
        # Pixels beyond the map keep their zeros: minus infinity from minus
        # infinity is NaN, of which the interpreter warns.
        other = tl.where(mask, float('-inf'), 0)
        mask &= _is_inside(h + (ky - K // 2), w + (kx - K // 2), H, W)
    else:
        tl.static_assert(BORDER == 'zeros', 'unknown border')
    tap = tl.cast(ky * K + kx, INDEX)
    logit = tl.load(w_ptr + tap * tap_stride + offset, mask, other=other)
    return logit.to(tl.float32)


@triton.jit
def _unscaled(logit, peak, NORMALIZER: tl.constexpr):
    # One return at the end: Triton compiles what follows an early one too.
    if NORMALIZER == 'softmax':
        logit = tl.exp(logit - peak)
    elif NORMALIZER == 'sigmoid_normalized':
        logit = tl.exp(_log_sigmoid(logit) - peak)
    elif NORMALIZER == 'sigmoid':
        logit = tl.sigmoid(logit)
    else:
        tl.static_assert(NORMALIZER is None, 'unknown normalizer')
    return logit


def index_dtype(wide):
    """Offsets are as narrow as they can be: they fill registers."""
    return tl.int64 if wide else tl.int32
