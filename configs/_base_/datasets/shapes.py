# What tools/dataset_converters/shapes.py draws, and the colours in which
# predictions are shown.
shapes = dict(
    classes=('disk', 'ring', 'triangle', 'square', 'star', 'stick'),
    palette=[
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (240, 50, 230),
    ],
)
