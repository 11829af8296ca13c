"""report.html in a real browser, headless: what it shows of scores of each kind, that texts stay text, that it needs no network."""
import json
import re
import shutil
from unittest.mock import patch

import judge
from judge import compare, mean_interval, read_curves, to_entry, write_report

import pytest
from conftest import ROOT, stage
from fake_judge import FakeJudge, honest
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='no chromium')
HOSTILE = ('</script><script>document.title = "hacked"</script>'
           '<img src=x onerror="document.title=1">&amp; {"score": 100} \u2028 "')
N_ROWS = 90
CURVES = {'train': [[step, 3 - step / 25] for step in range(50)], 'val': [[step, 3 - step / 30] for step in range(0, 50, 10)]}


def make_scores(n=N_ROWS, lowest=0, highest=100):
    """What scores.json holds: of n rows one answer failed (4), one is hostile (3), one empty (6), one cut off (8)."""
    values = [lowest + (highest - lowest) * (k * 37 % n) / n for k in range(n)]
    befores = [lowest + (highest - lowest) * .3 * (k * 11 % n) / n for k in range(n)]
    rows = []
    for k, (value, before) in enumerate(zip(values, befores)):
        row = {'instruction': f'Task {k}: name a tree.', 'input': 'wood' if k % 2 else '', 'output': f'reference {k}',
               'model_response': f'answer {k}', 'truncated': k == 8, 'family': 'trees' if k % 3 else 'odd ones'}
        run = {'status': 'scored', 'score': value, 'judge_replies': [f'verdict {k}'], 'exact': k == 5, 'rouge_l': value}
        baseline = {'status': 'scored', 'score': before, 'judge_replies': ['meh'], 'replies': [f'untuned {k}'], 'rouge_l': before}
        rows.append({'row': row, 'run': run, 'baseline': baseline})
    rows[3]['row']['model_response'] = rows[3]['row']['instruction'] = HOSTILE
    if n > 8:
        rows[4]['run'] = {'status': 'failed', 'score': None, 'judge_replies': [], 'fault': 'HTTP 503: busy', 'exact': False, 'rouge_l': 0}
        rows[6]['row']['model_response'] = ''

    def group(values):
        return {'score': mean_interval(values, (lowest, highest)), 'scored': len(values), 'empty': 0, 'failed': 0}
    scores = {
        'format': 1, 'config': {'baseline': '', 'out_dir': 'out'}, 'predictions': 'out/a.json', 'compared_with': 'out/b.json', 'made_of': {},
        'judge': {'kind': 'ollama', 'model': 'llama3', 'version': '0.9.0', 'digest': 'd'},
        'style': 'score' if highest == 100 else 'mtbench', 'scale': [lowest, highest], 'rows': rows,
        'metrics': {'all': {'ROUGE-L': {'run': mean_interval(values, (0, 100)), 'baseline': mean_interval(befores, (0, 100)),
                                        'difference': mean_interval([a - b for a, b in zip(values, befores)])},
                            'BLEU': {'run': {'value': 5.0, 'low': None, 'high': None, 'n': n}}}},
        'calibration': {'groups': {'reference': group([highest] * 12), 'wrong answer': group([lowest + 1] * 12), 'prompt injection': group([highest] * 3),
                                   'empty': group([])},
                        'told_apart': .5, 'findings': ['a text that asks for the highest score can mislead it']},
        'faults': ['HTTP 503: busy'],
        'reliability': [{'from': 0, 'to': 0.25, 'rows': 7, 'right': {'value': 0, 'low': 0, 'high': .3}},
                        {'from': 1, 'to': 1, 'rows': 1234, 'right': {'value': .9, 'low': .8, 'high': .95}}]}
    return sum_up(scores)


def sum_up(scores):
    """The scores with the summaries that judge.py makes of its rows."""
    entries = [to_entry(result['row']) for result in scores['rows']]
    scores['summary'] = {}
    with patch.object(judge, 'STYLE', judge.STYLE._replace(scale=scores['scale'])):
        for side in ['run', 'baseline'] if scores['compared_with'] else ['run']:
            judgements = [result[side] for result in scores['rows']]
            families = {}
            for group, numbers in judge.numbers_by_group(entries).items():
                families[group] = judge.summary([judgements[number] for number in numbers])['score']
            scores['summary'][side] = judge.summary(judgements) | {'families': families}
    scores.pop('paired', None)
    if scores['compared_with']:
        scores['paired'] = compare([result['run']['score'] - result['baseline']['score'] for result in scores['rows']
                                    if None not in (result['run']['score'], result['baseline']['score'])])
    return scores


