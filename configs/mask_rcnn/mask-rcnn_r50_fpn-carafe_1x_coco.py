_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

# FCNMaskHead knows CARAFE as mmcv's 'carafe' only, which this import makes
# run on our operator.
custom_imports = dict(imports=['mmcarafe.drop_in'])

model = dict(
    neck=dict(type='mmcarafe.CARAFEFPN'),
    roi_head=dict(
        mask_head=dict(upsample_cfg=dict(type='carafe', scale_factor=2))
    ),
)
