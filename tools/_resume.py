"""What lets a resumed run end as if it had never been interrupted.

mmengine's checkpoints hold no state of the random numbers, least of all of the
processes that load the data. None is needed here: each image and each
iteration starts from a seed of its own, which depends on the seed of the run
and on the place in the run alone.
"""

import random
from functools import partial

import numpy as np
import torch
from _cli import say
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop


def keep_seed(cfg, checkpoint):
    """Let a run go on with the seed that it had.

    mmengine does so too, but after it has given another one to the samplers.
    """
    randomness = dict(cfg.get('randomness') or {})
    seed = checkpoint['meta'].get('seed')
    if seed is None:
        return
    if randomness.get('seed') not in (None, seed):
        say(f'--resume: the seed stays {seed}, not {randomness["seed"]}')
    cfg.randomness = {**randomness, 'seed': seed}


def register(runner):
    """Make the rest of a run the same wherever it is resumed.

    This has to come before the runner builds its data loaders.
    """
    build = runner.build_dataloader

    def build_seeded(*args, **kwargs):
        loader = build(*args, **kwargs)
        seed_images(loader, runner.seed)
        return loader

    runner.build_dataloader = build_seeded
    runner.register_hook(PlaceInTheRun())


class PlaceInTheRun(Hook):
    """Seeds each iteration, and resumes an epoch where it was left."""

    priority = 'VERY_HIGH'  # before a checkpoint is saved
    share = 0.0  # of the epoch, that was trained on

    def after_load_checkpoint(self, runner, checkpoint):
        # mmengine's other loop by itself leaves out what was trained.
        if runner._resume and by_epoch(runner):
            loop = runner.train_loop
            batches = trained_batches(checkpoint, len(loop.dataloader))
            leave_out(loop, batches)

    def before_train_epoch(self, runner):
        sampler = sampler_of(runner.train_dataloader)
        if by_epoch(runner) and sampler is not None:
            sampler.epoch_of_run = runner.epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        # Zeros at the end change no seed: one process draws as ever.
        seed_all(runner.seed, runner.iter, get_rank())

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        if by_epoch(runner):
            self.share = (batch_idx + 1) / len(runner.train_loop.dataloader)

    def after_train_epoch(self, runner):
        self.share = 0.0
        vars(runner.train_loop).pop('run_iter', None)  # that of leave_out

    def before_save_checkpoint(self, runner, checkpoint):
        if by_epoch(runner):
            checkpoint['meta']['share_of_epoch'] = self.share


def by_epoch(runner):
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def trained_batches(checkpoint, length):
    """How many of the batches of an epoch a checkpoint's run has trained on.

    Its epochs may have had another length, in batches, than they have now.
    """
    meta = checkpoint['meta']
    if meta.get('share_of_epoch') is not None:
        return round(min(1, max(0, meta['share_of_epoch'])) * length)
    # An older run's. Its epoch was complete if the next one is to be trained.
    if checkpoint['message_hub']['runtime_info'].get('epoch') != meta['epoch']:
        return 0
    return min(length, max(0, meta['iter'] - meta['epoch'] * length))


def leave_out(loop, batches):
    """Let a loop load, but not train on, the first batches of an epoch."""
    run_iter = loop.run_iter

    def run_rest(idx, data_batch):
        if idx >= batches:
            run_iter(idx, data_batch)

    loop.run_iter = run_rest


def seed_all(*place):
    """Seed all random numbers with several whole numbers."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed takes five times as long as all of this where no GPU is
    # in use, as in the processes that load the data: it notes the stack for
    # each kind of device.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Sample(int):
    """The index of an image, with the place in the run where it is loaded."""


def numbered(indices):
    """Let a sampler's ``__iter__`` give `Sample`."""

    def iterate(sampler):
        # A sampler may not count epochs, or not be told of them.
        epoch = sampler.epoch_of_run
        if epoch is None:
            epoch = getattr(sampler, 'epoch', sampler.times)
        sampler.times += 1
        for position, index in enumerate(indices(sampler)):
            if isinstance(index, int):  # else a frame of a video
                index = Sample(index)
                index.place = get_rank(), epoch, position
            yield index

    return iterate


def sampler_of(loader):
    return getattr(loader.batch_sampler, 'sampler', None)


def seed_images(loader, seed):
    """Let a loader seed before each image, in the process that loads it."""
    sampler = sampler_of(loader)
    if sampler is None:
        return
    # A subclass, since batch samplers may ask for the class.
    cls = type(sampler)
    sampler.__class__ = type(
        cls.__name__,
        (cls,),
        dict(
            __iter__=numbered(cls.__iter__),
            epoch_of_run=None,  # where PlaceInTheRun knows it
            times=0,  # how often it was iterated
        ),
    )
    # torch loads a batch by this method if a data set has it.
    loader.dataset.__getitems__ = partial(_load, loader.dataset, seed)


def _load(dataset, seed, indices):
    images = []
    for index in indices:
        if isinstance(index, Sample):
            seed_all(seed, *index.place)
            index = int(index)
        images.append(dataset[index])
    return images