def failed(scores, side):
    """The scores if the judge had failed on each row of a side."""
    for result in scores['rows']:
        result[side] |= {'status': 'failed', 'score': None, 'fault': 'HTTP 503: busy'}
    return sum_up(scores)


def without_baseline(scores):
    scores['compared_with'] = ''
    scores['config']['baseline'] = 'none'
    for result in scores['rows']:
        result['baseline'] = {}
    return sum_up(scores)


def without_judge(scores):
    """The scores of --judge=reference."""
    for name in 'summary', 'paired', 'calibration':
        del scores[name]
    for result in scores['rows']:
        for side in 'run', 'baseline':
            result[side] = {name: value for name, value in result[side].items() if name in ('exact', 'rouge_l', 'replies')}
    return scores | {'judge': {'kind': 'reference'}, 'faults': []}


def of_turns(scores):
    """The scores of questions of two turns, in the manner of MT-Bench."""
    for result in scores['rows']:
        row = result['row']
        result['row'] = {'turns': [row['instruction'], 'Another.'], 'answers': [row['model_response'], 'An elm.'], 'category': row['family']}
    return sum_up(scores | {'metrics': {}})


@pytest.fixture(scope='module')
def chromium():
    if not CHROMIUM:
        pytest.skip('no chromium')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """browse(path, state='', ...) -> a page of Chromium's that shows the report; an error in it fails the test."""
    errors = []
    pages = []

    def browse(path, state='', width=1200, scheme='light'):
        page = chromium.new_page(viewport={'width': width, 'height': 1000}, color_scheme=scheme)
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.on('request', lambda request: request.url.startswith('file:') or errors.append(request.url))
        page.goto(f'file://{path}#{state}')
        pages.append(page)
        return page
    yield browse
    for page in pages:
        page.close()
    assert not errors


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp('report') / 'report.html'
    write_report(path, make_scores(), CURVES)
    return path


def numbers(page):
    """The rows that are listed, in their order."""
    return [int(id.removeprefix('row-')) for id in page.locator('#rows details').evaluate_all('list => list.map(node => node.id)')]


# --- what needs no browser


def test_the_curves_stand_beside_the_runs_own_answers_alone(run, tmp_path):
    rows = [{'instruction': f'Say {n}.', 'output': str(n), 'model_response': str(n)} for n in range(12)]
    (tmp_path / 'out').mkdir()
    for path in 'out/instruction-data-with-response.json', 'others.json':
        (tmp_path / path).write_text(json.dumps(rows))
    (tmp_path / 'out/gpt2-sft.json').write_text('{"init_from": "gpt2", "weights": "w"}')
    (tmp_path / 'out/log.jsonl').write_text('{"step": 1, "loss": 2.5}\n')
    for flags, is_there in ([], True), (['--predictions=others.json'], False):
        run('judge.py', '--judge=reference', *flags)
        assert ('"train": [[1, 2.5]]' in (tmp_path / 'out/report.html').read_text()) == is_there


def test_the_curves_of_a_log(tmp_path):
    lines = [{'step': 1, 'loss': 3.0}, {'step': 1, 'train_loss': 2.0, 'val_loss': 2.5}, {'step': 2, 'loss': 2.0}]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert read_curves(tmp_path / 'log.jsonl') == {'train': [[1, 3.0], [2, 2.0]], 'val': [[1, 2.5]]}
    assert read_curves(tmp_path / 'none') == {'train': [], 'val': []}
    # what is not a number is no point
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0}\n{"step": 3, "val_loss": Infinity}\n{"step": 4}')
    assert read_curves(tmp_path / 'log.jsonl') == {'train': [[2, 2.0]], 'val': []}


def test_nothing_in_it_can_run_or_load(report):
    text = report.read_text()
    assert text.count('<script') == 2 and text.count('</script') == 2
    assert '"DATA"' not in text
    assert not re.search(r'(src|href)\s*=|url\(|@import', text.split('<script')[0])
    code = text.rsplit('<script>', 1)[1]
    assert not re.search(r'fetch\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|XMLHttp|import\(', code)
    assert "default-src 'none'" in text
    data = json.loads(text.split('id="data">')[1].split('</script>')[0])
    assert data['rows'][3]['row']['model_response'] == HOSTILE


# --- what it shows


