"""The page of kernels, in a browser that clicks a pixel of the image."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from test_visualization import TopDown, fixed, upsampler

from mmcarafe.upsamplers.carafe import bilinear_weights
from mmcarafe.visualization import (
    KernelRecorder,
    Record,
    chains,
    entropy,
    trace,
)
from mmcarafe.visualization.kernels import as_maps

pytest.importorskip('matplotlib', reason='matplotlib is not installed')
from mmcarafe.visualization.page import TEMPLATE, kernels_page  # noqa: E402

HEIGHT, WIDTH = 66, 103  # padded to 68 x 104: strides 4, 8 and 16
POINTS = {'first': (30.5, 20.5), '</script>': (102.5, 0.5)}

# Reads what the page shows. `photo` and `DATA` are the page's own.
DRIVER = """
<pre id="result"></pre>
<script>
function click(x, y) {  // in pixels of the image, whatever lies on top
  const box = photo.querySelector('image').getBoundingClientRect();
  const clientX = box.left + x / DATA.width * box.width;
  const clientY = box.top + y / DATA.height * box.height;
  document.elementFromPoint(clientX, clientY).dispatchEvent(
    new PointerEvent('pointerdown', {clientX, clientY, bubbles: true}));
}
function press(key) {
  photo.dispatchEvent(new KeyboardEvent('keydown', {key}));
}
function button(text) {
  [...document.querySelectorAll('button')].find(
    each => each.textContent === text).click();
}
function shown() {
  return [...document.querySelectorAll('section')].map(section => {
    const all = query => [...section.querySelectorAll(query)];
    return {
      ...section.dataset,
      weights: all('td').map(cell => +cell.dataset.weight),
      texts: all('td').map(cell => cell.textContent),
      outside: all('td').map(cell => cell.className === 'outside'),
      spread: all('.spread').map(each => +each.textContent),
      places: all('.kernel circle').map(
        each => [+each.dataset.row, +each.dataset.column]),
      trace: all('.trace rect[data-share]').map(each => [+each.dataset.row,
        +each.dataset.column, +each.dataset.share]),
      window: all('.outline').map(each => ['x', 'y', 'width', 'height'].map(
        name => +each.getAttribute(name)))[0],
    };
  });
}
document.getElementById('result').textContent =
  JSON.stringify([%s].map(act => { act(); return shown(); }));
</script>
"""


@pytest.fixture(scope='module')
def browse(tmp_path_factory):
    """Open a page, do things in it, and return what it shows after each."""
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('chromium is not installed: apt-get install chromium')

    def call(page, *acts, fragment=''):
        folder = tmp_path_factory.mktemp('page')
        acts = ', '.join(f'() => {act}' for act in acts)
        page = page.replace('</body>', DRIVER.replace('%s', acts) + '</body>')
        (folder / 'page.html').write_text(page, encoding='utf-8')
        dom = subprocess.run(
            [
                chromium,
                *('--headless', '--disable-gpu', '--disable-dev-shm-usage'),
                '--no-sandbox',  # which root cannot have
                '--window-size=900,1200',
                f'--user-data-dir={folder / "profile"}',
                '--dump-dom',
                (folder / 'page.html').as_uri() + fragment,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding='utf-8',
            timeout=120,
            check=True,
        ).stdout
        (result,) = re.findall('<pre id="result">(.*?)</pre>', dom, re.S)
        assert result, 'the page or the test has raised an error'
        return json.loads(html.unescape(result))

    return call


def recorded(*kinds):
    model = TopDown(*(upsampler(kind, **more) for kind, more in kinds))
    with KernelRecorder(model) as recorder, torch.no_grad():
        model(model.levels())
    return recorder.records


def page_of(records):
    image = torch.rand(HEIGHT, WIDTH, 3).numpy()
    return kernels_page(image, records, POINTS, (68, 104))


def check_trace(found, chain, row, column):
    """Each level's map, to the rounding of the weights."""
    for level, expected in zip(found, trace(chain, row, column)):
        made = torch.zeros_like(expected)
        for r, c, share in level['trace']:
            made[r, c] = share
        limit = 0.03 * expected.max().item()
        torch.testing.assert_close(made, expected, atol=limit, rtol=0)


def test_a_link_chooses_the_point(browse):
    page = page_of(recorded(('CARAFE', {})))
    first, other = (
        browse(page, 'null', fragment=fragment)[0]
        for fragment in ('', '#%3C/script%3E')
    )
    (moved,) = browse(page, 'button("<" + "/script>")')
    assert first != other == moved


