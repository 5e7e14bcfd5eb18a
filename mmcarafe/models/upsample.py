"""The upsampling module and what every neck and head needs around one.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import inspect

import torch
import torch.nn.functional as F
from mmengine.model import normal_init, xavier_init
from torch import Tensor, nn

from mmcarafe.ops import carafe_from_logits
from mmcarafe.ops.carafe import check_int, check_normalizer
from mmcarafe.registry import MODELS

UPSAMPLE_CFG = dict(type='mmcarafe.CARAFE')  # what every default is
# torch >= 2.7
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)


@MODELS.register_module()
class CARAFE(nn.Module):
    """Upsample with kernels predicted from the features themselves.

    Sections 3.1 to 3.3 of the `paper <https://arxiv.org/abs/1905.02188>`_:
    a 1×1 convolution compresses the channels, a convolution encodes them into
    G*K*K*S*S logits per source pixel, and
    :func:`mmcarafe.ops.carafe_from_logits` normalises these and reassembles
    the features.

    Arguments, parameter names and initialisation are those of mmcv's
    ``CARAFEPack``, so its state dicts load.

    Args:
        channels (int): C.
        scale_factor (int): S.
        up_kernel (int): K, odd.
        up_group (int): G. Divides C.
        encoder_kernel (int): odd kernel size of the content encoder. The
            paper's rule is K - 2.
        encoder_dilation (int): dilation of the content encoder.
        compressed_channels (int | float): channels between the convolutions.
            A float is a share of ``channels``.
        normalizer (str, optional): see
            :func:`mmcarafe.ops.carafe_from_logits`.
        out_channels (int, optional): adds a 1×1 convolution to so many
            channels after the upsampling.
    """

    def __init__(
        self,
        channels,
        scale_factor=2,
        up_kernel=5,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=64,
        normalizer='softmax',
        out_channels=None,
    ):
        super().__init__()
        check_int('channels', channels)
        check_int('scale_factor', scale_factor)
        check_int('up_kernel', up_kernel, odd=True)
        check_int('up_group', up_group)
        check_int('encoder_kernel', encoder_kernel, odd=True)
        check_int('encoder_dilation', encoder_dilation)
        check_normalizer(normalizer)
        if channels % up_group:
            raise ValueError(
                f'up_group is {up_group}, '
                f'expected a divisor of channels = {channels}'
            )
        if isinstance(compressed_channels, float):
            compressed_channels = round(compressed_channels * channels)
        check_int('compressed_channels', compressed_channels)
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.normalizer = normalizer
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_group * up_kernel**2 * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        if out_channels is not None:
            check_int('out_channels', out_channels)
            self.out_conv = nn.Conv2d(channels, out_channels, 1)
        else:
            self.out_conv = None
        self.init_weights()

    def init_weights(self):
        """Start near a uniform kernel: logits are N(0, 0.001) filtered.

        A parent's ``init_weights`` calls this after its own ``init_cfg``.
        """
        xavier_init(self.channel_compressor, distribution='uniform')
        normal_init(self.content_encoder, std=0.001)
        if self.out_conv is not None:
            xavier_init(self.out_conv, distribution='uniform')

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``.

        With ``out_channels`` the result has so many channels.
        """
        compressed = self.channel_compressor(x)
        logits = self.content_encoder(compressed)  # [N, G*K*K*S*S, H, W]
        x = carafe_from_logits(
            x,
            logits,
            self.up_kernel,
            self.up_group,
            self.scale_factor,
            self.normalizer,
        )
        return x if self.out_conv is None else self.out_conv(x)

    def extra_repr(self):
        return (
            f'scale_factor={self.scale_factor}, up_kernel={self.up_kernel}, '
            f'up_group={self.up_group}, normalizer={self.normalizer!r}'
        )


def build_upsampler(cfg, channels, scale_factor=2, name='upsample_cfg'):
    """Build an upsampler, C channels in and out, from its config.

    ``channels`` (or ``in_channels`` and ``out_channels``) and
    ``scale_factor`` are filled in where the class takes them and the config
    does not say otherwise.

    Args:
        cfg (dict): ``type`` is ``'mmcarafe.CARAFE'``, an upsampler of mmcv's
            (``'nearest'``, ``'bilinear'``, ``'deconv'``, ``'pixel_shuffle'``,
            ``'carafe'``, which needs a GPU or :mod:`mmcarafe.drop_in`), or
            any other registered module; the rest are its arguments.
        channels (int): C.
        scale_factor (int): S.
        name (str): what the config is called in error messages.

    Raises:
        TypeError: ``cfg`` is no dict.
        ValueError: ``cfg`` has no type, one that is not registered, or
            arguments that its class refuses.
    """
    if not isinstance(cfg, dict):
        raise TypeError(f'{name} is a {type(cfg).__name__}, expected a dict')
    if 'type' not in cfg:
        raise ValueError(
            f"{name} is {dict(cfg)}, expected a 'type' such as "
            "'mmcarafe.CARAFE' or 'nearest'"
        )
    arguments = dict(cfg)
    kind = arguments.pop('type')
    cls = _find_class(kind, name)
    if arguments.get('scale_factor', scale_factor) != scale_factor:
        raise ValueError(
            f'{name} has scale_factor {arguments["scale_factor"]}, '
            f'expected {scale_factor}'
        )
    if cls is nn.Upsample:
        mode = kind if isinstance(kind, str) else 'nearest'
        arguments.setdefault('mode', mode)
    elif issubclass(cls, nn.ConvTranspose2d):
        # The paper's 3×3 unless said otherwise, and S times the size exactly.
        kernel_size = arguments.setdefault('kernel_size', 3)
        check_int(f'{name}.kernel_size', kernel_size)
        padding = max(0, (kernel_size - scale_factor + 1) // 2)
        arguments.setdefault('stride', scale_factor)
        arguments.setdefault('padding', padding)
        arguments.setdefault(
            'output_padding', scale_factor + 2 * padding - kernel_size
        )
    defaults = dict(
        scale_factor=scale_factor,
        channels=channels,
        in_channels=channels,
        upsample_kernel=3,  # mmcv's pixel shuffle has no default of its own
    )
    accepted = inspect.signature(cls).parameters
    if 'in_channels' in accepted:
        defaults['out_channels'] = channels
    for key in accepted:
        if key in defaults:
            arguments.setdefault(key, defaults[key])
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name} is {dict(cfg)}: {error}') from error


def _find_class(kind, name):
    if inspect.isclass(kind):
        return kind
    cls = None
    if isinstance(kind, str):
        try:
            cls = MODELS.get(kind)
        except RuntimeError:  # how the registry says that a name is unknown
            pass
    if not inspect.isclass(cls):
        raise ValueError(
            f'{name} has type {kind!r}, expected a registered upsampler such '
            "as 'mmcarafe.CARAFE', 'nearest', 'bilinear', 'deconv' or "
            "'pixel_shuffle'"
        )
    return cls


def fit(x, size, scale_factor=2):
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
    if (
        0 <= x.shape[2] - height < scale_factor
        and 0 <= x.shape[3] - width < scale_factor
    ):
        if _is_exporting() and not torch.onnx.is_in_onnx_export():
            # The strides of a slice tell whether it takes all, and the
            # program would be for images that are like the example in that.
            rows = torch.arange(height, device=x.device)
            columns = torch.arange(width, device=x.device)
            return x.index_select(2, rows).index_select(3, columns)
        return x[:, :, :height, :width]
    return F.interpolate(x, (height, width), mode='bilinear')
