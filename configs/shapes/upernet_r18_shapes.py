# The same model and schedule with mmseg's own UPerHead, for comparison.
_base_ = './upernet-carafe_r18_shapes.py'

model = dict(decode_head=dict(type='UPerHead'))
