"""Boundary IoU of semantic maps. See :class:`BoundaryIoUMetric`."""

import math

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric

from mmcarafe.registry import METRICS


@METRICS.register_module()
class BoundaryIoUMetric(BaseMetric):
    """IoU of the bands along the classes' boundaries, for semantic maps.

    Boundary IoU of Cheng et al., `Boundary IoU: Improving Object-Centric
    Image Segmentation Evaluation <https://arxiv.org/abs/2103.16562>`_ (CVPR
    2021). The band of a class is its mask minus the mask's erosion by a
    square of 2*d + 1 pixels, as in the authors' code: the pixels of the class
    from which at most d steps, diagonal ones too, lead out of the class or
    out of the image. The IoU compares the band in the truth with the band in
    the prediction; intersections and unions are summed over the data set for
    each class.

    A pixel that the truth ignores belongs to no band and makes no boundary,
    neither in the truth nor in the prediction: the erosion treats it as if it
    had the class of whatever is beside it. What is predicted there does not
    change the result, and a prediction that is right everywhere else scores
    100.

    Args:
        width (int, optional): d in pixels.
        share (float): where ``width`` is None, d as a share of the image's
            diagonal, rounded to whole pixels, at least one. The authors use
            0.02 for instances.
        ignore_index (int): the truth's label of ignored pixels.
        classwise (bool): report each class too, as ``IoU_NAME``.
        **kwargs: see mmengine's ``BaseMetric``.

    The result, in percent, is ``boundary/mIoU``, the mean over the classes
    that have a band in the truth or in a prediction. A class with neither is
    NaN and left out of the mean.

    Raises:
        TypeError, ValueError: an argument is wrong; a truth and a prediction
            differ in size, or one holds a label that is not a class.
    """

    default_prefix = 'boundary'

    def __init__(
        self,
        width=None,
        share=0.02,
        ignore_index=255,
        classwise=False,
        **kwargs,
    ):
        if width is not None:
            if isinstance(width, bool) or not isinstance(width, int):
                raise TypeError(
                    f'width is {width!r}, expected a number of pixels, an int'
                )
            if width < 1:
                raise ValueError(f'width is {width}, expected at least 1')
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f'share is {share!r}, expected a float')
        if not 0 < share <= 1:
            raise ValueError(
                f'share is {share}, expected more than 0 and at most 1'
            )
        super().__init__(**kwargs)
        self.width = width
        self.share = share
        self.ignore_index = ignore_index
        self.classwise = classwise

    def process(self, data_batch, data_samples) -> None:
        """Count the bands' pixels of each image.

        Args:
            data_batch: unused.
            data_samples (Sequence[dict]): with ``pred_sem_seg`` and
                ``gt_sem_seg``, whose ``data`` are ``Tensor[1, H, W]``.
        """
        for sample in data_samples:
            truth, prediction = (
                sample[key]['data'][0].cpu().numpy()
                for key in ('gt_sem_seg', 'pred_sem_seg')
            )
            self.results.append(self._count(truth, prediction))

    def compute_metrics(self, results) -> dict:
        """The scores of what :meth:`process` counted."""
        intersection, union = np.sum(results, axis=0)
        iou = np.full(union.shape, np.nan)
        np.divide(100.0 * intersection, union, out=iou, where=union > 0)
        present = iou[union > 0]
        scores = {'mIoU': present.mean() if present.size else math.nan}
        if self.classwise:
            names = self.dataset_meta['classes']
            scores.update((f'IoU_{n}', x) for n, x in zip(names, iou))
        return {key: float(value) for key, value in scores.items()}

    def _count(self, truth, prediction):
        """Intersection and union of the bands, int64 [2, classes]."""
        if truth.shape != prediction.shape:
            raise ValueError(
                f'prediction is {prediction.shape} pixels large, expected '
                f"the truth's {truth.shape}"
            )
        valid = truth != self.ignore_index
        classes = len(self.dataset_meta['classes'])
        for name, labels in (('truth', truth), ('prediction', prediction)):
            wrong = labels[valid & ((labels < 0) | (labels >= classes))]
            if wrong.size:
                raise ValueError(
                    f'{name} holds label {wrong[0]}, expected 0 to '
                    f'{classes - 1} or ignore_index = {self.ignore_index}'
                )
        width = self.width
        if width is None:
            width = max(1, round(self.share * math.hypot(*truth.shape)))
        bands = [_band(x, valid, width) for x in (truth, prediction)]
        both = bands[0] & bands[1] & (truth == prediction)
        intersection, *areas = (
            np.bincount(labels[where], minlength=classes)
            for labels, where in (
                (truth, both),
                (truth, bands[0]),
                (prediction, bands[1]),
            )
        )
        return np.stack([intersection, sum(areas) - intersection])


def _band(labels, valid, width):
    """Pixels in the band of their own class, for all classes at once.

    Such a pixel sees a smaller or a larger label in the square around it.
    Outside of the image both filters see -1, and ignored pixels never win.
    """
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    around = dict(borderType=cv2.BORDER_CONSTANT, borderValue=-1)
    labels = labels.astype(np.float32)
    least = cv2.erode(np.where(valid, labels, np.inf), square, **around)
    most = cv2.dilate(np.where(valid, labels, -np.inf), square, **around)
    return valid & ((least < labels) | (most > labels))
