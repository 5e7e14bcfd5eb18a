"""Pictures of predictions beside the truth."""

import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, save_untrained

from mmcarafe.visualization import comparison
from mmcarafe.visualization.comparison import (
    CONFUSED,
    INVENTED,
    MATCHED,
    MISSED,
    Classes,
    Layout,
    Objects,
    compare_maps,
    compare_objects,
    map_panels,
    match,
    object_panels,
)

NAMES = ('disk', 'ring')
RED, GREEN = (250, 0, 0), (0, 250, 0)
IMAGE = np.full((60, 80, 3), 128, np.uint8)


def objects(*rows, scores=None):
    """From (left, top, right, bottom, label) each."""
    rows = np.array(rows, float).reshape(-1, 5)
    if scores is not None:
        scores = np.array(scores, float)
    return Objects(rows[:, :4], rows[:, 4].astype(int), scores)


def panels_of(found, truth=None, crowds=None, threshold=0.3, names=NAMES):
    kinds = Classes(names, [RED, GREEN])
    size = IMAGE.shape[1::-1]
    return object_panels(
        IMAGE, found, truth, kinds, threshold, crowds, size, 1
    )


def texts(legend):
    return {name: [key.text for key in keys] for name, keys in legend}


# Objects


def test_the_surest_chooses_first():
    """The best overlap of its class; a second box of an object is left."""
    truth = objects([0, 0, 10, 10, 0], [0, 0, 10, 12, 1])
    found = objects(
        [0, 0, 10, 9, 0],
        [0, 0, 10, 10, 0],
        [0, 0, 10, 4, 1],
        scores=[0.5, 0.9, 0.8],
    )
    partner, right = match(found, truth)
    # the first one's object is taken; it is confused with the ring, though
    assert partner.tolist() == [1, 0, -1]
    assert right.tolist() == [False, True, False]
    # its own class comes first, although the ring overlaps it more
    partner, right = match(objects([0, 0, 10, 12, 0], scores=[1]), truth)
    assert partner.tolist() == [0] and right.all()


def test_iou_of_the_threshold_matches():
    truth = objects([0, 0, 10, 10, 0])
    for height, found in ((5, 0), (4.99, -1)):
        partner, _ = match(objects([0, 0, 10, height, 0], scores=[1]), truth)
        assert partner.tolist() == [found]


def test_errors_of_boxes():
    truth = objects(
        [2, 20, 22, 40, 0], [30, 20, 50, 40, 0], [55, 45, 70, 55, 1]
    )
    found = objects(
        [2, 20, 22, 41, 0],
        [30, 20, 50, 41, 1],
        [60, 2, 75, 17, 1],
        [0, 0, 79, 59, 1],
        scores=[0.9, 0.8, 0.7, 0.3],
    )
    panels, legend = panels_of(found, truth)
    headings = [panel.heading for panel in panels]
    assert headings == [
        'Truth: 3 objects',
        'Prediction: 3 boxes above 0.3',
        'Errors',
    ]
    assert texts(legend)['Boxes at IoU 0.5'] == [
        '1 matched',
        '1 missed',
        '1 false or double',
        '1 of a wrong class',
    ]
    assert texts(legend)['Classes'] == ['disk', 'ring']
    truth_panel, prediction, errors = (panel.picture for panel in panels)
    assert tuple(truth_panel[30, 2]) == RED
    assert tuple(truth_panel[50, 55]) == GREEN
    assert tuple(prediction[30, 30]) == GREEN
    assert tuple(errors[35, 2]) == MATCHED
    assert tuple(errors[35, 30]) == CONFUSED
    assert tuple(errors[10, 60]) == INVENTED
    assert (errors[44:57, 54:72] == MISSED).all(-1).any()
    assert not (errors[44:57, 54:72] == INVENTED).all(-1).any()


def test_boxes_in_a_crowd_are_not_judged():
    crowds = objects([0, 0, 40, 40, 0])
    found = objects([5, 5, 20, 20, 0], [5, 5, 20, 20, 1], scores=[0.9, 0.8])
    _, legend = panels_of(found, objects(), crowds)
    assert texts(legend)['Boxes at IoU 0.5'] == [
        '0 matched',
        '0 missed',
        '1 false or double',
        '0 of a wrong class',
        '1 in a crowd, not judged',
    ]


