import http.server
import io
import os
import pickle
import re
import threading
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint

from mmcarafe import checkpoint


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, inputs, mode='tensor'):
        return {'loss': self.norm(torch.stack(list(inputs))).square().mean()}


def make_runner(work_dir, max_epochs=2, **kwargs):
    """The smallest runner that saves all that a runner can save."""
    return Runner(
        Model(),
        str(work_dir),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.rand(2)) for _ in range(4)],
            sampler=dict(type='DefaultSampler', shuffle=True),
            batch_size=2,
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
            dict(type='MultiStepLR', milestones=[1, 2]),
            dict(type='CosineAnnealingLR', T_max=2),
        ],
        custom_hooks=[dict(type='EMAHook')],
        experiment_name='-'.join(work_dir.parts[-2:]),
        **kwargs,
    )


@pytest.fixture(params=['this torch', 'torch < 2.6'], autouse=True)
def unpickler(request, monkeypatch):
    """Both ways of allowing our names, whichever torch is installed."""
    checkpoint.enable()
    if request.param == 'torch < 2.6':
        monkeypatch.setattr(checkpoint, '_FROM_2_6', False)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'checkpoint.pth')


def load(path):
    return load_checkpoint(Model(), path, map_location='cpu')


def test_resume_restores_what_the_runner_saved(tmp_path):
    runner = make_runner(tmp_path)
    hub = runner.message_hub
    hub.update_info('best_score', np.float64(0.5))
    runner.train()

    again = make_runner(
        tmp_path / 'again',
        max_epochs=3,
        load_from=str(tmp_path / 'epoch_2.pth'),
        resume=True,
    )
    again.train()
    # 2 iterations an epoch: two epochs were loaded, only the third was run
    assert len(again.message_hub.get_scalar('train/time').data[0]) == 6
    assert again.message_hub.get_info('best_score') == 0.5
    for key in ('train/loss', 'train/lr'):
        before, after = (
            r.message_hub.get_scalar(key) for r in (runner, again)
        )
        np.testing.assert_equal(after.data[0][:4], before.data[0])


@pytest.mark.parametrize(
    'value',
    [
        *(np.dtype(code).type(1) for code in '?bBhHiIlLefdg'),
        *(np.arange(2, dtype=code) for code in '?bhilefd'),
        np.zeros((2, 0, 3)),
        np.asfortranarray(np.eye(3)),
        HistoryBuffer([1.5, 2], [1, 1]),
        HistoryBuffer(),
        Counter([1, 1, 2]),
        OrderedDict(a=(None, True, 'é', b'\xff', 1 << 40)),
    ],
    ids=lambda value: f'{type(value).__name__}-{getattr(value, "dtype", "")}',
)
def test_values_of_a_runner_survive(path, value):
    torch.save({'state_dict': {}, 'meta': value}, path)
    loaded = load(path)['meta']
    assert isinstance(loaded, type(value))
    assert type(pickle.loads(pickle.dumps(loaded))) is type(value)
    if isinstance(value, HistoryBuffer):
        loaded, value = loaded.data, value.data
    np.testing.assert_equal(loaded, value)
    assert getattr(loaded, 'dtype', None) == getattr(value, 'dtype', None)


@pytest.mark.parametrize('module', [b'numpy.core', b'numpy._core'])
def test_files_of_both_numpys_load(path, module):
    data = dumps({'state_dict': {}, 'meta': [np.arange(3.0), np.float64(2)]})
    write(path, re.sub(rb'numpy\._?core', module, data))
    array, scalar = load(path)['meta']
    assert (array.tolist(), scalar) == ([0, 1, 2], 2)


def test_arrays_of_the_other_byte_order(path):
    torch.save({'state_dict': {}, 'meta': np.arange(3, dtype='>f8')}, path)
    assert load(path)['meta'].tolist() == [0, 1, 2]


