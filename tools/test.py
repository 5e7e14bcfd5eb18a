"""Test a model: python tools/test.py CONFIG CHECKPOINT [options]."""

import copy
import os.path as osp

import _checkpoints
import _cli
import _data
import _pictures  # noqa: F401  (registers the hook that draws)


def parse_args():
    parser = _cli.make_parser('Test a detector or a segmentor')
    parser.add_argument('checkpoint', help='file or URL')
    parser.add_argument(
        '--out',
        help='keep the predictions: a .pkl file of detections, or a folder '
        'for label maps',
    )
    parser.add_argument(
        '--show', action='store_true', help='show each prediction in a window'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds for each (--show)'
    )
    parser.add_argument(
        '--show-dir',
        help='draw each image with truth, prediction and errors into this '
        'folder, in WORK_DIR/TIMESTAMP (only every n-th batch, if the config '
        'has default_hooks.visualization.interval=n; boxes above '
        'default_hooks.visualization.score_thr)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='merge the predictions for several versions of each image',
    )
    return parser.parse_args()


# Their pictures show no truth, or no errors, and the latter takes ten times as
# long to draw an image as a small model takes to predict it.
REPLACED = ('DetVisualizationHook', 'SegVisualizationHook')


def draw(cfg, args):
    hooks = cfg.get('default_hooks', {})
    if not hooks.get('visualization'):
        option = '--show' if args.show else '--show-dir'
        _cli.fail(f'{option}: config has no default_hooks.visualization')
    hook = hooks.visualization
    kind = getattr(hook.type, '__name__', hook.type)
    if kind.split('.')[-1] not in REPLACED:  # of video, of text
        hook.update(draw=True, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            hook.test_out_dir = args.show_dir
        return
    kept = ('interval', 'score_thr', 'backend_args', 'priority')
    hooks.visualization = dict(
        {key: hook[key] for key in kept if key in hook},
        type='mmengine.ComparisonHook',
        out_dir=args.show_dir,
        show=args.show,
        wait_time=args.wait_time,
    )


def keep_predictions(cfg, out):
    evaluators = _cli.as_list(cfg.test_evaluator)
    if cfg.default_scope == 'mmseg':
        if out.endswith(('.pkl', '.pickle')) or osp.isfile(out):
            _cli.fail(f'--out: expected a folder for label maps, got {out}')
        for evaluator in evaluators:
            if evaluator.type == 'IoUMetric':
                evaluator.update(output_dir=out, keep_results=True)
        return
    if not out.endswith(('.pkl', '.pickle')):
        _cli.fail(f'--out: expected a .pkl file for detections, got {out}')
    dump = dict(type='DumpDetResults', out_file_path=out)
    cfg.test_evaluator = [*evaluators, dump]


def use_tta(cfg):
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        _cli.fail(
            '--tta: test_dataloader.dataset must have one pipeline, which '
            f'{dataset.get("type")} has not'
        )
    if cfg.default_scope == 'mmdet':
        nms = dict(type='nms', iou_threshold=0.5)
        cfg.setdefault(
            'tta_model',
            dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100)),
        )
        cfg.setdefault('tta_pipeline', flipped(dataset.pipeline))
    for key in ('tta_model', 'tta_pipeline'):
        if not cfg.get(key):
            _cli.fail(f'--tta: config has no {key}')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def flipped(pipeline):
    """A detector's test pipeline that gives each image plain and flipped.

    The true boxes are loaded after the flip, so that they fit the image as it
    is; and then comes the last step, which packs the image.
    """
    steps = copy.deepcopy(pipeline[:-1])
    truth = [step for step in steps if 'Annotations' in str(step['type'])]
    pack = copy.deepcopy(pipeline[-1])
    pack.meta_keys = (
        *('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        *('flip', 'flip_direction'),
    )
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    after = [[step] for step in (*truth, pack)]
    both = dict(type='TestTimeAug', transforms=[flips, *after])
    return [*(step for step in steps if step not in truth), both]


def main():
    args = parse_args()
    cfg = _cli.load_config(
        args, 'model', 'test_dataloader', 'test_cfg', 'test_evaluator'
    )
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        use_tta(cfg)
    _data.check_data(cfg, 'test')
    if args.out:
        keep_predictions(cfg, args.out)
    model = _cli.build_model(cfg)
    checkpoint = _checkpoints.load(args.checkpoint)
    _checkpoints.check_weights(model, args.checkpoint, checkpoint)

    runner = _cli.build_runner(cfg)
    with _data.guarded(runner, 'test'):
        runner.test()


if __name__ == '__main__':
    main()