@pytest.mark.parametrize('scores', [[], [0.2]])
def test_no_box_is_said_in_words(scores, monkeypatch):
    said = []
    monkeypatch.setattr(
        comparison, '_write_across', lambda _, text, scale: said.append(text)
    )
    found = objects(*[[0, 0, 9, 9, 0]] * len(scores), scores=scores)
    panels, legend = panels_of(found, objects(), threshold=0.25)
    highest = '\nthe highest score is 0.2' if scores else ''
    assert said == [f'no box above 0.25{highest}', 'no object']
    assert panels[1].heading == 'Prediction: 0 boxes above 0.25'
    assert texts(legend)['Classes'] == ['none']


def test_words_are_written_across(monkeypatch):
    panels, _ = panels_of(objects(scores=[]))
    assert len(panels) == 1  # without truth, nothing is wrong
    assert (panels[0].picture[30] == 255).any()
    assert (panels[0].picture == IMAGE)[:10].all()


def test_labels_do_not_overlap(monkeypatch):
    """Each is where no other is, or is left out."""
    drawn = []
    real = comparison.ImageDraw.Draw

    def spy(picture):
        draw = real(picture)
        text = draw.text
        draw.text = lambda at, words, **more: (
            drawn.append(draw.textbbox(at, words, more['font'], anchor='lm')),
            text(at, words, **more),
        )
        return draw

    monkeypatch.setattr(comparison.ImageDraw, 'Draw', spy)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (30, 2))
    boxes = np.concatenate([corner, corner + 40], 1)
    found = Objects(boxes, np.zeros(30, int), np.linspace(0.99, 0.5, 30))
    image = np.zeros((340, 340, 3), np.uint8)
    kinds = Classes(NAMES, None)
    _, legend = object_panels(
        image, found, None, kinds, 0, None, (340,) * 2, 1
    )
    assert 10 < len(drawn) < 30
    assert 'labels are left out' in texts(legend)[''][0]
    for i, (left, top, right, bottom) in enumerate(drawn):
        assert left >= 0 and top >= 0 and right <= 340 and bottom <= 340
        for other in drawn[:i]:
            apart = left >= other[2] or other[0] >= right
            assert apart or top >= other[3] or other[1] >= bottom


def test_masks_are_painted():
    mask = np.zeros((1, 60, 80), bool)
    mask[:, 20:40, 20:60] = True
    truth = objects([20, 20, 60, 40, 0])
    truth.masks = mask
    found = objects([20, 20, 60, 40, 0], scores=[0.9])
    found.masks = mask
    panels, _ = panels_of(found, truth)
    for panel, color in zip(panels, (RED, RED, MATCHED)):
        inside = panel.picture[30, 40].astype(int)
        base = panel.picture[50, 70].astype(int)
        expected = 0.6 * base + 0.4 * np.array(color)
        assert np.abs(inside - expected).max() <= 1


def test_scores_are_needed():
    with pytest.raises(ValueError, match='found.scores is None, expected'):
        compare_objects(IMAGE, objects())


# Semantic maps


def map_errors(found, truth, names, scale=1):
    kinds = Classes(names, [(0, 0, 0), RED, GREEN])
    size = IMAGE.shape[1::-1]
    return map_panels(IMAGE, found, truth, kinds, size, scale)


def test_errors_of_maps():
    """Quarters: right, missed, invented, of another class; a row ignored."""
    truth = np.zeros((60, 80), int)
    found = np.zeros((60, 80), int)
    truth[:, 20:40] = 1
    found[:, 40:60] = 2
    truth[:, 60:], found[:, 60:] = 1, 2
    truth[:6] = 255
    panels, legend = map_errors(found, truth, ('background', *NAMES))
    truth_panel, prediction, errors = (panel.picture for panel in panels)
    assert panels[2].heading == 'Errors: 75.0% of the pixels'
    assert texts(legend) == {
        'Classes': ['background (not painted)', 'ring', 'disk'],
        'Errors': [
            'missed 25.0%',
            'invented 25.0%',
            'wrong class 25.0%',
            'not labelled, not judged',
        ],
    }
    assert np.ptp(truth_panel[30, 10]) == 0  # grey
    assert truth_panel[30, 30, 0] > truth_panel[30, 30, 1] + 99
    assert prediction[30, 50, 1] > prediction[30, 50, 0] + 99
    assert np.ptp(errors[30, 10]) == 0
    for column, color in ((30, MISSED), (50, INVENTED), (70, CONFUSED)):
        far = np.abs(errors[30, column].astype(int) - color).max()
        assert far < 0.21 * 255
    assert np.ptp(errors[:5].astype(int), -1).max() == 0