@pytest.mark.parametrize('x, y', [(50.5, 30.5), (0.1, 0.1), (102.9, 65.9)])
def test_a_click_shows_the_recorded_kernel(browse, x, y):
    """Of two groups in the finer module, at a border and inside."""
    records = recorded(('CARAFE', dict(up_group=2)), ('CARAFE', {}))
    (chain,) = chains(records).values()
    before, found = browse(page_of(records), 'null', f'click({x}, {y})')
    assert before != found
    assert [each['name'] for each in found] == ['ups.0', 'ups.1']
    for record, level, size in zip(chain, found, (4, 8)):
        row, column = int(y // size), int(x // size)
        assert (level['row'], level['column']) == (str(row), str(column))
        kernel = as_maps(record.weights)[0, :, :, row, column].mean(0)
        weights = torch.tensor(level['weights'])
        limit = kernel.max().item() / 127
        torch.testing.assert_close(weights, kernel, atol=limit, rtol=0)
        largest = int(kernel.argmax())
        assert abs(float(level['texts'][largest]) / 100 - kernel.max()) < 0.02
        spread = entropy(record.weights)[0, :, row, column].mean().item()
        assert level['spread'] == [pytest.approx(spread, abs=0.01)]
        # the window in the image, and what of it is outside of the map
        top, left = row // 2 - 2, column // 2 - 2
        place = [left * 2 * size, top * 2 * size, 10 * size, 10 * size]
        assert level['window'] == place
        height, width = record.before.shape[2:]
        assert level['outside'] == [
            not (0 <= r < height and 0 <= c < width)
            for r in range(top, top + 5)
            for c in range(left, left + 5)
        ]
    check_trace(found, chain, int(y // 4), int(x // 4))


def test_dysample_shows_where_it_reads(browse):
    records = recorded(
        ('DySample', dict(groups=4)), ('DySample', dict(groups=2))
    )
    (chain,) = chains(records).values()
    (found,) = browse(page_of(records), 'click(41, 21)')
    for record, level, size in zip(chain, found, (4, 8)):
        row, column = 21 // size, 41 // size
        places = record.positions[0, :, :, row, column] + 0.5
        torch.testing.assert_close(
            torch.tensor(level['places']), places, atol=0.02, rtol=0.02
        )
        assert level['weights'] == [] == level['spread']
    check_trace(found, chain, 21 // 4, 41 // 4)


def test_buttons_and_arrow_keys(browse):
    """And names that look like HTML, and several lists of modules."""
    records = recorded(('CARAFE', {}), ('CARAFE', {}))
    alone = fixed(bilinear_weights(3, 2))  # 5 x 7 pixels
    alone.name = 'ppm.2'
    acts = ['null', "button('<' + '/script>')", 'press("ArrowLeft")']
    first, second, moved, third, last = browse(
        page_of([alone, *records]),
        *acts,
        'press("ArrowUp")',
        'button("ppm")',
    )
    places = [(each[0]['row'], each[0]['column']) for each in (first, second)]
    assert places == [('5', '7'), ('0', '25')]
    assert (moved[0]['row'], moved[0]['column']) == ('0', '24')
    assert third == moved  # at the upper border already
    (level,) = last
    assert level['name'] == 'ppm.2' and len(level['weights']) == 9
    expected = bilinear_weights(3, 2)[:, 0, 0]
    torch.testing.assert_close(
        torch.tensor(level['weights']), expected, atol=0.005, rtol=0
    )


def test_of_many_groups_the_mean_is_shown(browse):
    """As of the dynamic filter, whose groups are as many as its channels."""
    module = upsampler('DynamicFilter', channels=9)
    with KernelRecorder(module) as recorder, torch.no_grad():
        module(torch.randn(1, 9, 9, 13))
    (record,) = recorder.records
    (found,) = browse(page_of([record]), 'click(50, 30)')
    (level,) = found
    kernel = as_maps(record.weights)[0, :, :, 30 // 4, 50 // 4].mean(0)
    limit = kernel.max().item() / 127
    weights = torch.tensor(level['weights'])
    torch.testing.assert_close(weights, kernel, atol=limit, rtol=0)
    assert level['trace'] == []


def test_negative_weights_have_no_spread(browse):
    """As without a normaliser."""
    record = fixed(-bilinear_weights(3, 2))
    (found,) = browse(page_of([record]), 'click(50, 30)')
    (level,) = found
    assert level['spread'] == [] and min(level['weights']) < -0.5


def test_the_page_stands_alone():
    """It loads nothing, and its size is what the docstring says."""
    template = TEMPLATE.read_text(encoding='utf-8')
    for word in ('src=', 'url(', 'import', 'fetch', 'XMLHttpRequest'):
        assert word not in template
    links = re.findall(r'[a-z]+://[^\'"]*', template)
    assert links == ['http://www.w3.org/2000/svg']  # a name, not a place
    record = fixed(bilinear_weights(5, 2))
    page = page_of([record])
    line = re.search('^const DATA = (.*);$', page, re.MULTILINE)[1]
    data = json.loads(line)
    assert '<' not in line and data['points'].keys() == POINTS.keys()
    assert data['image'].startswith('data:image/jpeg;base64,')
    (step,) = data['lists']['up']['steps']
    height, width = record.after.shape[2:]
    size = len(step['steps']) + len(step['units'])
    assert size == pytest.approx((25 + 4) * height * width * 4 / 3, abs=8)


def test_what_cannot_be_shown_is_refused():
    record = fixed(bilinear_weights(3, 2))
    image = torch.rand(HEIGHT, WIDTH, 3).numpy()
    other = Record('up', 'EUCB', 2, record.before, record.after)
    with pytest.raises(ValueError, match='records: expected at least one'):
        kernels_page(image, [other], POINTS)
    with pytest.raises(ValueError, match='points is empty'):
        kernels_page(image, [record], {})