class Call:
    """Pickles as the call of a function, as an attacker's object does."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def dumps(value):
    buffer = io.BytesIO()
    # the format before zip files, in which the pickle is plain
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize(
    ('function', 'args', 'name'),
    [
        (os.system, ('exit 1',), r'\w+\.system'),
        (eval, ('1',), 'eval'),
        (getattr, (HistoryBuffer, '__init__'), 'getattr'),
        (getattr, (1, 'real'), 'getattr'),
        (np.load, ('x.npy',), r'numpy[\w.]*\.load'),
    ],
    ids=['system', 'eval', 'getattr-history', 'getattr-int', 'np.load'],
)
def test_calls_are_refused(path, monkeypatch, function, args, name, zipped):
    # What the user or mmengine tells torch must not matter.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save(
        {'state_dict': Call(function, *args)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(RuntimeError) as error:
        load(path)
    assert re.fullmatch(
        f'cannot load the checkpoint {re.escape(path)}: it would run '
        rf'(builtins\.)?{name}, and it may only hold data',
        str(error.value),
    )
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


def test_nothing_is_called_before_the_refusal(path, tmp_path):
    marker = tmp_path / 'called'
    torch.save({'a': Call(os.mkdir, str(marker)), 'b': 1}, path)
    with pytest.raises(RuntimeError, match='it would run'):
        load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file was a real one


def test_state_of_a_class_is_refused(path, monkeypatch):
    """A pickle may also set attributes: of data, but not of classes."""
    method = Counter.most_common
    monkeypatch.setattr(Counter, 'most_common', method)  # restored afterwards
    harmless, data = pickle.dumps('here', 2), dumps('here')
    assert harmless in data
    # PROTO; the class; its state (None, {'most_common': 'here'}); BUILD; STOP
    evil = (
        b'\x80\x02'
        b'ccollections\nCounter\n'
        b'N}X\x0b\x00\x00\x00most_commonX\x04\x00\x00\x00heres\x86'
        b'b.'
    )
    write(path, data.replace(harmless, evil))
    with pytest.raises(RuntimeError, match='cannot load the checkpoint'):
        load(path)
    assert Counter.most_common is method


class WithState(Call):
    """Pickles as a call whose result then takes a state."""

    def __init__(self, function, args, state):
        self.call = function, args, state


def dtype_of(*state):
    """A dtype as numpy pickles it, but of any size or fields."""
    return WithState(np.dtype, ('f8', False, True), state)


def array_of(shape, dtype, data):
    """An array as numpy pickles it, but of any bytes."""
    reconstruct, args, _ = np.zeros(1).__reduce__()
    return WithState(reconstruct, args, (1, shape, dtype, False, data))


F8 = np.dtype('f8')
POINTER = b'A' * 8


@pytest.mark.parametrize(
    'value',
    [
        Call(np.ndarray, (1,), 'O', POINTER),
        # which would call what the bytes point to
        Call(Counter, Call(np.ndarray, (1,), 'O', POINTER)),
        Call(np.dtype, 'O'),
        Call(np.dtype, [('a', 'O')]),
        Call(np.dtype, 'V8'),
        dtype_of(3, '|', None, ('a',), {'a': (F8, 0)}, 8, 1, 0),
        dtype_of(3, '<', None, None, None, 1, 1, 0),
        dtype_of(3, '<', None, None, None, -1, -1, 63),
        dtype_of(3, '?', None, None, None, -1, -1, 0),
        array_of((1,), Call(np.dtype, 'O'), POINTER),
        array_of((2,), F8, POINTER),
        array_of((-1, -8), F8, POINTER),
        array_of((1,), F8, [1.0]),
        array_of((1,), 'f8', POINTER),
        Call(np.float64().__reduce__()[0], F8, b'A'),
        Call(np.float64().__reduce__()[0], F8, POINTER * 2),
    ],
    ids=range(16),
)
def test_arrays_of_anything_but_numbers_are_refused(path, value):
    torch.save({'state_dict': {}, 'meta': value}, path)
    with pytest.raises(RuntimeError, match='is it damaged, or not a check'):
        load(path)


def test_what_others_allow_stays(path, monkeypatch):
    """Except numpy's own arrays, which would be used in place of ours."""
    if not checkpoint._FROM_2_6:
        pytest.skip('torch < 2.6 has no list of harmless names')
    torch.save({'a': Call(np.ndarray, (1,), 'O', POINTER)}, path)
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([np.ndarray, Model])
    try:
        with pytest.raises(RuntimeError, match='is it damaged'):
            load(path)
        torch.save({'state_dict': {}, 'a': Call(Model)}, path)
        assert type(load(path)['a']) is Model
        assert {np.ndarray, Model} <= {*torch.serialization.get_safe_globals()}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-10],
        lambda data: data[:1],
        lambda data: b'',
        lambda data: b'<!DOCTYPE html><html></html>',
        lambda data: b'version https://git-lfs.github.com/spec/v1\n',
        lambda data: bytes(range(256)) * 9,
    ],
    ids=['half', 'no-end', 'byte', 'empty', 'html', 'git-lfs', 'noise'],
)
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_damaged_files(path, damage, zipped):
    torch.save(
        {'a': torch.rand(99)}, path, _use_new_zipfile_serialization=zipped
    )
    with open(path, 'rb') as file:
        data = file.read()
    write(path, damage(data))
    with pytest.raises(RuntimeError, match=re.escape(path)) as error:
        load(path)
    assert 'is it damaged, or not a checkpoint?' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_flipped_bit(path):
    torch.save({'a': torch.arange(9.0)}, path)
    with open(path, 'rb') as file:
        data = bytearray(file.read())
    data[data.index(np.arange(9, dtype='f4').tobytes()) + 7] ^= 1
    write(path, data)
    assert torch.load(path)['a'].tolist() != [*range(9)]
    with pytest.raises(RuntimeError, match='damaged.*/data/0 does not have'):
        load(path)


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=re.escape(path)):
        load(path)


def test_files_from_the_web_are_not_executed(tmp_path, monkeypatch):
    """torch.hub, which mmengine asks, says weights_only=False by default."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    torch.save({'state_dict': Call(os.system, 'exit')}, tmp_path / 'evil.pth')
    torch.save({'state_dict': {}, 'meta': 1}, tmp_path / 'good.pth')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f'http://127.0.0.1:{server.server_port}/'
        try:
            assert load(url + 'good.pth')['meta'] == 1
            with pytest.raises(RuntimeError, match=f'{url}evil.pth: it would'):
                load(url + 'evil.pth')
        finally:
            server.shutdown()
            thread.join()


def test_it_can_be_undone(tmp_path):
    path = str(tmp_path / 'checkpoint.pth')
    torch.save({'state_dict': {}, 'more': Call(os.getpid)}, path)

    def outcome():
        try:
            load_checkpoint(Model(), path, map_location='cpu')
        except Exception as error:
            return str(error)
        return 'loaded'

    checkpoint.disable()
    try:
        assert 'cannot load the checkpoint' not in outcome()
    finally:
        checkpoint.enable()
    assert 'cannot load the checkpoint' in outcome()
