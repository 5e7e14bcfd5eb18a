"""Train a detector or a segmentor: python tools/train.py CONFIG [options]."""

import _cli
import _cpu
import _data
from mmengine.device import get_device
from mmengine.runner import find_latest_checkpoint


def parse_args():
    parser = _cli.make_parser('Train a detector or a segmentor')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train in mixed precision: fp16 with loss scaling on a GPU (or '
        'what optim_wrapper.dtype says), bf16 on a CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the ratio of the total batch size '
        "to the config's auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint, or from the newest in the work '
        'folder',
    )
    return parser.parse_args()


def use_amp(cfg):
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        _cli.fail(
            '--amp: optim_wrapper.type must be OptimWrapper or '
            f'AmpOptimWrapper, got {kind}'
        )
    if get_device() == 'cpu':
        wrapper.type = 'CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
    else:
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')


def scale_lr(cfg):
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        _cli.fail(
            '--auto-scale-lr: config has no auto_scale_lr.base_batch_size'
        )
    cfg.auto_scale_lr.enable = True


def main():
    args = parse_args()
    cfg = _cli.load_config(
        args, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper'
    )
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        scale_lr(cfg)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume

    _data.check_data(cfg, 'train')
    if cfg.get('val_cfg'):
        _data.check_data(cfg, 'val')
    _cli.check_model(cfg)
    checkpoint = cfg.get('load_from')
    if cfg.get('resume') and not checkpoint:
        checkpoint = find_latest_checkpoint(cfg.work_dir)
    if checkpoint:
        _cli.check_checkpoint(checkpoint, cfg.get('resume'))

    runner = _cli.build_runner(cfg)
    if args.amp and get_device() == 'cpu' and cfg.default_scope == 'mmdet':
        _cpu.keep_boxes_in_fp32(runner.model)
    with _data.guarded(runner, 'train', 'val'):
        runner.train()


if __name__ == '__main__':
    main()
