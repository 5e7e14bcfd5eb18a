# Nuclei in microscopy images, as boxes. The folder, here data/nuclei, holds
# images/{train,val}/*.png and, as COCO json, annotations/{train,val}.json. It
# comes from tools/dataset_converters/nuclei.py.
_base_ = '../shapes/faster-rcnn_r18_fpn-carafe_shapes.py'

model = dict(
    # Half of the nuclei are under 17 pixels. 2 * strides = 8 to 128 pixels.
    rpn_head=dict(anchor_generator=dict(scales=[2])),
    roi_head=dict(bbox_head=dict(num_classes=1)),
    # A crop holds a few dozen nuclei; more candidates cost more time than the
    # rest of the model on a CPU.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),
    ),
    # An image holds up to 151 nuclei.
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=400),
        rcnn=dict(max_per_img=200),
    ),
)

data_root = 'data/nuclei/'
dataset = dict(
    data_root=data_root,
    metainfo=dict(classes=('nucleus',), palette=[(230, 25, 75)]),
)
crop_size = (256, 256)  # the smallest image
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/train/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='RandomCrop', crop_size=crop_size),
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
    batch_size=4,
    dataset=dict(
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/val/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            # mmdet's heads need scale_factor, which only Resize records.
            dict(type='Resize', scale_factor=1.0),
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
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
auto_scale_lr = dict(base_batch_size=4)
