"""Predictions beside the truth, and what is wrong with them, in one picture.

:func:`compare_objects` draws boxes and instance masks, :func:`compare_maps`
semantic maps. They need OpenCV, and matplotlib for its font.

A picture is as wide as a page of 880 pixels, or up to twice that if the image
is large; letters and lines grow with it. Errors have the same colours for both
kinds of model: orange is missed, blue is invented, magenta is another class.
Colour-blind readers tell them apart, too, and no meaning hangs on red against
green.
"""

import os.path as osp
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAGE = 880  # pixels
TALLEST = 1100  # pixels, of all panels
MARGIN, GAP = 10, 8
IGNORE = 255  # in a semantic map, of what is not labelled
SMALL, MEDIUM, LARGE = 10.5, 12, 14  # heights of letters
MOST_KEYS = 24  # classes in a legend
MOST_LABELS = 40  # boxes in a panel that have labels

MATCHED = (0, 140, 100)
MISSED = (242, 142, 0)
INVENTED = (0, 96, 208)
CONFUSED = (200, 0, 140)
IGNORED = (110, 110, 110)
INK = (11, 11, 11)

# Where a data set has no colours of its own.
PALETTE = (
    *((31, 119, 180), (255, 127, 14), (148, 103, 189), (140, 86, 75)),
    *((227, 119, 194), (188, 189, 34), (23, 190, 207), (214, 39, 40)),
    *((44, 160, 44), (110, 110, 110)),
)