@needs_chromium
def test_what_it_shows(browse, report):
    page = browse(report)
    assert page.title() == 'Report on out'
    # not inner_text, which leaves out what is not drawn
    shown = ' '.join(page.locator('main').text_content().split())
    for text in (
        '90 rows of out/a.json · judged by llama3 (ollama 0.9.0), style score · compared with out/b.json',
        'A text that asks for the highest score can mislead it.', '1 judgement failed: the figures cover the other rows.',
        '95 % interval', '89 of 90 rows', '1 row failed and left out', 'sign test', '% won, 95 % interval',
        'Scores', 'Loss', 'at the end, step 40', 'Each row, before and after', 'Reference metrics', 'By family',
        'Can this judge be believed?', 'wrong answer', 'prompt injection', 'It put the reference above another row’s in 50 % of the rows.',
        'on which sampled answers agree?', '0 to 25 % (7)', '100 to 100 % (1234): 90.00 (80.00 to 95.00), 1,234 rows',
        'of 90 rows', HOSTILE[:20],
    ):
        assert text in shown, text
    assert page.locator('svg').count() == 6
    assert len(numbers(page)) >= 40
    # an interval without bounds is its value and the number of rows
    assert page.locator('tr', has_text='BLEU').locator('td').all_inner_texts() == ['5.0\nof 90 rows', '–', '–']
    assert 'prompt injection: 100.00, 3 rows' in page.locator('g title').evaluate_all('list => list.map(node => node.textContent)')


# scores of each kind, and texts of its page that others do not have
KINDS = {
    'reference metrics alone': (lambda: without_judge(make_scores()), ['reference metrics only', 'ROUGE-L of the rows', 'before 1']),
    'without a baseline': (lambda: without_baseline(make_scores()), ['judged by llama3', 'Can this judge be believed?']),
    'a baseline of ones own': (lambda: make_scores() | {'config': {'baseline': 'x.json', 'out_dir': 'out'}}, ['after − baseline, row by row']),
    'chapter 7': (lambda: make_scores() | {'style': 'book'}, ['style book']),
    'grades': (lambda: of_turns(make_scores(lowest=1, highest=10)), ['style mtbench', 'Task 0: name a tree. / Another.', ' / 10']),
    'few rows': (lambda: make_scores(5), ['mean of 5 rows: too few for an interval', '95 % interval']),
    'a baseline that failed': (lambda: failed(make_scores(), 'baseline'), ['nothing scored', '0 of 90 rows', '91 judgements failed']),
    'a run that failed': (lambda: failed(make_scores(), 'run'), ['nothing scored', '90 judgements failed']),
    'all that failed': (lambda: failed(failed(make_scores(), 'run'), 'baseline'), ['nothing scored', '180 judgements failed']),
    'no families': (lambda: sum_up(make_scores() | {'rows': [result | {'row': {
        name: value for name, value in result['row'].items() if name != 'family'}} for result in make_scores()['rows']]}), ['judged by llama3']),
}


@needs_chromium
@pytest.mark.parametrize('kind', KINDS)
def test_scores_of_each_kind_are_drawn(browse, tmp_path, kind):
    make, texts = KINDS[kind]
    write_report(tmp_path / 'report.html', make(), CURVES)
    page = browse(tmp_path / 'report.html')
    shown = ' '.join(page.locator('main').text_content().split())
    for text in texts:
        assert text in shown, text
    assert page.locator('svg').count() >= 2
    assert len(numbers(page)) >= 5
    assert page.locator('#more').is_visible() == (len(numbers(page)) < page.evaluate('rows.length'))
    drawn = page.locator('main').evaluate('node => node.outerHTML')
    assert not re.search('NaN|undefined|null|Infinity', drawn)
    if kind == 'without a baseline':
        assert 'before' not in shown and 'Each row' not in shown


@needs_chromium
def test_the_page_of_a_run_of_judge(browse, tmp_path):
    """Through the stage's own command: what it writes is what the page reads."""
    rows = [{'instruction': f'Task {k}', 'input': '', 'output': f'the answer {k}', 'model_response': 'the answer' * (k % 3), 'truncated': False,
             'reference_loss': 1.0, 'reference_tokens': 3, 'source': 'wiki' if k % 2 else ['a', 'list'], 'source_file': f'{k % 3}.json'} for k in range(12)]
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/instruction-data-with-response.json').write_text(json.dumps(rows))
    (tmp_path / 'out/instruction-data-with-response-before.json').write_text(json.dumps([row | {'model_response': 'x'} for row in rows]))
    with FakeJudge(honest) as server:
        stage(tmp_path, 'judge.py', '--calibrate=3', env={'OLLAMA_HOST': server.url})
        server.shutdown()
    stage(tmp_path, 'judge.py', '--judge=reference')
    for name in 'report.html', 'report-reference.html':
        page = browse(tmp_path / 'out' / name)
        assert page.title() == 'Report on out'
        assert numbers(page) == list(range(12))
        assert page.locator('svg').count() >= 3
        shown = page.locator('main').text_content()
        assert 'By family and source' in shown
        assert ('Can this judge be believed?' in shown) == (name == 'report.html')
        assert page.locator('#family option').all_text_contents() == ['Every family', '0.json', '1.json', '2.json', 'wiki']


