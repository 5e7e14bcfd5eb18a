_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    neck=dict(type='mmcarafe.CARAFEFPN'),
    roi_head=dict(
        mask_head=dict(type='mmcarafe.swap_upsample', of='FCNMaskHead')
    ),
)
