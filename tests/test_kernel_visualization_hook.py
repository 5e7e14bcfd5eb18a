"""Pictures of the kernels during training, which must not change it."""

import random
import sys

import numpy as np
import pytest
import torch
from _cli import Options
from conftest import ROOT
from test_tools import execute, shapes_options

for _name in ('mmdet', 'matplotlib'):
    pytest.importorskip(_name, reason=f'{_name} is not installed')
from mmengine.config import Config  # noqa: E402
from mmengine.registry import VISBACKENDS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.visualization import BaseVisBackend  # noqa: E402

import mmcarafe  # noqa: E402
from mmcarafe.registry import HOOKS  # noqa: E402
from mmcarafe.visualization.hook import undisturbed  # noqa: E402

DETECTOR = ROOT / 'configs/shapes/faster-rcnn_r18_fpn-carafe_shapes.py'
NEAREST = ROOT / 'configs/shapes/faster-rcnn_r18_fpn-nearest_shapes.py'
PICTURES = {
    f'neck_upsample_modules_{end}'
    for end in ('kernels', 'spread_and_shift', 'features', 'trace')
}


@VISBACKENDS.register_module()
class ListBackend(BaseVisBackend):
    """Keeps the names of what it gets, in place of any other backend."""

    images = []  # of all, as configs are copied

    def __init__(self, **kwargs):
        super().__init__(save_dir='')

    def _init_env(self):
        pass

    experiment = None

    def add_image(self, name, image, step=0, **kwargs):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert image.shape[1] == 2 * 880 and image.std() > 0
        assert image.mean() > 100  # white paper, not a lost alpha
        self.images.append((name, step))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'drawn'
    size = ['--train', '8', '--val', '1', '--size', '96']
    execute('python', 'tools/dataset_converters/shapes.py', root, *size)
    return root


@pytest.fixture
def image(drawn):
    return str(next(drawn.glob('images/training/*.jpg')))


def settings(drawn, hooks):
    """Of a run of four iterations, with what is random in a detector's."""
    cfg = Config.fromfile(DETECTOR)
    words = [word.split('=', 1) for word in shapes_options(drawn)[1:]]
    cfg.merge_from_dict({key: Options.parse(value) for key, value in words})
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = hooks
    return cfg


def train(cfg, folder):
    """The weights at the end of the run."""
    cfg.work_dir = str(folder)
    # two runs in one process must not share what mmengine keeps by name
    cfg.experiment_name = cfg.visualizer.name = str(folder).replace('/', '_')
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner.model.state_dict()


def hook_of(image, **more):
    return dict(type='mmcarafe.KernelVisualizationHook', image=image, **more)


def test_training_is_the_same_and_pictures_go_to_all_backends(
    drawn, image, tmp_path
):
    images = ListBackend.images
    images.clear()
    cfg = settings(drawn, [hook_of(image, interval=3, points=[(40, 25)])])
    cfg.visualizer.vis_backends = [
        dict(type='LocalVisBackend'),
        dict(type='ListBackend'),
    ]
    with_hook = train(cfg, tmp_path / 'with')
    without = train(settings(drawn, []), tmp_path / 'without')
    assert with_hook.keys() == without.keys()
    for name, value in without.items():
        assert torch.equal(value, with_hook[name]), name

    # before the first and after the third of four iterations
    made = {(name, step) for name in PICTURES for step in (0, 3)}
    assert len(images) == len(made) and set(images) == made
    files = (tmp_path / 'with').glob('*/vis_data/vis_image/*.png')
    assert {file.stem for file in files} == {f'{n}_{i}' for n, i in made}


def test_nothing_is_disturbed():
    """Neither the modes, of which some may differ, nor any random numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    model[0].eval()
    numbers = []
    for use in (False, True):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if use:
            with undisturbed(model):
                model.eval()
                random.random(), np.random.rand(), torch.rand(1)
        numbers.append(
            (random.random(), np.random.rand(), torch.rand(1).item())
        )
    assert numbers[0] == numbers[1]
    modes = [module.training for module in model.modules()]
    assert modes == [True, False, True]


def test_the_class_is_found():
    assert mmcarafe.KernelVisualizationHook is HOOKS.get(
        'mmcarafe.KernelVisualizationHook'
    )
    assert 'KernelVisualizationHook' in mmcarafe.__all__


@pytest.mark.parametrize(
    'changes, error, message',
    [
        (dict(interval=1.5), TypeError, 'interval is 1.5, expected an int'),
        (dict(interval=True), TypeError, 'interval is True, expected an int'),
        (dict(interval=0), ValueError, 'interval is 0, expected 1 or more'),
        (dict(image=3), TypeError, 'image is 3, expected the path'),
        (dict(image='none.png'), ValueError, 'there is no file none.png'),
        (dict(image=__file__), ValueError, 'expected an image, '),
        (dict(points=(4, 5)), TypeError, r'points has 4, expected a column'),
        (dict(points='4,5'), TypeError, "points is '4,5', expected a list"),
        (dict(points=[]), ValueError, 'at most 6 points, and one at least'),
        (dict(points=[(96, 5)]), ValueError, 'X from 0 to 95 and .* 96,5'),
    ],
    ids=str,
)
def test_bad_arguments(image, changes, error, message):
    arguments = dict(interval=500, image=image)
    with pytest.raises(error, match=message):
        HOOKS.build(hook_of(**{**arguments, **changes}))


@pytest.mark.parametrize(
    'base, change, message',
    [
        (DETECTOR, 'interval=0', 'ValueError: interval is 0, expected 1 or '),
        (DETECTOR, 'intervall=1', 'TypeError: '),
        (
            NEAREST,
            'interval=1',
            'ValueError: the model has no upsampler with kernels, expected ',
        ),
    ],
)
def test_training_does_not_start_with_a_bad_hook(
    drawn, image, base, change, message, tmp_path, monkeypatch
):
    """The tool says so in one line, before it has written anything."""
    import train as tool

    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(base)!r}\ncustom_hooks = [dict('
        f"type='mmcarafe.KernelVisualizationHook', image={image!r}, {change})]"
    )
    words = ['--work-dir', str(tmp_path / 'work'), *shapes_options(drawn)]
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config), *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        tool.main()
    assert str(caught.value).startswith(f'error: custom_hooks.0: {message}')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'work').exists()
