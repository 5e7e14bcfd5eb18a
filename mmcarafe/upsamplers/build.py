"""Upsamplers by name, and the helpers that all necks and heads use.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

import difflib
import inspect
import warnings
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmcarafe.ops.carafe import check_int
from mmcarafe.upsamplers.carafe import CARAFE, init_xavier
from mmcarafe.upsamplers.dynamic_filter import DynamicFilter
from mmcarafe.upsamplers.dysample import DySample, pixel_shuffle
from mmcarafe.upsamplers.eucb import EUCB
from mmcarafe.upsamplers.freqfusion import FreqFusion
from mmcarafe.upsamplers.sapa import SAPA

UPSAMPLE_CFG = dict(type='mmcarafe.CARAFE')  # the default everywhere


class PixelShuffle(nn.Module):
    """A convolution to S*S times the channels, then a pixel shuffle.

    Arguments, parameter names and initialisation are those of mmcv's
    ``PixelShufflePack``, so its state dicts load.

    Args:
        in_channels (int): of the input.
        out_channels (int): of the output.
        scale_factor (int): S.
        upsample_kernel (int): odd kernel size of the convolution.
    """

    def __init__(
        self, in_channels, out_channels, scale_factor=2, upsample_kernel=3
    ):
        super().__init__()
        check_int('upsample_kernel', upsample_kernel, odd=True)
        self.scale_factor = scale_factor
        self.upsample_conv = nn.Conv2d(
            in_channels,
            out_channels * scale_factor**2,
            upsample_kernel,
            padding=upsample_kernel // 2,
        )
        self.init_weights()

    def init_weights(self):
        init_xavier(self.upsample_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``[N, C_in, H, W]`` to ``[N, C_out, S*H, S*W]``."""
        return pixel_shuffle(self.upsample_conv(x), self.scale_factor)


class Upsampler(NamedTuple):
    """What is known of a type that configs may name.

    The box APs are published ones, of Faster R-CNN R50 trained for 12 epochs,
    on COCO val; '' where none is known. The two come from different detectors
    and recipes: never compare one with the other.
    """

    cls: type
    name: str  # in tables
    what: str  # how it upsamples
    first_ap: str = ''  # in the CARAFE paper, with an FPN
    later_ap: str = ''  # in later papers, with mmdet's FPN_CARAFE as the neck


# Type in configs -> what it is. With torch alone, configs may name only these;
# with mmengine, also any registered module. 'CARAFE' is short for
# 'mmcarafe.CARAFE'.
UPSAMPLERS = {
    'nearest': Upsampler(
        nn.Upsample, 'nearest', 'repeats each pixel', '36.5', '37.5'
    ),
    'bilinear': Upsampler(
        nn.Upsample, 'bilinear', 'interpolates between pixels', '36.7'
    ),
    'deconv': Upsampler(
        nn.ConvTranspose2d,
        'deconvolution 3×3',
        'a transposed convolution',
        '36.4',
        '37.3',
    ),
    'pixel_shuffle': Upsampler(
        PixelShuffle,
        'pixel shuffle 3×3',
        'a convolution to S*S times the channels',
        '36.5',
        '37.5',
    ),
    'EUCB': Upsampler(
        EUCB, 'EUCB 3×3', 'repeats each pixel, then convolves separably'
    ),
    'DynamicFilter': Upsampler(
        DynamicFilter,
        'dynamic filter 5×5',
        'a predicted window for each pixel and channel',
    ),
    'DySample': Upsampler(
        DySample,
        'DySample',
        'interpolates at predicted positions',
        later_ap='38.6',
    ),
    'CARAFE': Upsampler(
        CARAFE,
        'CARAFE 5×5',
        'a predicted window for each pixel',
        '37.8',
        '38.6',
    ),
    'SAPA': Upsampler(
        SAPA,
        'SAPA 5×5',
        'a window weighted by similarity to the guide',
        later_ap='37.8',
    ),
    'FreqFusion': Upsampler(
        FreqFusion,
        'FreqFusion',
        'a predicted window for each pixel, and sharpens the guide',
        later_ap='39.4',
    ),
}
# What tables, benchmarks and tests compare: name -> config.
COMPARED = {row.name: dict(type=kind) for kind, row in UPSAMPLERS.items()}


