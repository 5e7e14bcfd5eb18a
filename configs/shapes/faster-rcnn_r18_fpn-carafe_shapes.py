# A real Faster R-CNN, small enough to train from scratch on two CPU cores in
# a few minutes. The data come from tools/dataset_converters/shapes.py.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/datasets/shapes.py',
]

channels = 64
model = dict(
    backbone=dict(
        depth=18,
        # Half of ResNet-18's widths: enough for shapes, in a third of the
        # time.
        base_channels=32,
        # No checkpoint is loaded, so every layer and BN statistic is learned.
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        type='mmcarafe.CARAFEFPN',
        in_channels=[32, 64, 128, 256],
        out_channels=channels,
    ),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # 3 * strides 4 .. 64 = 12 .. 192 pixels; the objects span 26 to 160
        # pixels in the files, 13 to 80 in the network.
        anchor_generator=dict(scales=[3]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels,
            # As many samples for large boxes as for small ones: otherwise
            # RoIAlign takes half of each iteration's time.
            roi_layer=dict(sampling_ratio=2),
        ),
        bbox_head=dict(
            in_channels=channels, fc_out_channels=256, num_classes=6
        ),
    ),
    # About 8 objects per image need fewer proposals and samples than COCO.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

dataset = dict(data_root='data/shapes/', metainfo=_base_.shapes)
scale = (160, 160)  # half of the 320 * 320 pixels in the files
train_dataloader = dict(
    batch_size=4,
    # a loading process would take one of two cores from the training
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=scale, keep_ratio=True),
            dict(
                type='RandomFlip',
                prob=[0.25, 0.25, 0.25],
                direction=['horizontal', 'vertical', 'diagonal'],
            ),
            dict(type='PackDetInputs'),
        ],
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=scale, keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
            ),
        ],
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file='data/shapes/annotations/instances_validation.json',
    classwise=True,
)
test_evaluator = val_evaluator

# 1200 images / 4 = 300 iterations an epoch, 900 in all
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.001, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=0,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=4)

default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(max_keep_ckpts=2),
    visualization=dict(score_thr=0.5),
)
visualizer = dict(line_width=2)
randomness = dict(seed=0)
