"""Segmentors as users meet them: trained, evaluated, and asked for a picture.

The detector's side of mmdet's own inference is here too.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmcarafe import checkpoint

pytest.importorskip('mmseg')
from mmseg.apis import (  # noqa: E402
    inference_model,
    init_model,
    show_result_pyplot,
)

# Warnings of mmseg and mmdet when they build a model, or draw without a folder
# to save in
pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would be deprecated'),
    pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore`` is False'),
    pytest.mark.filterwarnings('ignore:Failed to add .*LocalVisBackend'),
]

ADE20K = 'configs/upernet/upernet-carafe_r50_4xb4-80k_ade20k-512x512.py'
SEGMENTOR = 'configs/shapes/upernet-carafe_r18_shapes.py'
BASELINE = 'configs/shapes/upernet_r18_shapes.py'
DETECTOR = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'


checkpoint.enable()  # for mmseg's own functions, on every torch


def execute(*command):
    """Run one of the tools; return what it printed."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def data_options(root):
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        yield f'{loader}.dataset.data_root={root}/'
        yield f'{loader}.num_workers=0'
        yield f'{loader}.persistent_workers=False'


def checkpoint_of(work_dir):
    return (work_dir / 'last_checkpoint').read_text()


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'shapes'
    tool = 'tools/dataset_converters/shapes.py'
    execute(tool, root, '--train', 4, '--val', 2, '--size', 97)
    return root


@pytest.fixture(scope='module')
def segmentor(shapes, tmp_path_factory):
    """Config and checkpoint of a segmentor after two iterations."""
    work_dir = tmp_path_factory.mktemp('segmentor')
    execute(
        *('tools/train.py', SEGMENTOR, '--work-dir', work_dir),
        *(
            '--cfg-options',
            'train_cfg.max_iters=2',
            'train_cfg.val_interval=2',
        ),
        *('train_dataloader.batch_size=2', *data_options(shapes)),
    )
    return Config.fromfile(ROOT / SEGMENTOR), checkpoint_of(work_dir)


def test_genuine_ade20k(real_data, tmp_path):
    """Trained on small crops, tested on whole images of odd sizes."""
    cfg = Config.fromfile(ROOT / ADE20K)
    assert cfg.val_dataloader.dataset.type == 'ADE20KDataset'
    assert cfg.val_evaluator.type == 'IoUMetric'
    options = [
        'model.pretrained=None',
        'model.data_preprocessor.size=(97,131)',
        'train_dataloader.dataset.pipeline.3.crop_size=(97,131)',
        'train_dataloader.batch_size=2',
        *data_options(real_data / 'ade20k_samples'),
    ]
    output = execute(
        *('tools/train.py', ADE20K, '--work-dir', tmp_path, '--cfg-options'),
        *('train_cfg.max_iters=3', 'train_cfg.val_interval=3'),
        *('default_hooks.logger.interval=1', *options),
    )
    losses = re.findall(r'Iter\(train\).* loss: ([\d.]+)', output)
    assert len(losses) == 3
    assert all(0 < float(loss) < 20 for loss in losses)

    checkpoint = checkpoint_of(tmp_path)
    tested = execute(
        *('tools/test.py', ADE20K, checkpoint, '--work-dir', tmp_path),
        *('--out', tmp_path / 'maps', '--cfg-options', *options),
    )
    scores = r'aAcc: ([\d.]+)  mIoU: ([\d.]+)  mAcc: ([\d.]+)'
    assert re.findall(scores, tested)
    assert re.findall(scores, tested) == re.findall(scores, output)

    # 300×400 in the file, 512×683 in the network
    (image,) = (real_data / 'ade20k_samples/images/validation').iterdir()
    model = init_model(cfg, checkpoint, 'cpu')
    result = inference_model(model, str(image)).pred_sem_seg.data
    assert result.shape == (1, 300, 400)
    import cv2

    written = cv2.imread(str(tmp_path / 'maps' / f'{image.stem}.png'), -1)
    # IoUMetric writes ADE20K's own numbers, which begin at 1.
    np.testing.assert_array_equal(written, result[0].numpy() + 1)


def test_mmsegs_inference(segmentor, shapes, tmp_path):
    cfg, checkpoint = segmentor
    model = init_model(cfg, checkpoint, 'cpu')
    image = str(next((shapes / 'images/validation').iterdir()))
    result = inference_model(model, image)
    assert result.seg_logits.data.shape == (7, 97, 97)
    assert len(model.dataset_meta['classes']) == 7

    picture = tmp_path / 'picture.png'
    drawn = show_result_pyplot(
        model, image, result, show=False, draw_gt=False, out_file=str(picture)
    )
    assert drawn.shape == (97, 97, 3)
    assert picture.stat().st_size > 1000


def test_shared_weights_of_a_checkpoint_load_into_the_twin(segmentor):
    """So that both can start from equal weights: load_from=CHECKPOINT."""
    _, checkpoint = segmentor
    twin = init_model(ROOT / BASELINE, device='cpu')
    state = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')['state_dict']
    assert set(twin.state_dict()) < set(state)


def test_mmdets_inferencer(shapes, tmp_path):
    apis = pytest.importorskip('mmdet.apis')
    execute(
        *('tools/train.py', DETECTOR, '--work-dir', tmp_path),
        *('--cfg-options', 'train_cfg.max_epochs=1', 'val_evaluator=None'),
        *('val_dataloader=None', 'val_cfg=None', 'test_evaluator=None'),
        *('test_dataloader=None', 'test_cfg=None'),
        f'train_dataloader.dataset.data_root={shapes}/',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
    )
    checkpoint = checkpoint_of(tmp_path)
    inferencer = apis.DetInferencer(
        str(ROOT / DETECTOR), checkpoint, device='cpu', show_progress=False
    )
    image = str(next((shapes / 'images/validation').iterdir()))
    result = inferencer(image, pred_score_thr=0, out_dir=str(tmp_path))
    (prediction,) = result['predictions']
    boxes = np.array(prediction['bboxes']).reshape(-1, 4)
    assert len(boxes) == len(prediction['scores']) > 0
    assert (boxes >= 0).all() and (boxes <= 97).all()
    assert list((tmp_path / 'vis').iterdir())
