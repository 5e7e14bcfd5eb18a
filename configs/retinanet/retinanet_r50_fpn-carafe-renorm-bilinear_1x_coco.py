_base_ = [
    './retinanet_r50_fpn-carafe_1x_coco.py',
    '../_base_/upsamplers/carafe_renorm_bilinear.py',
]

model = dict(neck=dict(upsample_cfg={{_base_.upsample_cfg}}))
