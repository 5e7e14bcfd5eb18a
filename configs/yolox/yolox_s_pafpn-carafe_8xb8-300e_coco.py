_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'

model = dict(
    neck=dict(
        type='mmcarafe.swap_upsample',
        of='YOLOXPAFPN',
        # YOLOX's neck has an upsample_cfg too, which says how to interpolate.
        upsample_cfg=dict(_delete_=True, type='mmcarafe.CARAFE'),
    )
)