def test_without_background_there_are_only_wrong_classes():
    truth = np.zeros((60, 80), int)
    found = np.full((60, 80), 1)
    _, legend = map_errors(found, truth, ('wall', 'sky'))
    assert texts(legend)['Errors'] == ['wrong class 100.0%']


def test_two_classes_are_not_confused():
    truth = np.zeros((60, 80), int)
    _, legend = map_errors(truth, truth, ('background', 'nucleus'))
    assert texts(legend)['Errors'] == ['missed 0.0%', 'invented 0.0%']


def test_legend_of_many_classes():
    names = [f'name {i}' for i in range(150)]
    truth = np.arange(4800).reshape(60, 80) % 150
    _, legend = map_errors(truth, truth, names)
    assert len(legend[0][1]) == 25
    assert legend[0][1][-1].text == 'and 126 more'
    _, legend = map_errors(truth * 0 + 7, truth * 0 + 7, names)
    assert texts(legend)['Classes'] == ['name 7']


def test_truth_of_another_size():
    found = np.zeros((60, 80), int)
    found[:, 40:] = 1
    panels, _ = map_errors(found, found[::2, ::2], ('a', 'b'))
    assert panels[2].heading == 'Errors: 0.0% of the pixels'


# Sheets


@pytest.mark.parametrize(
    ('size', 'columns'),
    [
        ((320, 320), 2),
        ((480, 640), 2),
        ((3000, 4000), 2),
        ((20, 20), 2),
        ((900, 100), 4),
        ((100, 900), 1),
        ((1, 500), 1),
    ],
    ids=str,
)
def test_every_size_fits_the_page(size, columns):
    image = np.zeros((*size, 3), np.uint8)
    layout = Layout(image, 4)
    assert layout.columns == columns
    found = objects([0, 0, size[1], size[0], 0], scores=[0.9])
    labels = np.zeros(size, int)
    for sheet in (
        compare_objects(image, found, found, title='x' * 300),
        compare_maps(image, labels, labels, title='image.jpg'),
    ):
        assert 880 <= sheet.shape[1] <= 1760
        assert sheet.shape[0] <= 1.6 * sheet.shape[1]
        # nothing sticks out
        assert (sheet[:, -5:] == 255).all() and (sheet[-2:] == 255).all()


def test_without_truth_two_panels_are_drawn():
    layout = Layout(IMAGE, 2)
    assert layout.columns == 2
    labels = np.zeros((60, 80), int)
    half, whole = (
        compare_maps(IMAGE, labels, truth) for truth in (None, labels)
    )
    assert 0.4 < half.shape[0] / whole.shape[0] < 0.6


def test_images_of_other_shapes_are_refused():
    for shape in ((60, 80), (60, 80, 4), (0, 80, 3)):
        with pytest.raises(ValueError, match='image has shape .* expected'):
            compare_maps(np.zeros(shape, np.uint8), np.zeros((60, 80), int))


def test_images_of_other_numbers_are_refused():
    with pytest.raises(ValueError, match='dtype float64, expected uint8'):
        compare_maps(np.zeros((60, 80, 3)), np.zeros((60, 80), int))


def test_what_is_no_class_is_ignored():
    """Without names, every number but 255 and those below 0 is a class."""
    found, truth = np.zeros((2, 60, 80), int)
    truth[:, :20], truth[:, 20:40], truth[:, 40:50] = 255, -1, 3
    panels, legend = map_errors(found, truth, None)
    assert panels[2].heading == 'Errors: 25.0% of the pixels'
    assert 'class 3' in texts(legend)['Classes']


