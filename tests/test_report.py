"""report.html in a real browser, headless: what it shows, that it stays text, that it needs no network."""
import html
import json
import re
import shutil
import subprocess

import pytest

from judge import compare, mean_interval, read_curves, write_report

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
HOSTILE = ('</script><script>document.title = "hacked"</script>'
           '<img src=x onerror="document.title=1">&amp; {"score": 100} \u2028 "')
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='no chromium')


def make_scores(n=90):
    values, befores = [100 * (k * 37 % n) / n for k in range(n)], [30 * (k * 11 % n) / n for k in range(n)]
    rows = [{'row': {'instruction': f'Task {k}: name a tree.', 'input': 'wood' if k % 2 else '',
                     'output': f'reference {k}', 'model_response': f'answer {k}', 'truncated': k == 8,
                     'family': 'trees' if k % 3 else 'odd ones'},
             'run': {'status': 'scored', 'score': value, 'scores': [value], 'judge_replies': [f'verdict {k}'], 'exact': k == 5,
                     'rouge_l': value},
             'baseline': {'status': 'scored', 'score': low, 'scores': [low], 'judge_replies': ['meh'], 'replies': [f'earlier {k}']}}
            for k, (value, low) in enumerate(zip(values, befores))]
    rows[3]['row']['model_response'] = rows[3]['row']['instruction'] = HOSTILE
    rows[4]['run'] = {'status': 'failed', 'score': None, 'scores': [], 'judge_replies': [], 'fault': 'HTTP 503: busy',
                      'exact': False, 'rouge_l': 0}
    rows[6]['row']['model_response'] = ''
    counts = {'scored': n - 1, 'empty': 0, 'failed': 1}
    group = {'score': mean_interval([90, 100, 95]), 'scored': 3, 'empty': 0, 'failed': 0}
    return {
        'format': 1, 'config': {'baseline': '', 'out_dir': 'out'}, 'predictions': 'out/a.json',
        'compared_with': 'out/b.json', 'judge': {'kind': 'ollama', 'model': 'llama3', 'version': '0.9.0', 'digest': 'd'},
        'style': 'score', 'scale': [0, 100],
        'metrics': {'all': {'ROUGE-L': {'run': mean_interval(values), 'baseline': mean_interval(befores),
                                        'difference': mean_interval(values)}}},
        'summary': {'run': counts | {'score': mean_interval(values)}, 'baseline': counts | {'score': mean_interval(befores)}},
        'paired': compare([a - b for a, b in zip(values, befores)]), 'faults': ['HTTP 503: busy'], 'rows': rows,
        'calibration': {'groups': {'ceiling': group, 'floor': group, 'swaying': group, 'empty': group}, 'told_apart': .5,
                        'findings': ['floor and ceiling overlap']},
        'reliability': [{'from': 0, 'to': 0.25, 'rows': 7, 'agreement': .2, 'right': {'value': 0, 'low': 0, 'high': .3}},
                        {'from': 1, 'to': 1, 'rows': 1234, 'agreement': 1, 'right': {'value': .9, 'low': .8, 'high': .95}}],
    }


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    with open(folder / 'log.jsonl', 'w') as log:
        for step in range(50):
            log.write(json.dumps({'step': step, 'loss': 3 - step / 25}) + '\n')
            if step % 10 == 0:
                log.write(json.dumps({'step': step, 'train_loss': 2, 'val_loss': 3 - step / 30}) + '\n')
        log.write('{"step": 50, "lo')
    write_report(folder / 'report.html', make_scores(), read_curves(folder / 'log.jsonl'))
    return folder / 'report.html'


def browse(page, state='', *flags, width=1200):
    """-> the page's DOM after its script ran, as Chromium writes it."""
    profile = page.parent / 'profile'
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run([
        CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
        '--disable-background-networking', '--disable-component-update', f'--user-data-dir={profile}',
        f'--window-size={width},1000', '--virtual-time-budget=2000', '--dump-dom', *flags, f'file://{page}#{state}'],
        capture_output=True, text=True, timeout=60)
    return done.stdout


def numbers(dom):
    return [int(n) for n in re.findall(r'<details id="row-(\d+)"', dom)]


def test_curves(page, tmp_path):
    curves = read_curves(page.parent / 'log.jsonl')
    assert curves['train'][0] == [0, 3] and len(curves['train']) == 50 and len(curves['val']) == 5
    assert read_curves(tmp_path / 'none') == {'train': [], 'val': []}
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0}\n{"step": 3, "val_loss": Infinity}\n{"step": 4}')
    assert read_curves(tmp_path / 'log.jsonl') == {'train': [[2, 2.0]], 'val': []}


