# Nuclei in microscopy images, as semantic maps. The folder, here
# data/nuclei, holds images/{train,val}/*.png and semantic/{train,val}/*.png
# (0 background, 1 nucleus). It comes from tools/dataset_converters/nuclei.py.
_base_ = '../shapes/upernet-carafe_r18_shapes.py'

crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
)

dataset = dict(
    data_root='data/nuclei/',
    img_suffix='.png',
    metainfo=dict(
        classes=('background', 'nucleus'), palette=[(0, 0, 0), (230, 25, 75)]
    ),
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_prefix=dict(
            img_path='images/train', seg_map_path='semantic/train'
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomCrop', crop_size=crop_size),
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
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='semantic/val'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        **dataset,
    )
)
test_dataloader = val_dataloader