# What mmdet's and mmseg's samples hold


@pytest.fixture(scope='module')
def pictures():
    for name in ('mmdet', 'mmseg', 'mmcv'):
        pytest.importorskip(name, reason=f'{name} is not installed')
    return import_module('_pictures')


def test_instances_of_mmdet(pictures):
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = np.ones((1, 6, 8), np.uint8)
    boxes = torch.tensor([[1.0, 2, 3, 4]])
    found = pictures.objects_of(
        InstanceData(
            bboxes=HorizontalBoxes(boxes),
            labels=torch.tensor([3]),
            scores=torch.tensor([0.5]).bfloat16(),
            masks=BitmapMasks(masks, 6, 8),
        )
    )
    assert found.boxes.tolist() == boxes.tolist()
    assert found.labels.tolist() == [3] and found.scores.tolist() == [0.5]
    assert found.masks.dtype == bool and found.masks.shape == (1, 6, 8)
    assert pictures.objects_of(None) is None


def test_masks_without_boxes(pictures):
    """As SOLO predicts them."""
    from mmengine.structures import InstanceData

    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 4:7] = True
    found = pictures.objects_of(
        InstanceData(
            bboxes=torch.zeros(2, 4), labels=torch.tensor([0, 1]), masks=masks
        )
    )
    assert found.boxes.tolist() == [[4, 1, 7, 3], [0, 0, 0, 0]]


def test_other_kinds_are_left_to_the_visualizer(pictures, tmp_path):
    """Panoptic maps and depth, and the message counts them, too."""
    import cv2
    from mmdet.structures import DetDataSample
    from mmengine.structures import PixelData

    cv2.imwrite(str(tmp_path / 'a.png'), IMAGE)
    calls, lines = [], []
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        timestamp='now',
        visualizer=SimpleNamespace(
            add_datasample=lambda *args, **more: calls.append(more)
        ),
        logger=SimpleNamespace(info=lines.append),
        test_loop=SimpleNamespace(
            dataloader=SimpleNamespace(dataset=Dataset())
        ),
    )
    hook = pictures.ComparisonHook('pictures', interval=2)
    hook.before_test(runner)
    sample = DetDataSample(
        metainfo=dict(img_path=str(tmp_path / 'a.png')),
        pred_panoptic_seg=PixelData(data=torch.zeros(1, 60, 80)),
    )
    for index in range(2):
        hook.after_test_iter(runner, index, None, [sample])
    hook.after_test(runner)
    (call,) = calls
    assert call['out_file'] == str(tmp_path / 'now/pictures/a.jpg')
    assert call['pred_score_thr'] == 0.3
    assert lines[0].startswith('1 of 3 images are drawn in ')
    assert lines[0].endswith('interval=2: one batch in that many)')


class Dataset:
    metainfo = {}

    def __len__(self):
        return 3


def test_equal_names_are_told_apart(pictures):
    hook = pictures.ComparisonHook('x')
    hook.folder, hook.drawn = 'x', {}
    files = [hook._file(p) for p in ('a/1.png', 'b/1.jpg', 'a/1.png', 'c/2')]
    assert files == ['x/1.jpg', 'x/1_2.jpg', 'x/1.jpg', 'x/2.jpg']


def test_options_of_the_hosts_are_kept(pictures):
    from mmengine.config import Config

    tool = import_module('test')
    hook = dict(type='SegVisualizationHook', interval=3, backend_args=None)
    cfg = Config(dict(default_hooks=dict(visualization=hook)))
    args = SimpleNamespace(show=False, show_dir='p', wait_time=2)
    tool.draw(cfg, args)
    assert cfg.default_hooks.visualization == dict(
        type='mmengine.ComparisonHook',
        interval=3,
        backend_args=None,
        out_dir='p',
        show=False,
        wait_time=2,
    )
    from mmdet.engine.hooks import DetVisualizationHook

    cfg.default_hooks.visualization = dict(type=DetVisualizationHook)
    tool.draw(cfg, args)
    assert cfg.default_hooks.visualization.type == 'mmengine.ComparisonHook'
    cfg.default_hooks.visualization = dict(type='TrackVisualizationHook')
    tool.draw(cfg, args)
    assert cfg.default_hooks.visualization == dict(
        type='TrackVisualizationHook',
        draw=True,
        show=False,
        wait_time=2,
        test_out_dir='p',
    )


