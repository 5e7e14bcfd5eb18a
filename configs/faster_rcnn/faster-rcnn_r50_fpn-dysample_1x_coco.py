_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    neck=dict(
        type='mmcarafe.CARAFEFPN',
        # DySample+, the best of its forms with Faster R-CNN
        upsample_cfg=dict(type='mmcarafe.DySample', dyscope=True),
    )
)
