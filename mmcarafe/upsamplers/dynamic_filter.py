"""The dynamic filter that CARAFE is compared with.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

from mmcarafe.upsamplers.carafe import CARAFE


class DynamicFilter(CARAFE):
    """A K×K reassembly kernel for each output pixel *and channel*.

    `Dynamic Filter Networks <https://arxiv.org/abs/1605.09673>`_, as the
    literature compares them: CARAFE with a group for every channel, so its
    encoder predicts C*K*K*S*S scores for each source pixel. With 256 channels
    it has 14,787,648 parameters, 199 times those of CARAFE.

    Args:
        channels (int): C.
        scale_factor (int): S.
        up_kernel (int): K, odd.
        **kwargs: see :class:`CARAFE`; not ``up_group``.
    """

    def __init__(self, channels, scale_factor=2, up_kernel=5, **kwargs):
        super().__init__(
            channels, scale_factor, up_kernel, up_group=channels, **kwargs
        )
