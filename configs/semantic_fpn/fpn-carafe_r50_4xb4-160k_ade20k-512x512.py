_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'

model = dict(
    neck=dict(type='mmcarafe.swap_upsample', of='FPN'),
    decode_head=dict(type='mmcarafe.swap_upsample', of='FPNHead'),
)