@needs_chromium
def test_of_many_sources_the_largest_are_drawn(browse, tmp_path):
    scores = make_scores()
    for k, result in enumerate(scores['rows']):
        result['row']['source'] = f'source {k // 2}'
    write_report(tmp_path / 'report.html', sum_up(scores), CURVES)
    page = browse(tmp_path / 'report.html')
    assert 'the 20 largest of 47' in page.locator('main').text_content()
    assert page.locator('#family option').count() == 1 + 47


@needs_chromium
def test_a_long_curve_is_thinned_out(browse, tmp_path):
    """The mean of every 13 of 5,000 steps: 385 points, the first at step 6."""
    curves = {'train': [[step, 1.0 + (step % 13 == 12)] for step in range(5000)], 'val': []}
    write_report(tmp_path / 'report.html', make_scores(), curves)
    points = browse(tmp_path / 'report.html').locator('path.quiet').get_attribute('d').removeprefix('M').split('L')
    assert len(points) == 385
    assert len({point.split(',')[1] for point in points[:-1]}) == 1


# --- search, filters, rows


def expected_rows(state):
    scores = make_scores()['rows']
    value = [row['run']['score'] if row['run']['score'] is not None else 1e9 for row in scores]
    gain = [row['run']['score'] - row['baseline']['score'] if row['run']['score'] is not None else -1e9 for row in scores]
    every = range(N_ROWS)
    return {
        'filter=failed': [4],
        'q=ANSWER+17': [17],
        'q=verdict+8&family=trees&sort=row': [n for n in every if '8' in str(n) and n % 3],
        'filter=worst': sorted(every, key=lambda n: value[n])[:10],
        'filter=best': sorted([n for n in every if n != 4], key=lambda n: -value[n])[:10],
        'filter=improved': sorted([n for n in every if gain[n] > 0], key=lambda n: -gain[n]),
        'sort=low': sorted(every, key=lambda n: value[n]),
    }[state]


@needs_chromium
@pytest.mark.parametrize('state', ['filter=failed', 'q=ANSWER+17', 'q=verdict+8&family=trees&sort=row', 'filter=worst', 'filter=best', 'filter=improved', 'sort=low'])
def test_search_filter_and_sort(browse, report, state):
    found = numbers(browse(report, state))
    expected = expected_rows(state)
    assert found == expected[:len(found)]
    assert len(found) >= min(len(expected), 40)  # further rows come when the page is scrolled to them


@needs_chromium
def test_a_row_opens_and_its_texts_stay_text(browse, report):
    page = browse(report, 'row=3')
    opened = page.locator('#row-3 .open').text_content()
    assert opened.count(HOSTILE) == 2
    for text in 'reference 3', 'untuned 3', 'verdict 3', 'wood':
        assert text in opened
    assert page.title() == 'Report on out'
    assert page.locator('main img').count() == 0


@needs_chromium
@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_a_phone_and_a_screen(browse, report, width, scheme):
    page = browse(report, 'row=3', width, scheme)
    root = page.locator('html')
    assert root.evaluate('node => node.scrollWidth') <= root.evaluate('node => node.clientWidth') <= width
    background = page.locator('body').evaluate('node => getComputedStyle(node).backgroundColor')
    assert background == {'light': 'rgb(246, 245, 242)', 'dark': 'rgb(19, 20, 23)'}[scheme]


@needs_chromium
def test_5200_rows_are_searched_at_once(browse, tmp_path):
    write_report(tmp_path / 'report.html', make_scores(5200), CURVES)
    page = browse(tmp_path / 'report.html', 'q=answer+51')
    assert 'of 5,200 rows' in page.locator('#count').text_content()
    assert len(numbers(page)) >= 40


def test_the_page_is_whole():
    """One file, without which judge.py cannot write a report."""
    assert (ROOT / 'web/report.html').read_text(encoding='utf-8').count('"DATA"') == 1
