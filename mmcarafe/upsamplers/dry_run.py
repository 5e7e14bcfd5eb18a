"""Find every interpolation that a model does, by running it once.

Letters are those of :mod:`mmcarafe.ops.carafe`.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class Interpolation:
    """A call of torch's ``interpolate``."""

    name: str  # of the innermost module that was running
    number: int  # of the call, from 0, in that run of that module
    shape: torch.Size  # of what is interpolated
    out_shape: torch.Size
    device: torch.device
    mode: str
    to_size: bool  # to a size, not by a factor
    pooled: bool  # whether its input was pooled to a size that is fixed
    before: bool  # whether a layer with parameters has had part in its input
    after: bool = False  # whether its result goes into such a layer


def dry_run(model: nn.Module, example_input) -> 'list[Interpolation]':
    """Run a model without gradients and as in evaluation.

    Args:
        model (nn.Module): it is as before afterwards.
        example_input (Tensor | tuple | list | dict): its argument, its
            arguments, or its arguments by keyword.

    Returns:
        list[Interpolation]: in the order of the calls.

    Raises:
        TypeError: ``example_input`` is something else.
        ValueError: the model raises an error; ``__cause__`` is that error.
    """
    args, kwargs = (), {}
    if isinstance(example_input, Tensor):
        args = (example_input,)
    elif isinstance(example_input, (tuple, list)):
        args = example_input
    elif isinstance(example_input, dict):
        kwargs = example_input
    else:
        raise TypeError(
            f'example_input is a {type(example_input).__name__}, expected a '
            "Tensor, or a tuple or dict of the model's arguments"
        )
    watch = _Watch()
    with _evaluating(model), watch.over(model), torch.no_grad(), watch:
        try:
            model(*args, **kwargs)
        except Exception as error:  # whatever the model's own code raises
            shapes = [tuple(x.shape) for x in _tensors(example_input)]
            raise ValueError(
                f'{type(model).__name__} fails with example_input, a '
                f'{type(example_input).__name__} with tensors of {shapes}: '
                f'{type(error).__name__}: {error}'
            ) from error
    return watch.found


@contextmanager
def _evaluating(model):
    # Not by model.eval(): classes override it, and it is not undone by
    # model.train() where some modules were in another mode.
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, mode in training:
            module.training = mode


class _History(NamedTuple):
    """What a tensor was computed from."""

    # whether a parameter has met data, as in a layer
    learned: bool = False
    # whether all data went through adaptive pooling
    pooled: bool = False
    # the interpolations, by their index, since the last such layer
    interpolations: frozenset = frozenset()


_DATA = _History()
# Of what is computed from parameters alone, such as a weight that is scaled.
# Compared by `is`.
_PARAMETERS = _History()


class _Watch(TorchFunctionMode):
    """Sees all calls of torch's functions, and follows the data."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._running = []  # [name, calls so far] of each running module
        self._histories = WeakIdKeyDictionary()

    @contextmanager
    def over(self, model):
        """Notice which module of the model is running."""
        handles = []
        try:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks
                handles += (
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(
                        self._leave, with_kwargs=True, always_call=True
                    ),
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name):
        def hook(module, args):
            self._running.append([name, 0])

        return hook

    def _leave(self, module, args, kwargs, out):
        self._running.pop()
        # Compiled code inside does not show its calls.
        lost = [
            x
            for x in _tensors(out)
            if x not in self._histories and not isinstance(x, nn.Parameter)
        ]
        if lost:
            own = list(module.parameters(recurse=False))
            history = self._combine([args, kwargs, own])
            for x in lost:
                self._histories[x] = history

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        history = self._combine([args, kwargs])
        out = func(*args, **kwargs)
        if func is interpolate:
            history = self._note(history, out, *args, **kwargs)
        elif getattr(func, '__name__', '').startswith('adaptive_'):
            history = history._replace(pooled=True)
        # x[index] = y returns None and changes x
        for x in _tensors(args[:1] if out is None else out):
            if not isinstance(x, nn.Parameter):
                self._histories[x] = history
        return out

    def _note(self, history, out, x, size=None, mode='nearest', **_):
        running = self._running[-1]
        found = Interpolation(
            name=running[0],
            number=running[1],
            shape=x.shape,
            out_shape=out.shape,
            device=x.device,
            mode=mode,
            to_size=size is not None,
            pooled=history.pooled,
            before=history.learned,
        )
        running[1] += 1
        self.found.append(found)
        indices = history.interpolations | {len(self.found) - 1}
        return history._replace(interpolations=indices)

    def _combine(self, inputs):
        """The history of what is computed from all these tensors."""
        histories = [
            _PARAMETERS
            if isinstance(x, nn.Parameter)
            else self._histories.get(x, _DATA)
            for x in _tensors(inputs)
        ]
        data = [h for h in histories if h is not _PARAMETERS]
        if not data:
            return _PARAMETERS if histories else _DATA
        pooled = all(h.pooled for h in data)
        interpolations = frozenset().union(*(h.interpolations for h in data))
        if len(data) == len(histories):
            learned = any(h.learned for h in data)
            return _History(learned, pooled, interpolations)
        for index in interpolations:
            self.found[index].after = True
        return _History(learned=True, pooled=pooled)


def _tensors(values):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