@dataclass
class Objects:
    """The objects of one image, true or predicted.

    Attributes:
        boxes (ndarray[N, 4]): left, top, right, bottom, in pixels.
        labels (ndarray[N]): indices of classes.
        scores (ndarray[N], optional): from 0 to 1; None for the truth.
        masks (ndarray[N, H, W], optional): bool, of the image's size.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: Optional[np.ndarray] = None
    masks: Optional[np.ndarray] = None

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, chosen):
        return Objects(
            *(
                None if each is None else each[chosen]
                for each in (self.boxes, self.labels, self.scores, self.masks)
            )
        )


class Panel(NamedTuple):
    heading: str
    picture: np.ndarray


class Key(NamedTuple):
    """An entry of a legend.

    The style is ``'fill'``, ``'empty'``, ``'hatched'``, ``'line'``,
    ``'dashed'``, or empty for text alone.
    """

    text: str
    color: 'tuple[int, int, int]'
    style: str = 'fill'


OBJECT_ERRORS = (
    Key('matched', MATCHED, 'line'),
    Key('missed', MISSED, 'dashed'),
    Key('false or double', INVENTED, 'line'),
    Key('of a wrong class', CONFUSED, 'line'),
    Key('in a crowd, not judged', IGNORED, 'line'),
)
MAP_ERRORS = (
    Key('missed', MISSED),
    Key('invented', INVENTED),
    Key('wrong class', CONFUSED),
)


# The two pictures


def compare_objects(
    image: np.ndarray,
    found: Objects,
    truth: Optional[Objects] = None,
    classes: 'Optional[list[str]]' = None,
    palette: 'Optional[list[tuple[int, int, int]]]' = None,
    score_threshold: float = 0.3,
    crowds: Optional[Objects] = None,
    title: str = '',
) -> np.ndarray:
    """Draw image, true objects, predicted ones, and errors.

    Args:
        image (ndarray[H, W, 3]): uint8; red, green, blue.
        found (Objects): with scores.
        truth (Objects, optional): without it, only the first and the third
            panel are drawn.
        classes (list[str], optional): their names.
        palette (list[tuple[int, int, int]], optional): their colours.
        score_threshold (float): only boxes with a higher score are drawn.
        crowds (Objects, optional): true groups of objects. A box in one is
            neither right nor wrong.
        title (str): above all.

    Returns:
        ndarray[H', W', 3]: uint8, 880 to 1760 pixels wide.

    Raises:
        ValueError: the image has another shape or dtype, or ``found`` has no
            scores.
    """
    layout = Layout(image, 2 if truth is None else 4)
    panels, legend = object_panels(
        image,
        found,
        truth,
        Classes(classes, palette),
        score_threshold,
        crowds,
        layout.size,
        layout.scale,
    )
    panels.insert(0, Panel('Image', layout.fit(image)))
    return compose(title, layout.rows(panels), legend, layout.scale)


def compare_maps(
    image: np.ndarray,
    found: np.ndarray,
    truth: Optional[np.ndarray] = None,
    classes: 'Optional[list[str]]' = None,
    palette: 'Optional[list[tuple[int, int, int]]]' = None,
    title: str = '',
) -> np.ndarray:
    """Draw image, true semantic map, predicted one, and errors.

    A class named background is not painted; an object taken for it is missed,
    the opposite is invented, and all other errors are of a wrong class.

    Args:
        image (ndarray[H, W, 3]): uint8; red, green, blue.
        found (ndarray[H', W']): indices of classes.
        truth (ndarray[H', W'], optional): the same; where it is no index of a
            class, such as 255 or -1, it is ignored. Without it, only the first
            and the third panel are drawn.
        classes (list[str], optional): their names.
        palette (list[tuple[int, int, int]], optional): their colours.
        title (str): above all.

    Returns:
        ndarray[H'', W'', 3]: uint8, 880 to 1760 pixels wide.

    Raises:
        ValueError: the image has another shape or dtype.
    """
    layout = Layout(image, 2 if truth is None else 4)
    panels, legend = map_panels(
        image,
        found,
        truth,
        Classes(classes, palette),
        layout.size,
        layout.scale,
    )
    panels.insert(0, Panel('Image', layout.fit(image)))
    return compose(title, layout.rows(panels), legend, layout.scale)


class Classes:
    """Name and colour of each class, by its index.

    Args:
        names (list[str], optional): by default, "class 0" and so on.
        palette (list[tuple[int, int, int]], optional): red, green, blue from
            0 to 255. Anything else than a list is no palette.
    """

    def __init__(self, names=None, palette=None):
        self.names = names
        self.palette = palette if isinstance(palette, (list, tuple)) else ()
        self.number = None if names is None else len(names)

    def __call__(self, index):
        index = int(index)
        known = self.names is not None and index < len(self.names)
        name = str(self.names[index]) if known else f'class {index}'
        if index < len(self.palette):
            return name, tuple(int(each) for each in self.palette[index])
        return name, PALETTE[index % len(PALETTE)]


# Objects


def match(
    found: Objects, truth: Objects, threshold: float = 0.5
) -> 'tuple[np.ndarray, np.ndarray]':
    """Find the true object of each predicted one, at most one for each.

    As in COCO's evaluation, those of higher score choose first, the one of
    their class with the largest IoU. What is left over after that may belong
    to an object of another class.

    Args:
        found (Objects): N, with scores.
        truth (Objects): M.
        threshold (float): the smallest IoU of boxes.

    Returns:
        tuple[ndarray[N], ndarray[N]]: the index in ``truth``, -1 for none, and
        whether the class is the same.
    """
    overlap = iou(found.boxes, truth.boxes)
    same = found.labels[:, None] == truth.labels[None]
    partner = np.full(len(found), -1)
    free = np.ones(len(truth), bool)
    for allowed in (same, ~same):
        for i in np.argsort(-found.scores, kind='stable'):
            able = np.where(allowed[i] & free, overlap[i], 0)
            if partner[i] < 0 and able.max(initial=0) >= threshold:
                partner[i] = able.argmax()
                free[partner[i]] = False
    right = np.zeros(len(found), bool)
    has = partner >= 0
    right[has] = found.labels[has] == truth.labels[partner[has]]
    return partner, right


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of boxes ``[N, 4]`` and ``[M, 4]``, as ``[N, M]``."""
    shared = _shared(a, b)
    sums = _areas(a)[:, None] + _areas(b)[None]
    return shared / np.maximum(sums - shared, 1e-9)


