_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    neck=dict(
        type='mmcarafe.CARAFEFPN',
        # resampling as in its authors' own config
        upsample_cfg=dict(type='mmcarafe.FreqFusion', feature_resample=True),
    )
)