@needs_chromium
def test_a_long_curve_is_thinned_out(tmp_path):
    """The mean of every 13 of 5,000 steps: 385 points, the first at step 6."""
    curves = {'train': [[step, 1.0 + (step % 13 == 12)] for step in range(5000)], 'val': []}
    write_report(tmp_path / 'report.html', make_scores(), curves)
    points = re.search(r'class="path quiet" d="M([^"]+)"', browse(tmp_path / 'report.html'))[1].split('L')
    assert len(points) == 385 and len({point.split(',')[1] for point in points[:-1]}) == 1


def test_nothing_in_it_can_run_or_load(page):
    text = page.read_text()
    assert text.count('<script') == 2 and text.count('</script') == 2 and '"DATA"' not in text
    assert not re.search(r'(src|href)\s*=|url\(|@import', text.split('<script')[0])
    code = text.rsplit('<script>', 1)[1]
    assert not re.search(r'fetch\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|XMLHttp|import\(', code)
    assert "default-src 'none'" in text
    data = json.loads(text.split('id="data">')[1].split('</script>')[0])
    assert data['rows'][3]['row']['model_response'] == HOSTILE


@needs_chromium
def test_what_it_shows(page):
    dom = browse(page)
    shown = html.unescape(re.sub(r'<[^>]+>', ' ', dom.split('<script type="application/json"')[0]))
    assert '<title>Report on out</title>' in dom
    for text in ('judged by llama3', '95 % interval', '89 of 90 rows', '1 row failed', 'won', 'sign test', 'Loss', 'Scores',
                 'Each row, before and after', 'Reference metrics', 'Can this judge be believed?', 'By family',
                 'on which sampled answers agree?', '0 to 25 % (7)', '100 to 100 % (1234): 90.00 (80.00 to 95.00), 1,234 rows',
                 'Floor and ceiling overlap.', '90 of 90 rows', 'at the end, step 40'):
        assert text in shown, text
    assert dom.count('<svg') == 6 and 'NaN' not in dom.split('<script')[0] and len(numbers(dom)) >= 40
    assert '<img' not in dom.split('<script type')[0] and HOSTILE[:20] in shown


@needs_chromium
@pytest.mark.parametrize('state, expected', [
    ('filter=failed', [4]), ('q=ANSWER+17', [17]), ('q=verdict+8&family=trees&sort=row', None),
    ('filter=worst', None), ('filter=best', None), ('filter=improved', None), ('sort=low', None)])
def test_search_filter_and_sort(page, state, expected):
    found, scores = numbers(browse(page, state)), make_scores()['rows']
    value = [row['run']['score'] if row['run']['score'] is not None else 1e9 for row in scores]
    gain = [row['run']['score'] - row['baseline']['score'] if row['run']['score'] is not None else -1e9 for row in scores]
    every = range(90)
    expected = expected or {
        'filter=worst': sorted(every, key=lambda n: value[n])[:10],
        'filter=best': sorted([n for n in every if n != 4], key=lambda n: -value[n])[:10],
        'filter=improved': sorted([n for n in every if gain[n] > 0], key=lambda n: -gain[n]),
        'sort=low': sorted(every, key=lambda n: value[n]),
    }.get(state, [n for n in every if '8' in str(n) and n % 3])
    assert found == expected[:len(found)] and len(found) >= min(len(expected), 40)


@needs_chromium
def test_a_row_opens_and_stays_text(page):
    dom = browse(page, 'row=3')
    opened = html.unescape(re.sub('</?mark>', '', re.search(r'<div class="open">.*?</div>', dom, re.DOTALL)[0]))
    assert opened.count(HOSTILE) == 2
    for text in ('reference 3', 'earlier 3', 'verdict 3', 'wood'):
        assert text in opened
    assert '<title>Report on out</title>' in dom


@needs_chromium
def test_no_scrolling_sideways_on_a_phone(page):
    # headless windows are 500 pixels wide at least, so the phone is a frame of 390
    frame = page.with_name('frame.html')
    frame.write_text(f"""<iframe src="file://{page}#row=3" style="width:390px;height:900px"></iframe><p></p><script>
        onload = () => setTimeout(() => {{
            const page = document.querySelector('iframe').contentDocument.documentElement
            document.querySelector('p').textContent = `wide ${{page.scrollWidth}} of ${{page.clientWidth}}`
        }}, 300)</script>""")
    dom = browse(frame, '', '--allow-file-access-from-files')
    wide, room = map(int, re.search(r'wide (\d+) of (\d+)', dom).groups())
    assert wide <= room <= 390


@needs_chromium
def test_5200_rows(tmp_path):
    write_report(tmp_path / 'report.html', make_scores(5200), read_curves(tmp_path / 'log.jsonl'))
    dom = browse(tmp_path / 'report.html', 'q=answer+51')
    assert 'of 5,200 rows' in dom and len(numbers(dom)) >= 40