def _shared(a, b):
    """Areas of intersections, ``[N, M]``."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(0).prod(-1)


def _areas(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1)


def object_panels(
    image, found, truth, kinds, score_threshold, crowds, size, scale
):
    """Panels of ``size`` (width, height), and the legend.

    Returns:
        tuple[list[Panel], list[tuple[str, list[Key]]]]: the prediction, after
        the truth and before the errors if there is a truth.
    """
    if found.scores is None:
        raise ValueError('found.scores is None, expected ndarray[N]')
    highest = found.scores.max(initial=0)
    found = found[found.scores > score_threshold]
    found = found[np.argsort(-found.scores, kind='stable')]
    factor = np.array(size) / image.shape[1::-1]
    base = resize(image, size)
    one_class = kinds.number == 1

    def draw(objects):
        marks = []
        for i, label in enumerate(objects.labels):
            name, color = kinds(label)
            words = [] if one_class else [name]
            if objects.scores is not None:
                words.append(f'{objects.scores[i]:.2f}')
            marks.append(Mark(i, color, ' '.join(words)))
        return _draw_objects(base, objects, marks, factor, scale)

    panels = []
    above = f'above {score_threshold:g}'
    picture, complete = draw(found)
    if not len(found):
        text = f'no box {above}'
        if highest > 0:
            text += f'\nthe highest score is {highest:.2g}'
        _write_across(picture, text, scale)
    heading = f'Prediction: {_count(len(found), "box", "boxes")} {above}'
    panels.append(Panel(heading, np.asarray(picture)))

    present = set(found.labels.tolist())
    legend = []
    if truth is not None:
        present |= set(truth.labels.tolist())
        picture, all_labels = draw(truth)
        complete &= all_labels
        if not len(truth):
            _write_across(picture, 'no object', scale)
        heading = f'Truth: {_count(len(truth), "object", "objects")}'
        panels.insert(0, Panel(heading, np.asarray(picture)))
        picture, keys, all_labels = _draw_object_errors(
            _pale(base), found, truth, crowds, kinds, factor, scale
        )
        complete &= all_labels
        panels.append(Panel('Errors', np.asarray(picture)))
        legend.append(('Boxes at IoU 0.5', keys))
    keys = [Key(*kinds(label)) for label in sorted(present)]
    legend.insert(0, ('Classes', _at_most(keys) or [Key('none', INK, '')]))
    if not complete:
        text = 'Where boxes are dense, labels are left out.'
        legend.append(('', [Key(text, INK, '')]))
    return panels, legend


class Mark(NamedTuple):
    """How to draw one of several objects."""

    index: int
    color: 'tuple[int, int, int]'
    text: str
    style: str = 'line'


def _draw_object_errors(base, found, truth, crowds, kinds, factor, scale):
    partner, right = match(found, truth)
    in_crowd = np.zeros(len(found), bool)
    if crowds is not None and len(crowds) and len(found):
        same = found.labels[:, None] == crowds.labels[None]
        share = _shared(found.boxes, crowds.boxes)
        share = share / np.maximum(_areas(found.boxes)[:, None], 1e-9)
        in_crowd = (partner < 0) & ((share >= 0.5) & same).any(1)
    marks = []
    for i, score in enumerate(found.scores):
        if in_crowd[i]:
            marks.append(Mark(i, IGNORED, ''))
        elif right[i]:
            marks.append(Mark(i, MATCHED, f'{score:.2f}'))
        else:
            name = '' if kinds.number == 1 else kinds(found.labels[i])[0]
            if partner[i] < 0:
                text = f'{name} {score:.2f}'.strip()
                marks.append(Mark(i, INVENTED, text, 'thick'))
            else:
                true = kinds(truth.labels[partner[i]])[0]
                text = f'{name} for {true}'
                marks.append(Mark(i, CONFUSED, text, 'thick'))
    missed = np.setdiff1d(np.arange(len(truth)), partner)
    for i, label in enumerate(truth.labels[missed], start=len(found)):
        name = '' if kinds.number == 1 else kinds(label)[0]
        marks.append(Mark(i, MISSED, name, 'dashed'))
    both = _join(found, truth[missed])
    picture, complete = _draw_objects(base, both, marks, factor, scale)
    confused = int((~right & (partner >= 0)).sum())
    invented = int(((partner < 0) & ~in_crowd).sum())
    counts = (right.sum(), len(missed), invented, confused, in_crowd.sum())
    needed = (True, True, True, kinds.number != 1, in_crowd.any())
    keys = [
        key._replace(text=f'{count} {key.text}')
        for key, count, shown in zip(OBJECT_ERRORS, counts, needed)
        if shown
    ]
    return picture, keys, complete


def _join(found, truth):
    """The boxes of both, and the masks if both have some."""
    masks = None
    if found.masks is not None and truth.masks is not None:
        masks = np.concatenate([found.masks, truth.masks])
    return Objects(
        np.concatenate([found.boxes, truth.boxes]),
        np.concatenate([found.labels, truth.labels]),
        masks=masks,
    )


def _draw_objects(base, objects, marks, factor, scale):
    """Draw the objects that are marked.

    Returns:
        tuple[Image, bool]: the picture, and whether each label had a place.
    """
    picture = base.copy()
    height, width = base.shape[:2]
    if objects.masks is not None:
        for mark in reversed(marks):
            mask = resize(
                objects.masks[mark.index].astype(np.uint8),
                (width, height),
                cv2.INTER_NEAREST,
            )
            x, y, w, h = cv2.boundingRect(mask)
            if not w:
                continue
            part = picture[y : y + h, x : x + w]
            mask = mask[y : y + h, x : x + w]
            inside = mask > 0
            part[inside] = _mix(part[inside], mark.color, 0.4)
            edge = mask != cv2.erode(mask, np.ones((3, 3), np.uint8))
            part[edge] = mark.color
    picture = Image.fromarray(picture)
    draw = ImageDraw.Draw(picture)
    places = np.rint(objects.boxes * np.tile(factor, 2)).astype(int)
    high = np.array([width, height] * 2) - 1
    places = places.clip(0, high).reshape(-1, 4)
    for mark in reversed(marks):  # the surest come last, on top
        _draw_box(draw, places[mark.index], mark, scale)
    marks = [mark for mark in marks if mark.text]
    return picture, _write_labels(draw, places, marks, (width, height), scale)


def _draw_box(draw, place, mark, scale):
    left, top, right, bottom = map(int, place)
    right, bottom = max(left, right), max(top, bottom)
    line = round(scale * (3 if mark.style in ('thick', 'dashed') else 2))
    if mark.style != 'dashed':
        # with a white rim outside, which is seen on any ground
        for color, out, wide in (('white', 1, 1), (mark.color, 0, line)):
            place = left - out, top - out, right + out, bottom + out
            draw.rectangle(place, outline=color, width=wide)
        return
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    for start, end in zip(corners, corners[1:] + corners[:1]):
        _dash(draw, start, end, mark.color, line, 5 * scale)


def _dash(draw, start, end, color, line, pace):
    start, end = np.array(start, float), np.array(end, float)
    length = np.abs(end - start).sum()
    along = (end - start) / max(length, 1)
    at = 0.0
    while at < length:
        ends = start + along * at, start + along * min(at + pace, length)
        draw.line([tuple(each) for each in ends], fill=color, width=line)
        at += 1.7 * pace


def _write_labels(draw, places, marks, size, scale):
    """Write each text beside its box, where it hides least.

    Returns:
        bool: whether each one had a place.
    """
    if len(marks) > MOST_LABELS:
        return False
    width, height = size
    font = letters(SMALL * scale)
    taken = np.zeros((height, width), bool)
    covered = np.zeros((height, width), np.int16)
    for mark in marks:
        left, top, right, bottom = places[mark.index]
        covered[top : bottom + 1, left : right + 1] += 1
    complete = True
    for mark in marks:
        left, top, right, bottom = places[mark.index]
        w = int(font.getlength(mark.text) + 4 * scale)
        h = int(1.35 * SMALL * scale)
        best = None
        for x, y, inside in (
            (left, top - h, False),
            (left, bottom + 1, False),
            (right + 1, top, False),
            (left - w, top, False),
            (right + 1 - w, top - h, False),
            (right + 1 - w, bottom + 1, False),
            (left, top, True),
            (left, bottom - h, True),
        ):
            x = min(max(x, 0), width - w)
            if x < 0 or y < 0 or y + h > height:
                continue
            area = np.s_[y : y + h, x : x + w]
            if taken[area].any():
                continue
            cost = covered[area].mean()
            if inside:  # one's own box is no obstacle, if it is large enough
                own = (right - left) * (bottom - top)
                cost = cost - 1 if own > 6 * w * h else cost
            if best is None or cost < best[0] - 0.05:
                best = cost, x, y, area
        # among many boxes, a label must not hide others
        if best is None or best[0] > (0.9 if len(marks) <= 12 else 0.2):
            complete = False
            continue
        _, x, y, area = best
        taken[area] = True
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=mark.color)
        draw.text(
            (x + 2 * scale, y + h / 2),
            mark.text,
            fill=_ink_on(mark.color),
            font=font,
            anchor='lm',
        )
    return complete


def _write_across(picture, text, scale):
    """On a band across the middle."""
    draw = ImageDraw.Draw(picture)
    font = letters(MEDIUM * scale, bold=True)
    width, height = picture.size
    lines = text.split('\n')
    step = 1.5 * MEDIUM * scale
    half = step * (len(lines) + 0.6) / 2
    middle = height / 2
    draw.rectangle((0, middle - half, width, middle + half), fill='white')
    for i, line in enumerate(lines):
        y = middle + step * (i - (len(lines) - 1) / 2)
        line, small = _fitting(line, width - 4 * scale, font)
        draw.text((width / 2, y), line, fill=INK, font=small, anchor='mm')


# Semantic maps


def map_panels(image, found, truth, kinds, size, scale):
    """Panels of ``size`` (width, height), and the legend.

    Returns:
        tuple[list[Panel], list[tuple[str, list[Key]]]]: the prediction, after
        the truth and before the errors if there is a truth.
    """
    base = resize(image, size)
    number = kinds.number
    maps = [found]
    if truth is not None:
        truth = np.where(truth < 0, IGNORE, truth)
        if truth.shape != found.shape:
            truth = resize(
                truth.astype(np.uint16), found.shape[::-1], cv2.INTER_NEAREST
            )
        maps.insert(0, truth)
    if number is None:
        number = 1 + max(
            int(each[each < IGNORE].max(initial=0)) for each in maps
        )
    counts = [
        np.bincount(each[each < number].astype(int).ravel(), minlength=number)
        for each in maps
    ]
    most = np.max(counts, 0)
    present = [int(i) for i in np.argsort(-most, kind='stable') if most[i]]
    panels = [
        Panel(heading, _paint(base, each, kinds, number, scale))
        for heading, each in zip(('Truth', 'Prediction')[-len(maps) :], maps)
    ]
    keys = [
        Key(f'{name} (not painted)', INK, 'empty')
        if is_background(name)
        else Key(name, color)
        for name, color in map(kinds, present)
    ]
    legend = [('Classes', _at_most(keys))]
    if truth is not None:
        panel, keys = _map_errors(base, found, truth, kinds, number, scale)
        panels.append(panel)
        legend.append(('Errors', keys))
    return panels, legend


def is_background(name):
    return name.lower().strip('_') in ('background', 'bg')


def _paint(base, labels, kinds, number, scale):
    """The image in grey, the colours over it, and their outlines in full."""
    labels = resize(
        labels.astype(np.uint16), base.shape[1::-1], cv2.INTER_NEAREST
    )
    colors = np.zeros((number + 1, 3), np.uint8)
    painted = np.zeros(number + 1, bool)
    for i in range(number):
        name, colors[i] = kinds(i)
        painted[i] = not is_background(name)
    labels = np.minimum(labels, number)
    color = colors[labels]
    grey = cv2.cvtColor(
        cv2.cvtColor(base, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB
    )
    mixed = cv2.addWeighted(grey, 0.45, color, 0.55, 0)
    edge = np.zeros(labels.shape, np.uint8)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge = cv2.dilate(edge, np.ones((2, 2), np.uint8)) > 0
    mixed[edge] = color[edge]
    picture = np.where(painted[labels][..., None], mixed, grey)
    _hatch(picture, labels == number, scale)
    return picture


def _map_errors(base, found, truth, kinds, number, scale):
    known = truth < number
    wrong = known & (found != truth)
    background = [i for i in range(number) if is_background(kinds(i)[0])]
    missed = wrong & np.isin(found, background)
    invented = wrong & np.isin(truth, background)
    confused = wrong & ~missed & ~invented
    total = max(known.sum(), 1)
    picture = _pale(base)
    keys = []
    needed = (background, background, number > 2 or not background)
    for mask, key, shown in zip(
        (missed, invented, confused), MAP_ERRORS, needed
    ):
        if not shown:
            continue
        area = resize(
            mask.astype(np.uint8), base.shape[1::-1], cv2.INTER_NEAREST
        )
        picture[area > 0] = _mix(picture[area > 0], key.color, 0.8)
        text = f'{key.text} {mask.sum() / total:.1%}'
        keys.append(key._replace(text=text))
    if not known.all():
        area = resize(
            (~known).astype(np.uint8), base.shape[1::-1], cv2.INTER_NEAREST
        )
        picture[area > 0] = 225
        _hatch(picture, area > 0, scale)
        keys.append(Key('not labelled, not judged', IGNORED, 'hatched'))
    heading = f'Errors: {wrong.sum() / total:.1%} of the pixels'
    return Panel(heading, picture), keys


def _hatch(picture, where, scale):
    """Stripes over what the truth does not label."""
    if not where.any():
        return
    rows, columns = np.ogrid[: where.shape[0], : where.shape[1]]
    pace = round(6 * scale)
    stripes = where & ((rows + columns) % pace < pace / 3)
    picture[stripes] = IGNORED


# Sheets


class Layout:
    """How many columns panels take, and how large they are.

    Args:
        image (ndarray[H, W, 3]): whose shape all panels have.
        number (int): of panels.
    """

    def __init__(self, image, number):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f'image has shape {list(image.shape)}, expected [H, W, 3]'
            )
        if image.dtype != np.uint8:
            raise ValueError(f'image has dtype {image.dtype}, expected uint8')
        height, width = image.shape[:2]
        best = 0
        for columns in (2, 4, 1):  # two, unless panels get far larger
            rows = -(-number // columns)
            if rows * columns != number:
                continue
            wide = (PAGE - 2 * MARGIN - (columns - 1) * GAP) / columns
            wide = min(wide, TALLEST / rows * width / height)
            if wide > 1.8 * best:
                best, self.columns = wide, columns
        # large images keep their pixels, up to twice the page
        self.scale = min(2, max(1, width / best))
        self.size = (
            max(8, round(best * self.scale)),
            max(8, round(best * self.scale * height / width)),
        )

    def fit(self, image):
        return resize(image, self.size)

    def rows(self, panels):
        starts = range(0, len(panels), self.columns)
        return [panels[i : i + self.columns] for i in starts]


def compose(
    title: str,
    rows: 'list[list[Panel]]',
    legend: 'list[tuple[str, list[Key]]]',
    scale: float,
) -> np.ndarray:
    """Put panels and legend on one page.

    Args:
        title (str): above all.
        rows (list[list[Panel]]): those of a row are equally high.
        legend (list[tuple[str, list[Key]]]): lines, each with its name.
        scale (float): the width of the page, divided by 880 pixels.

    Returns:
        ndarray[H, W, 3]: uint8.
    """
    margin, gap = round(MARGIN * scale), round(GAP * scale)
    head = round(1.9 * MEDIUM * scale)
    top = margin + (round(1.9 * LARGE * scale) if title else 0)
    steps = [head + row[0].picture.shape[0] + gap for row in rows]
    height = top + sum(steps) + _draw_legend(None, legend, 0, scale)
    page = Image.new(
        'RGB', (round(PAGE * scale), height + margin // 2), 'white'
    )
    draw = ImageDraw.Draw(page)
    if title:
        bold = letters(LARGE * scale, bold=True)
        title, bold = _fitting(title, page.width - 2 * margin, bold)
        at = (margin, margin + LARGE * scale / 2)
        draw.text(at, title, fill=INK, font=bold, anchor='lm')
    y = top
    for row, step in zip(rows, steps):
        x = margin
        for heading, picture in row:
            width = picture.shape[1]
            bold = letters(MEDIUM * scale, bold=True)
            heading, bold = _fitting(heading, width, bold)
            at = (x, y + head / 2)
            draw.text(at, heading, fill=INK, font=bold, anchor='lm')
            page.paste(Image.fromarray(picture), (x, y + head))
            x += width + gap
        y += step
    _draw_legend(page, legend, y, scale)
    return np.asarray(page)


def _draw_legend(page, legend, top, scale):
    """Draw lines of keys; return their height, also without a page."""
    draw = page and ImageDraw.Draw(page)
    font, bold = letters(MEDIUM * scale), letters(MEDIUM * scale, bold=True)
    step, box = round(1.7 * MEDIUM * scale), round(1.1 * MEDIUM * scale)
    left = round(MARGIN * scale)
    indent = left
    if any(name for name, _ in legend):
        longest = max(bold.getlength(name) for name, _ in legend)
        indent = left + longest + 12 * scale
    y = top
    for name, keys in legend:
        if draw:
            at = (left, y + step / 2)
            draw.text(at, name, fill=INK, font=bold, anchor='lm')
        x = indent
        for key in keys:
            mark = 1.4 * box if key.style else 0
            wide = mark + font.getlength(key.text) + 16 * scale
            if x + wide > (PAGE - MARGIN) * scale and x > indent:
                x, y = indent, y + step
            if draw:
                if mark:
                    _draw_key(page, key, (x, y + (step - box) / 2), box, scale)
                at = (x + mark, y + step / 2)
                draw.text(at, key.text, fill=INK, font=font, anchor='lm')
            x += wide
        y += step
    return y - top


def _draw_key(page, key, at, box, scale):
    draw = ImageDraw.Draw(page)
    x, y = map(round, at)
    place = (x, y, x + box, y + box)
    if key.style == 'fill':
        draw.rectangle(place, fill=key.color)
    elif key.style == 'empty':
        draw.rectangle(place, outline=key.color)
    elif key.style == 'hatched':
        tile = np.full((box, box, 3), 225, np.uint8)
        _hatch(tile, np.ones((box, box), bool), scale)
        page.paste(Image.fromarray(tile), (x, y))
    else:
        _draw_box(draw, place, Mark(0, key.color, '', key.style), scale)


# Parts


def _at_most(keys):
    more = len(keys) - MOST_KEYS
    if more <= 0:
        return keys
    return [*keys[:MOST_KEYS], Key(f'and {more} more', INK, '')]


def _count(number, one, many):
    return f'{number} {one if number == 1 else many}'


def resize(image, size, interpolation=None):
    """Scale ``ndarray[H, W, ...]`` to ``size`` (width, height)."""
    if interpolation is None:
        smaller = size[0] < image.shape[1]
        interpolation = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return cv2.resize(image, tuple(size), interpolation=interpolation)


def _pale(image):
    """In grey and pale, so that colours stand out; dark images are seen."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low, high = np.percentile(grey, (1, 99))
    grey = ((grey - low) / max(high - low, 1)).clip(0, 1)
    return np.repeat((90 + 165 * grey).astype(np.uint8)[..., None], 3, 2)


def _mix(pixels, color, share):
    mixed = pixels * (1 - share) + np.array(color) * share
    return mixed.astype(np.uint8)


def _ink_on(color):
    """Black or white, whichever can be read on a colour."""
    light = np.dot(color, (0.299, 0.587, 0.114))
    return INK if light > 140 else 'white'


@lru_cache(maxsize=64)
def letters(size, bold=False):
    """A font of matplotlib's, with letters of many languages.

    Args:
        size (float): in pixels.
        bold (bool): bold or regular.
    """
    name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
    folder = osp.join(matplotlib.get_data_path(), 'fonts', 'ttf')
    return ImageFont.truetype(osp.join(folder, name), size)


def _fitting(text, width, font):
    """Make text fit by smaller letters, or if they do not help, by less text.

    Returns:
        tuple[str, ImageFont]
    """
    wide = font.getlength(text)
    if wide > width:
        size = font.size * max(0.75, width / wide)
        font = font.font_variant(size=size)
    while len(text) > 1 and font.getlength(text) > width:
        text = f'{text[:-2]}…'
    return text, font
