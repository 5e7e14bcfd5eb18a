"""The boundary metric against its definition, written out in loops."""

import math

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope

from mmcarafe.evaluation import BoundaryIoUMetric

IGNORED = 255


def score(pairs, classes=3, **arguments):
    """What the metric says of (truth, prediction) maps."""
    metric = BoundaryIoUMetric(classwise=True, **arguments)
    metric.dataset_meta = dict(classes=[str(i) for i in range(classes)])
    for pair in pairs:
        metric.process({}, [sample(*pair)])
    return metric.evaluate(len(pairs))


def sample(truth, prediction):
    return {
        key: dict(data=torch.as_tensor(np.asarray(labels))[None])
        for key, labels in (
            ('gt_sem_seg', truth),
            ('pred_sem_seg', prediction),
        )
    }


def in_band(labels, ignored, y, x, width):
    """Whether width steps or fewer lead to another class or outside."""
    height, columns = labels.shape
    for v in range(y - width, y + width + 1):
        for u in range(x - width, x + width + 1):
            if not (0 <= v < height and 0 <= u < columns):
                return True
            if not ignored[v, u] and labels[v, u] != labels[y, x]:
                return True
    return False


def plain(pairs, width, classes=3):
    """IoU of each class in percent, by Python's own sets."""
    bands = {
        (c, who): set() for c in range(classes) for who in ('truth', 'guess')
    }
    for number, (truth, guess) in enumerate(pairs):
        ignored = truth == IGNORED
        for who, labels in (('truth', truth), ('guess', guess)):
            for y, x in np.ndindex(truth.shape):
                if not ignored[y, x] and in_band(labels, ignored, y, x, width):
                    bands[labels[y, x], who].add((number, y, x))
    scores = []
    for c in range(classes):
        truth, guess = bands[c, 'truth'], bands[c, 'guess']
        union = len(truth | guess)
        scores.append(100 * len(truth & guess) / union if union else math.nan)
    return scores