def build_upsampler(
    cfg: 'dict | str',
    channels: int,
    scale_factor: int = 2,
    name: str = 'upsample_cfg',
    guide_channels: 'int | None' = None,
) -> nn.Module:
    """Build an upsampler from C to C channels from its config.

    ``channels`` (or ``in_channels`` and ``out_channels``), ``scale_factor``
    and ``guide_channels`` are filled in where the class takes them; a config
    may not contradict them.

    Args:
        cfg (dict | str): ``type`` is ``'mmcarafe.CARAFE'``, ``'nearest'``,
            ``'bilinear'``, ``'deconv'``, ``'pixel_shuffle'``, a class, or,
            where mmengine is installed, any registered module (such as mmcv's
            ``'carafe'``, which needs a GPU or :mod:`mmcarafe.drop_in`); the
            rest are its arguments. A str is a type without arguments.
        channels (int): C.
        scale_factor (int): S.
        name (str): what the config is called in error messages.
        guide_channels (int, optional): channels of the guide, a finer map
            ``[N, guide_channels, S*H, S*W]``; None where there is no guide.

    Returns:
        nn.Module: maps ``[N, C, H, W]`` to ``[N, C, S*H, S*W]``. Where its
        class has a true ``guided``, ``forward(x, guide)`` wants the guide, and
        may return the pair (changed guide, upsampled map): see
        :func:`~mmcarafe.upsamplers.upsample_to_meet`.

    Raises:
        TypeError: ``cfg`` is neither dict nor str.
        ValueError: ``cfg`` has no type, an unknown one, or arguments that its
            class refuses, or what it builds does not upsample C channels by S,
            or wants a guide where there is none.
    """
    if isinstance(cfg, str):
        cfg = dict(type=cfg)
    if not isinstance(cfg, dict):
        raise TypeError(
            f"{name} is a {type(cfg).__name__}, expected a dict with a 'type' "
            "such as 'mmcarafe.CARAFE' or 'nearest'"
        )
    if 'type' not in cfg:
        raise ValueError(
            f"{name} is {dict(cfg)}, expected a 'type' such as "
            "'mmcarafe.CARAFE' or 'nearest'; if it was inherited from another "
            f'config, write {name}=dict(_delete_=True, type=...)'
        )
    arguments = dict(cfg)
    kind = arguments.pop('type')
    cls = _find_class(kind, name)
    guided = getattr(cls, 'guided', False)
    if guided and guide_channels is None:
        raise ValueError(
            f'{name} is {dict(cfg)}: {cls.__name__} wants a guide, a finer '
            'map that the upsampled one will meet, and there is none here; '
            'expected an upsampler without a guide'
        )
    decided = dict(
        scale_factor=scale_factor,
        channels=channels,
        in_channels=channels,
        out_channels=channels,
        guide_channels=guide_channels,
    )
    _fill_in(arguments, kind, cls, decided, name)
    try:
        module = cls(**arguments)
    except (TypeError, ValueError) as error:
        hint = ''
        if 'unexpected keyword' in str(error):
            hint = (
                '; if that was inherited from another config, write '
                f'{name}=dict(_delete_=True, type=...)'
            )
        raise ValueError(f'{name} is {dict(cfg)}: {error}{hint}') from error
    _check_upsamples(
        module,
        (channels, guide_channels) if guided else (channels,),
        scale_factor,
        f'{name} is {dict(cfg)}',
    )
    return module


def _find_class(kind, name):
    if inspect.isclass(kind):
        return kind
    cls = None
    known = list(UPSAMPLERS)
    if isinstance(kind, str):
        row = UPSAMPLERS.get(kind.split('mmcarafe.')[-1])
        if row:
            cls = row.cls
        elif find_spec('mmengine'):
            from mmcarafe.registry import MODELS

            try:
                cls = MODELS.get(kind)
            except RuntimeError:  # the registry does not know it
                pass
            known += MODELS.module_dict
    if not inspect.isclass(cls):
        close = difflib.get_close_matches(str(kind).split('.')[-1], known, 1)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(
            f'{name} has type {kind!r}, expected a registered upsampler such '
            "as 'mmcarafe.CARAFE', 'nearest', 'bilinear', 'deconv' or "
            f"'pixel_shuffle'{hint}"
        )
    return cls


def _fill_in(arguments, kind, cls, decided, name):
    """Add the arguments that the upsampler's place decides, if missing."""
    scale_factor = decided['scale_factor']
    for key, expected in decided.items():
        if arguments.get(key) not in (None, expected):
            raise ValueError(
                f'{name} has {key} {arguments[key]!r}, expected {expected}'
            )
    if cls is nn.Upsample:
        mode = kind.split('.')[-1] if isinstance(kind, str) else 'nearest'
        if arguments.setdefault('mode', mode) != mode and kind is not cls:
            raise ValueError(
                f'{name} has type {kind!r} and mode {arguments["mode"]!r}, '
                f"expected no mode, or type='{arguments['mode']}'"
            )
    elif issubclass(cls, nn.ConvTranspose2d):
        # By default the paper's 3×3, and exactly S times the input's size.
        kernel_size = arguments.setdefault('kernel_size', 3)
        check_int(f'{name}.kernel_size', kernel_size)
        padding = max(0, (kernel_size - scale_factor + 1) // 2)
        arguments.setdefault('stride', scale_factor)
        arguments.setdefault('padding', padding)
        arguments.setdefault(
            'output_padding', scale_factor + 2 * padding - kernel_size
        )
    accepted = inspect.signature(cls).parameters
    if 'in_channels' not in accepted:
        # To CARAFE, out_channels would mean an extra convolution.
        del decided['out_channels']
    if 'upsample_kernel' in accepted:
        decided['upsample_kernel'] = 3  # mmcv's pixel shuffle has no default
    for key in decided.keys() & accepted.keys():
        if arguments.get(key) is None:
            arguments[key] = decided[key]


def _check_upsamples(module, channels, scale_factor, what):
    """Run the module once, on a small map and, where it wants one, a guide.

    ``channels`` are those of both.
    """
    if any(cls.__module__ == 'mmcv.ops.carafe' for cls in type(module).mro()):
        return  # runs on a GPU only
    example = next(module.parameters(), torch.empty(0))
    low, high = (8, 12), (8 * scale_factor, 12 * scale_factor)
    inputs = [
        example.new_zeros(1, c, *size)
        for c, size in zip(channels, (low, high))
    ]
    training = [(each, each.training) for each in module.modules()]
    try:
        with torch.no_grad():
            out = module.eval()(*inputs)
    except Exception as error:  # of a module that this package does not know
        warnings.warn(f'{what}: not tried out, because {error}', stacklevel=3)
        return
    finally:
        for each, mode in training:
            each.training = mode
    if len(inputs) == 2 and isinstance(out, tuple):
        _, out = out
    expected = (1, channels[0], *high)
    made = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if made != expected:
        raise ValueError(
            f'{what}: it makes {made} from a map of {tuple(inputs[0].shape)}, '
            f'expected {expected}'
        )
