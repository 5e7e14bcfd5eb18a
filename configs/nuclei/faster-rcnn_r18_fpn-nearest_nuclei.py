# The same model and schedule with mmdet's own FPN, for comparison.
_base_ = './faster-rcnn_r18_fpn-carafe_nuclei.py'

model = dict(neck=dict(type='FPN'))
