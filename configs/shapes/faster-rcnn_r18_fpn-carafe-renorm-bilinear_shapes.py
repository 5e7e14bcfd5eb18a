_base_ = [
    './faster-rcnn_r18_fpn-carafe_shapes.py',
    '../_base_/upsamplers/carafe_renorm_bilinear.py',
]

model = dict(neck=dict(upsample_cfg={{_base_.upsample_cfg}}))
