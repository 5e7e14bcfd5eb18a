_base_ = './upernet-carafe_r50_4xb4-80k_ade20k-512x512.py'

model = dict(decode_head=dict(ppm_upsample_cfg=None, fpn_upsample_cfg=None))
