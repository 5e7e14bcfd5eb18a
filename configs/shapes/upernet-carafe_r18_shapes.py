# A real UPerNet, small enough to train on two CPU cores in a few minutes. The
# data: python tools/dataset_converters/shapes.py data/shapes
# The backbone is that of faster-rcnn_r18_fpn-carafe_shapes.py; to start from a
# checkpoint of that: --cfg-options load_from=CHECKPOINT
_base_ = [
    'mmseg::upernet/upernet_r18_4xb4-80k_ade20k-512x512.py',
    '../_base_/datasets/shapes.py',
]

channels = 64
scale = (128, 128)  # from 320 * 320 pixels in the files
model = dict(
    data_preprocessor=dict(size=scale),
    pretrained=None,
    # Half of ResNet-18's widths: iterations take a third of the time.
    backbone=dict(type='ResNet', base_channels=32, stem_channels=32),
    decode_head=dict(
        type='mmcarafe.CARAFEUPerHead',
        in_channels=[32, 64, 128, 256],
        channels=channels,
        num_classes=7,
        dropout_ratio=0,
        # PPM pools to one pixel: a batch of 4 is too few for BN's statistics.
        norm_cfg=dict(type='GN', num_groups=8),
        # Four pixels of five are background, and most of them are easy.
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=2000),
    ),
    auxiliary_head=dict(in_channels=128, channels=channels, num_classes=7),
)

dataset = dict(
    # ADE20KDataset knows ADE20K's classes only; this is its parent.
    type='BaseSegDataset',
    data_root='data/shapes/',
    metainfo=dict(
        classes=('background', *_base_.shapes.classes),
        palette=[(0, 0, 0), *_base_.shapes.palette],
    ),
    # the background is a class
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=4,
    # a loading process would take one of two cores from the training
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='Resize', scale=scale, keep_ratio=True),
            dict(
                type='RandomFlip',
                prob=[0.25, 0.25, 0.25],
                direction=['horizontal', 'vertical', 'diagonal'],
            ),
            dict(type='PackSegInputs'),
        ],
        **dataset,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=scale, keep_ratio=True),
            # after Resize: the prediction is compared at the file's own size
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        **dataset,
    ),
)
test_dataloader = val_dataloader

max_iters = 2400  # 8 epochs: 2400 * 4 = 9600 of 1200 images
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.002, weight_decay=0.05),
    clip_grad=dict(_delete_=True, max_norm=10),
    # The heads start from small random weights on few channels. Upsamplers
    # that learn as fast soon give all weight to one tap, the same everywhere.
    paramwise_cfg=dict(
        custom_keys=dict(head=dict(lr_mult=10.0), upsample=dict(lr_mult=1.0))
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=0,
        by_epoch=False,
        begin=0,
        end=max_iters,
    ),
]

default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=2),
)
randomness = dict(seed=0)
