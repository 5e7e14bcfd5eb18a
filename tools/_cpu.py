"""Distributed and mixed-precision training without a GPU.

mmengine and torch need CUDA for both. This does the same on a CPU, so that a
run can be tried without a GPU.
"""

from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import distributed, nn


def distribute(cfg):
    """Connect the processes that torch's launcher has started."""
    distributed.init_process_group('gloo')
    MODELS.register_module('SyncBN', module=CPUSyncBatchNorm, force=True)
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **cfg.get('model_wrapper_cfg', {}),
        'device_ids': None,
    }


class SumOfRanks(torch.autograd.Function):
    """all_reduce with a gradient, which torch's own lacks."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOfRanks.apply(grad)


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """torch.nn.SyncBatchNorm, which trains on GPUs only, by sums of ranks."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)

        def per_channel(values):
            return values.view(-1, *[1] * (x.dim() - 2))  # [C, 1, 1]

        dims = [0, *range(2, x.dim())]  # all but C
        count = SumOfRanks.apply(torch.tensor(x.numel() / x.size(1)))
        mean = SumOfRanks.apply(x.float().sum(dims)) / count
        deviation = x - per_channel(mean)
        var = SumOfRanks.apply(deviation.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        y = deviation * per_channel(scale) + per_channel(self.bias)
        return y.type_as(x)


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """bf16 autocast; mmengine's AmpOptimWrapper needs a GPU.

    bf16 has the exponents of fp32, so the loss needs no scaling.
    """

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu'):
            yield


def keep_boxes_in_fp32(model):
    """Keep a detector's boxes out of autocast.

    mmcv's NMS and RoIAlign take no bf16 on a CPU. Nor can it hold coordinates:
    it has no odd numbers above 256.
    """
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import (
        BaseRoIExtractor,
    )

    def to_fp32(data):
        return apply_to(data, torch.is_tensor, torch.Tensor.float)

    for module in model.modules():
        if isinstance(module, BaseDenseHead):
            module.register_forward_hook(lambda *args: to_fp32(args[-1]))
        elif isinstance(module, BaseRoIExtractor):
            module.register_forward_pre_hook(lambda _, args: to_fp32(args))