def blobs(rng, shape, classes):
    """Random maps with areas wider than a band, and single pixels."""
    coarse = rng.integers(classes, size=[-(-n // 5) for n in shape])
    labels = coarse.repeat(5, 0).repeat(5, 1)[: shape[0], : shape[1]]
    noise = rng.random(shape) < 0.03
    return np.where(noise, rng.integers(classes, size=shape), labels)


@pytest.mark.parametrize('width', [1, 2, 4])
@pytest.mark.parametrize('ignore', [False, True], ids=['all', 'ignored'])
@pytest.mark.parametrize(
    'shape',
    [(24, 24), (13, 31), (1, 17), (17, 1), (1, 1), (3, 40)],
    ids=[
        'square',
        'odd',
        'one-row',
        'one-column',
        'one-pixel',
        'narrower-than-two-bands',
    ],
)
def test_equals_the_plain_formulation(shape, ignore, width):
    """Class 2 is only predicted, class 3 occurs nowhere."""
    rng = np.random.default_rng(width)
    pairs = []
    for _ in range(3):
        truth, guess = blobs(rng, shape, 2), blobs(rng, shape, 3)
        guess = np.where(rng.random(shape) < 0.7, truth, guess)
        if ignore:
            # An area and single pixels, where any prediction may stand.
            truth = np.where(rng.random(shape) < 0.1, IGNORED, truth)
            truth[: shape[0] // 3, : shape[1] // 2] = IGNORED
        pairs.append((truth, guess))
    expected = plain(pairs, width, classes=4)
    assert math.isnan(expected[3])
    scores = score(pairs, classes=4, width=width)
    for c, value in enumerate(expected):
        assert scores[f'boundary/IoU_{c}'] == pytest.approx(
            value, rel=0, abs=1e-12, nan_ok=True
        )
    assert scores['boundary/mIoU'] == pytest.approx(
        np.nanmean(expected), rel=0, abs=1e-12, nan_ok=True
    )


def test_a_hand_worked_example():
    """A square of 4 × 4 pixels, predicted one column to the right."""
    truth = np.zeros((10, 10), int)
    truth[3:7, 2:6] = 1
    guess = np.roll(truth, 1, 1)
    # Its band of one pixel has 12 pixels, in both. They share the three of
    # the upper and of the lower edge, and of the columns only (4, 5) and
    # (5, 5), which are no edge of the prediction: none.
    scores = score([(truth, guess)], classes=2, width=1)
    shared = 3 + 3
    assert scores['boundary/IoU_1'] == 100 * shared / (12 + 12 - shared)


@pytest.mark.parametrize('guess', [0, 1, 2])
def test_what_is_predicted_in_ignored_pixels_does_not_matter(guess):
    """They make no boundary, and a right prediction scores 100."""
    truth = np.zeros((9, 9), int)
    truth[:, 6:] = 1
    right = truth.copy()
    truth[2:5, 1:4] = IGNORED
    right[2:5, 1:4] = guess
    scores = score([(truth, right)], width=1)
    assert scores['boundary/IoU_0'] == scores['boundary/IoU_1'] == 100
    assert math.isnan(scores['boundary/IoU_2'])
    # The pixel beside the ignored ones is in no band: a wrong prediction there
    # adds only itself and the pixels that see it.
    alone = np.zeros((9, 9), int)
    alone[3, 3] = IGNORED
    metric = BoundaryIoUMetric(width=1)
    metric.dataset_meta = dict(classes='abc')
    metric.process({}, [sample(alone, np.zeros((9, 9), int))])
    intersection, union = metric.results[0]
    assert intersection[0] == union[0] == 4 * 8  # the image's border alone


def test_nothing_but_ignored_pixels():
    nothing = np.full((4, 5), IGNORED)
    scores = score([(nothing, np.zeros((4, 5), int))], width=2)
    assert all(map(math.isnan, scores.values()))


def test_share_of_the_diagonal():
    """30 × 40: a diagonal of 50; 0.02 of it is one pixel, 0.09 four."""
    rng = np.random.default_rng(0)
    pairs = [(blobs(rng, (30, 40), 3), blobs(rng, (30, 40), 3))]
    assert score(pairs) == score(pairs, width=1)
    assert score(pairs, share=0.09) == score(pairs, width=4)
    assert score(pairs, share=0.001) == score(pairs, width=1)
    assert score(pairs, width=4) != score(pairs, width=1)


def test_the_prefix_finds_it_in_a_config():
    init_default_scope('mmseg')
    evaluator = Evaluator(dict(type='mmcarafe.BoundaryIoUMetric', width=2))
    evaluator.dataset_meta = dict(classes='ab')
    labels = np.eye(6, dtype=int)
    evaluator.process([sample(labels, labels)])
    assert evaluator.evaluate(1) == {'boundary/mIoU': 100}


@pytest.mark.parametrize(
    'arguments, error, message',
    [
        (dict(width=0), ValueError, 'width is 0, expected at least 1'),
        (dict(width=2.0), TypeError, 'width is 2.0, expected a number of'),
        (dict(width=True), TypeError, 'width is True, expected a number of'),
        (dict(share=0), ValueError, 'share is 0, expected more than 0'),
        (dict(share=1.5), ValueError, 'share is 1.5, expected more than 0'),
        (dict(share='2%'), TypeError, "share is '2%', expected a float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BoundaryIoUMetric(**arguments)


@pytest.mark.parametrize(
    'truth, guess, message',
    [
        ([[0, 3]], [[0, 1]], 'truth holds label 3, expected 0 to 2 or ig'),
        ([[0, 1]], [[0, 7]], 'prediction holds label 7, expected 0 to 2'),
        ([[0, 1]], [[0]], r'prediction is \(1, 1\) pixels large, expected'),
    ],
)
def test_bad_maps(truth, guess, message):
    with pytest.raises(ValueError, match=message):
        score([(truth, guess)])
