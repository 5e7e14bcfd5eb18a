_base_ = 'mmseg::segformer/segformer_mit-b1_8xb2-160k_ade20k-512x512.py'

model = dict(
    decode_head=dict(
        type='mmcarafe.CARAFESegformerHead',
        # resampling as in its authors' own configs
        upsample_cfg=dict(type='mmcarafe.FreqFusion', feature_resample=True),
    )
)
