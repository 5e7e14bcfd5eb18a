"""Train a detector or a segmentor: python tools/train.py CONFIG [options]."""

import sys

import _checkpoints
import _cli
import _cpu
import _data
import _resume
from mmengine.device import get_device


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


def resume(cfg, checkpoint):
    """Continue from a checkpoint; "auto" is the run's last readable one."""
    if checkpoint == 'auto':
        checkpoint = _checkpoints.newest_readable(cfg.work_dir)
        if not checkpoint:
            _cli.say(
                f'--resume: there is no checkpoint in {cfg.work_dir} yet, so '
                'training starts from the beginning'
            )
            return
    cfg.resume = True
    cfg.load_from = checkpoint


def stop(runner):
    """End without a traceback after Ctrl-C."""
    after = _checkpoints.how_to_go_on(runner.work_dir)
    print(f'stopped at iteration {runner.iter}; {after}', file=sys.stderr)
    raise SystemExit(130)  # the shell's code for Ctrl-C


def main():
    args = parse_args()
    cfg = _cli.load_config(
        args, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper'
    )
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        scale_lr(cfg)
    if args.resume or cfg.get('resume'):
        resume(cfg, args.resume or cfg.get('load_from') or 'auto')
    if not check(cfg):
        return

    runner = _cli.build_runner(cfg)
    _resume.register(runner)
    if args.amp and get_device() == 'cpu' and cfg.default_scope == 'mmdet':
        _cpu.keep_boxes_in_fp32(runner.model)
    try:
        with _data.guarded(
            runner, 'train', 'val'
        ), _cli.channel_errors(), _checkpoints.readable_errors(
            cfg.model
        ), _checkpoints.writable_errors(cfg.work_dir):
            runner.train()
    except KeyboardInterrupt:
        stop(runner)


def check(cfg):
    """Check all that can be checked before anything is written.

    The model and the checkpoint that this needs are freed when it returns.

    Returns:
        bool: whether there is anything left to train.
    """
    _cli.check_train_cfg(cfg)
    _checkpoints.check_pretrained(cfg.model)
    _data.check_data(cfg, 'train')
    if cfg.get('val_cfg'):
        for key in ('val_dataloader', 'val_evaluator'):
            if cfg.get(key) is None:
                _cli.fail(f'the config has val_cfg but no {key}')
        _data.check_data(cfg, 'val')
    model = _cli.build_model(cfg)
    _cli.check_hooks(cfg, model)
    _cli.recompute_activations(cfg, model)
    optim_wrapper = _cli.build_optimizer(cfg, model)
    if cfg.get('load_from'):
        checkpoint = _checkpoints.load(cfg.load_from)
        if not cfg.get('resume'):
            _checkpoints.say_what_is_loaded(model, cfg.load_from, checkpoint)
        else:
            _checkpoints.check_resumed(
                cfg.load_from, checkpoint, model, optim_wrapper
            )
            _resume.keep_seed(cfg, checkpoint)
            end = _checkpoints.finished(cfg.train_cfg, checkpoint)
            if end:
                _cli.say(
                    f'{cfg.load_from} ends a run with {end}: raise '
                    'that to train longer, or start again in another '
                    '--work-dir'
                )
                return False
    return True


if __name__ == '__main__':
    main()
