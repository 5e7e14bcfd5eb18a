_base_ = [
    './fpn-carafe_r50_4xb4-160k_ade20k-512x512.py',
    '../_base_/upsamplers/carafe_renorm_bilinear.py',
]

model = dict(
    neck=dict(upsample_cfg={{_base_.upsample_cfg}}),
    decode_head=dict(upsample_cfg={{_base_.upsample_cfg}}),
)
