"""Lead the calls of ``F.interpolate`` in a module's forward to upsamplers.

The module gets a subclass of its own class. Its forward still is the one that
its authors wrote, and runs with F.interpolate intercepted.
"""

from collections import OrderedDict
from functools import lru_cache

import torch
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from mmcarafe.upsamplers.meet import match_size, upsample_to_meet


def redirect(module, factors, upsamplers):
    """Lead a module's own calls of ``F.interpolate`` to upsamplers.

    Args:
        module (nn.Module): gets another class.
        factors (dict[str, int]): number of the call, from 0 -> S.
        upsamplers (nn.ModuleDict): number of the call -> upsampler by S; all
            other calls interpolate as before. In torchvision's feature
            pyramid they may want a guide, the level that is upsampled to.
    """
    module.upsample_factors = factors
    module.upsample_modules = upsamplers
    _change_class(module, _TopDown if is_fpn(module) else _Redirecting)


def is_fpn(module):
    """Whether it is torchvision's pyramid; torchvision may be missing."""
    cls = type(module)
    return f'{cls.__module__}.{cls.__qualname__}' == (
        'torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork'
    )


def hide_inner(model, modules):
    """Hide calls of ``F.interpolate`` from modules around that count theirs.

    Args:
        model (nn.Module): where to look for such modules.
        modules (list[nn.Module]): those that may call it; inside of one that
            is redirected they get another class.
    """
    modules = set(modules)
    for outer in list(model.modules()):
        if isinstance(outer, _Redirecting):
            for inner in modules.intersection(outer.modules()):
                if not isinstance(inner, _Swapped):
                    _change_class(inner, _Hiding)


def _change_class(module, mixin):
    module.__class__ = _subclass(mixin, type(module))


@lru_cache(maxsize=None)
def _subclass(mixin, cls):
    # of the same name: that is what a printed model shows
    return type(cls.__name__, (mixin, cls), {'__module__': __name__})


def _rebuild(mixin, cls):
    cls = _subclass(mixin, cls)
    return cls.__new__(cls)


class _Swapped:
    """Mixin of the new classes, which have no name to be pickled by."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, type(self).__bases__, *state)


class _Redirecting(_Swapped):
    def forward(self, *args, **kwargs):
        with _Redirect(self.upsample_modules, self.upsample_factors):
            return super().forward(*args, **kwargs)


class _Hiding(_Swapped):
    def forward(self, *args, **kwargs):
        with _Redirect({}, {}):
            return super().forward(*args, **kwargs)


class _TopDown(_Swapped):
    def forward(self, x):
        """See torchvision's ``FeaturePyramidNetwork``."""
        names, maps = list(x.keys()), list(x.values())
        with _Redirect({}, {}):
            merged = self.get_result_from_inner_blocks(maps[-1], -1)
            outs = [self.get_result_from_layer_blocks(merged, -1)]
            for i in range(len(maps) - 2, -1, -1):
                lateral = self.get_result_from_inner_blocks(maps[i], i)
                merged = self._merge(str(len(maps) - 2 - i), merged, lateral)
                outs.insert(0, self.get_result_from_layer_blocks(merged, i))
            if self.extra_blocks is not None:
                outs, names = self.extra_blocks(outs, maps, names)
        return OrderedDict(zip(names, outs))

    def _merge(self, number, coarse, fine):
        if number not in self.upsample_factors:
            return fine + interpolate(coarse, size=fine.shape[-2:])
        fine, (upsampled,) = upsample_to_meet(
            [self.upsample_modules[number]],
            [coarse],
            fine,
            self.upsample_factors[number],
        )
        return fine + upsampled


class _Redirect(TorchFunctionMode):
    """Leads calls of ``F.interpolate`` to upsamplers by their number."""

    def __init__(self, upsamplers, factors):
        super().__init__()
        self.upsamplers = upsamplers
        self.factors = factors
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not interpolate:
            return func(*args, **kwargs)
        number = str(self.calls)
        self.calls += 1
        # an outer module that counts its own calls must not see these
        with torch._C.DisableTorchFunction():
            if number not in self.factors:
                return func(*args, **kwargs)
            return self._upsample(number, *args, **kwargs)

    def _upsample(self, number, x, size=None, **_):
        upsampled = self.upsamplers[number](x)
        if size is None:  # it was called with a factor
            return upsampled
        if not isinstance(size, (tuple, list)):
            size = (size, size)
        return match_size(upsampled, size, self.factors[number])
