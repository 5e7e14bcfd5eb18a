_base_ = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'

model = dict(decode_head=dict(type='mmcarafe.CARAFEUPerHead'))