def test_flipped_images_keep_their_truth(pictures):
    """It is loaded after the flip, which it would take part in otherwise."""
    from mmengine.config import ConfigDict

    steps = ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'Pack']
    steps = [ConfigDict(type=step) for step in steps]
    flipped = import_module('test').flipped(steps)
    assert [step['type'] for step in flipped] == [
        'LoadImageFromFile',
        'Resize',
        'TestTimeAug',
    ]
    inner = [
        [step['type'] for step in each] for each in flipped[2]['transforms']
    ]
    assert inner == [['RandomFlip'] * 2, ['LoadAnnotations'], ['Pack']]


# The contact sheet


SHAPES = 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
SEGMENTOR = 'configs/shapes/upernet-carafe_r18_shapes.py'
NEAREST = 'configs/shapes/faster-rcnn_r18_fpn-nearest_shapes.py'


@pytest.fixture(scope='module')
def tool(pictures):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/analysis')
        yield import_module('contact_sheet')


@pytest.fixture(scope='module')
def data(pictures, tmp_path_factory):
    """Three small test images, and untrained models."""
    folder = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/dataset_converters')
        import_module('shapes').make_shapes(
            folder / 'shapes', train=1, val=3, size=64
        )
    for config in (SHAPES, SEGMENTOR, NEAREST):
        save_untrained(config, folder)
    return folder


def run(tool, monkeypatch, data, config, *arguments):
    words = [config, data / f'{Path(config).stem}.pth', *arguments]
    words += ['--data-root', data / 'shapes']
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['', *map(str, words)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmseg's, about its losses
        tool.main()


@pytest.mark.parametrize(
    ('config', 'kernels'),
    [(SHAPES, True), (SEGMENTOR, True), (NEAREST, False)],
    ids=lambda value: Path(value).stem if isinstance(value, str) else '',
)
def test_contact_sheet(
    tool, data, config, kernels, tmp_path, monkeypatch, capsys
):
    pages = []
    real = tool.compose
    monkeypatch.setattr(
        tool, 'compose', lambda *page: pages.append(page) or real(*page)
    )
    out = tmp_path / 'new/sheet.png'
    run(tool, monkeypatch, data, config, '--images', '2', '--out', out)
    assert capsys.readouterr().out.endswith(f'wrote {out}\n')
    with tool.Image.open(out) as sheet:
        assert sheet.width == 2 * 880  # sharp at 880 pixels
    ((title, rows, legend, _),) = pages
    assert title.endswith(': 2 of 3 test images')
    assert len(rows) == 2
    for row in rows:
        headings = [panel.heading for panel in row]
        assert headings[0].startswith('Truth')
        assert headings[1].startswith('Prediction')
        assert headings[2].startswith('Errors')
        assert headings[3:] == (
            ['Image, point, windows', 'Kernels'] if kernels else []
        )
        widths = [panel.picture.shape[1] for panel in row]
        assert sum(widths) + 16 * (len(row) - 1) <= 2 * 860
    assert ('Kernels' in dict(legend)) == kernels


def test_contact_sheet_of_all_images(tool, data, tmp_path, monkeypatch):
    """Each of them once."""
    indices = []
    real = tool.row

    def row(model, dataset, index, score_thr):
        indices.append(index)
        return real(model, dataset, index, score_thr)

    monkeypatch.setattr(tool, 'row', row)
    run(tool, monkeypatch, data, NEAREST, '--out', tmp_path / 'x.png')
    assert indices == [0, 1, 2]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--images', '0'], '--images: expected at least 1, got 0'),
        (['--out', 'x.bmp'], '--out: expected a .png or .jpg file, got x.bmp'),
    ],
    ids=['images', 'out'],
)
def test_contact_sheet_names_mistakes(
    tool, data, arguments, message, monkeypatch
):
    with pytest.raises(SystemExit, match=f'^error: {message}$'):
        run(tool, monkeypatch, data, SHAPES, *arguments)
