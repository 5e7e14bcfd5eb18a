_base_ = [
    './upernet-carafe_r50_4xb4-80k_ade20k-512x512.py',
    '../_base_/upsamplers/carafe_renorm_bilinear.py',
]

model = dict(
    decode_head=dict(
        ppm_upsample_cfg={{_base_.upsample_cfg}},
        fpn_upsample_cfg={{_base_.upsample_cfg}},
        fuse_upsample_cfg={{_base_.upsample_cfg}},
    )
)
