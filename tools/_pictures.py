"""The pictures that test.py draws: predictions beside the truth."""

import os
import os.path as osp
import time

import mmcv
import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image

from mmcarafe.visualization.comparison import (
    Objects,
    compare_maps,
    compare_objects,
)


@HOOKS.register_module()
class ComparisonHook(Hook):
    """Draws test images, with prediction, truth and errors side by side.

    Samples of another kind than boxes, instance masks and semantic maps are
    drawn by the run's own visualizer. Every process draws what it predicts.

    Args:
        out_dir (str, optional): folder in WORK_DIR/TIMESTAMP for the pictures,
            which are named like the images: STEM.jpg.
        interval (int): draw every n-th batch.
        score_thr (float): draw boxes with a higher score.
        show (bool): show each picture in a window.
        wait_time (float): for how many seconds.
        backend_args (dict, optional): of mmengine's file backend that reads
            the images.
    """

    def __init__(
        self,
        out_dir=None,
        interval=1,
        score_thr=0.3,
        show=False,
        wait_time=0.0,
        backend_args=None,
    ):
        self.out_dir = out_dir
        self.interval = interval
        self.score_thr = score_thr
        self.show = show
        self.wait_time = wait_time
        self.backend_args = backend_args

    def before_test(self, runner):
        self.folder = None
        if self.out_dir:
            self.folder = osp.join(
                runner.work_dir, runner.timestamp, self.out_dir
            )
            os.makedirs(self.folder, exist_ok=True)
        self.drawn, self.seconds = {}, 0.0

    def after_test_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        if not self.every_n_inner_iters(batch_idx, self.interval):
            return
        start = time.perf_counter()
        for sample in outputs:
            self._draw(runner, sample)
        self.seconds += time.perf_counter() - start

    def after_test(self, runner):
        counts = torch.tensor([len(self.drawn), self.seconds])
        all_reduce(counts)
        number, seconds = counts.tolist()
        total = len(runner.test_loop.dataloader.dataset)
        number = min(number, total)  # processes may share the last image
        text = f'{number:.0f} of {total} images are drawn in {seconds:.1f} s'
        if self.folder:
            text += f', into {self.folder}'
        if self.interval > 1:
            text += (
                f' (default_hooks.visualization.interval={self.interval}: '
                'one batch in that many)'
            )
        runner.logger.info(text)

    def _draw(self, runner, sample):
        path = sample.img_path
        image = mmcv.imfrombytes(
            get(path, backend_args=self.backend_args), channel_order='rgb'
        )
        name = osp.basename(path)
        file = self._file(path)
        meta = runner.test_loop.dataloader.dataset.metainfo
        sheet = compare(image, sample, meta, self.score_thr, name)
        if sheet is None:
            options = {}
            if 'pred_panoptic_seg' in sample:
                options['pred_score_thr'] = self.score_thr
            runner.visualizer.add_datasample(
                name,
                image,
                sample,
                show=self.show,
                wait_time=self.wait_time,
                out_file=file,
                **options,
            )
            return
        if file:
            Image.fromarray(sheet).save(file, quality=90, subsampling=0)
        if self.show:
            runner.visualizer.show(
                sheet, win_name=name, wait_time=self.wait_time
            )

    def _file(self, path):
        """A name of its own for each image, also if stems are equal."""
        stem = osp.splitext(osp.basename(path))[0]
        taken = self.drawn.values()
        name, number = stem, 1
        while self.drawn.get(path) is None and name in taken:
            number += 1
            name = f'{stem}_{number}'
        self.drawn.setdefault(path, name)
        if self.folder is None:
            return None
        return osp.join(self.folder, f'{self.drawn[path]}.jpg')


def compare(image, sample, meta, score_thr, title):
    """Draw a data sample; None if it is of a kind that this cannot draw.

    Args:
        image (ndarray[H, W, 3]): red, green, blue from 0 to 255.
        sample (DetDataSample | SegDataSample): with a prediction.
        meta (dict): the data set's, with ``classes`` and ``palette``.
        score_thr (float): boxes with a higher score are drawn.
        title (str): above the picture.
    """
    options = dict(
        classes=meta.get('classes'), palette=meta.get('palette'), title=title
    )
    if 'pred_panoptic_seg' in sample:
        return None
    if 'bboxes' in sample.get('pred_instances', ()):
        return compare_objects(
            image,
            objects_of(sample.pred_instances),
            objects_of(sample.get('gt_instances')),
            score_threshold=score_thr,
            crowds=objects_of(sample.get('ignored_instances')),
            **options,
        )
    if 'pred_sem_seg' in sample:
        return compare_maps(
            image,
            map_of(sample.pred_sem_seg),
            map_of(sample.get('gt_sem_seg')),
            **options,
        )
    return None


def objects_of(instances):
    """mmdet's instances as :class:`Objects`; None if there are none."""
    if instances is None or 'bboxes' not in instances:
        return None
    boxes = instances.bboxes
    boxes = _array(getattr(boxes, 'tensor', boxes)).reshape(-1, 4)
    masks = instances.get('masks')
    if hasattr(masks, 'to_ndarray'):
        masks = masks.to_ndarray()
    if masks is not None:
        masks = _array(masks).astype(bool)
        if not boxes.any():  # SOLO predicts masks alone
            boxes = np.array([_around(mask) for mask in masks]).reshape(-1, 4)
    return Objects(
        boxes.astype(float),
        _array(instances.labels).astype(int),
        _array(instances.get('scores')),
        masks,
    )


def _around(mask):
    """Left, top, right and bottom of a mask."""
    rows, columns = mask.nonzero()
    if not len(rows):
        return 0, 0, 0, 0
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def map_of(pixels):
    """mmseg's map as ``ndarray[H, W]``; None if there is none."""
    return None if pixels is None else _array(pixels.data)[0].astype(int)


def _array(values):
    if torch.is_tensor(values):
        if values.is_floating_point():  # numpy has no bf16
            values = values.float()
        return values.detach().cpu().numpy()
    return None if values is None else np.asarray(values)
