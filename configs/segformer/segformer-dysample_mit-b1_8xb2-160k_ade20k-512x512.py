_base_ = 'mmseg::segformer/segformer_mit-b1_8xb2-160k_ade20k-512x512.py'

model = dict(
    decode_head=dict(
        type='mmcarafe.CARAFESegformerHead',
        # DySample-S+, the form for which its paper has a result in SegFormer
        upsample_cfg=dict(type='mmcarafe.DySample', style='pl', dyscope=True),
    )
)
