_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'

model = dict(
    decode_head=dict(
        type='mmcarafe.CARAFESegformerHead',
        upsample_cfg=dict(type='mmcarafe.SAPA'),
    )
)
