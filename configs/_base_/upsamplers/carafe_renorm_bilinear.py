# CARAFE with two changes to the paper's: the weights of the taps inside a map
# sum to one at its border too, and training starts from bilinear interpolation
# instead of the window's mean.
upsample_cfg = dict(
    type='mmcarafe.CARAFE', border='renormalize', init='bilinear'
)
