_base_ = [
    './yolox_s_pafpn-carafe_8xb8-300e_coco.py',
    '../_base_/upsamplers/carafe_renorm_bilinear.py',
]

model = dict(neck=dict(upsample_cfg={{_base_.upsample_cfg}}))
