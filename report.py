"""
What a run came to: scores as lines for the terminal, and as one page with the loss curves and every row, which opens from
disk; and the losses as a picture.

    python report.py out/scores.json        # the page again, after a change to report_template.html
"""
import json
import math
import sys
from pathlib import Path

from files import write_aside
from rubric import KNOWN, answers, references, turns

POINTS = 400  # of a curve at most: more than a screen shows


def thinned(points):
    """[[x, y], ...] -> at most POINTS of them, means of neighbours; what is not finite is left out."""
    points = [point for point in points if all(isinstance(v, int | float) and math.isfinite(v) for v in point)]
    size = -(-len(points) // POINTS) or 1
    chunks = [points[i:i + size] for i in range(0, len(points), size)]
    return [[sum(column) / len(chunk) for column in zip(*chunk)] for chunk in chunks]


def read_curves(path):
    """-> {train, val: [[step, loss], ...]} of a log.jsonl: a record with val_loss is an evaluation, one with loss a step."""
    curves = {'train': [], 'val': []}
    for line in Path(path).read_text(encoding='utf-8').split('\n') if Path(path).exists() else []:
        try:
            record = json.loads(line)
            name, key = ('val', 'val_loss') if 'val_loss' in record else ('train', 'loss')
            curves[name].append([record['step'], record[key]])
        except (ValueError, KeyError, TypeError):  # a record of another kind, or a last line that is being written
            continue
    return {name: thinned(points) for name, points in curves.items()}


def draw_curves(log, path, title):
    """The losses of a log.jsonl, all of them, as a picture; without matplotlib a line tells of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f'{path} is not drawn; for it: pip install matplotlib')
    records = [json.loads(line) for line in open(log)]
    axes = (figure := Figure(figsize=(7, 4), layout='constrained')).subplots()
    for key, style in {'loss': '-', 'train_loss': 'o--', 'val_loss': 'o-'}.items():
        axes.plot(*zip(*[(r['step'], r[key]) for r in records if key in r]), style, label=key, markersize=3)
    axes.set(xlabel='step', ylabel='nats a supervised token', title=title)
    axes.legend()
    write_aside(path, lambda file: figure.savefig(file, format='png', dpi=150), 'wb')


def finite(value):
    """value without the nan and inf that JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(found, digits=2):
    """An interval as text: 49.51 [45.20, 53.90]."""
    return f'{found["value"]:.{digits}f} [{found["low"]:.{digits}f}, {found["high"]:.{digits}f}]' if found else '-'


def metrics_lines(scores):
    """-> the table of reference metrics, or no line if there are none."""
    table = scores['metrics'].get('all', {})
    sides = [side for side in ('run', 'baseline', 'difference') if any(side in found for found in table.values())]
    lines = [['', *sides]] + [[name, *(figure(found.get(side)) for side in sides)] for name, found in table.items()]
    return [f'{name:18}' + ''.join(f'{text:28}' for text in texts).rstrip() for name, *texts in lines] if sides else []


def summary_lines(scores, log):
    """-> val loss before and after, and five rows with their answers before and after."""
    losses = [loss for _, loss in read_curves(log)['val']]
    lines = [f'val loss: {losses[0]:.3f} before, {losses[-1]:.3f} after'] if len(losses) > 1 else []
    for row in scores['rows'][:5]:
        lines += ['', turns(row['row'])[0].replace('\n\n', '  ')]
        for name, texts in (('reference', references(row['row'])), ('before', row['baseline'].get('replies', [])),
                            ('after', answers(row['row']))):
            text = ' '.join(' '.join(texts).split())
            lines += [f'  {name:10}' + (text[:100] + ' ...' if len(text) > 100 else text)] if texts else []
    return lines


def judge_lines(scores):
    """-> what the judge found: means with their coverage, the paired comparison, how far it can be believed, faults."""
    lines, (least, most), model = [], scores['scale'], scores['judge']['model']
    for who, found in scores['summary'].items():
        total = found['scored'] + found['empty'] + found['failed']
        lines.append(f'{who}: {figure(found["score"])} on {least} to {most} by {model}, over {total - found["failed"]:,} of '
                     f'{total:,} rows, {found["empty"]:,} empty ({least} by rule), {found["failed"]:,} failed')
        if 'spread' in found:
            lines.append(f'{who}: {found["spread"]:.2f} is the spread of a row between seeds')
        if 'orders_disagreed' in found:
            lines.append(f'{who}: {found["orders_disagreed"]:,} times the two orders disagreed, and it counts as a tie')
    if found := scores.get('paired'):
        lines.append(f'run - baseline: {figure(found["difference"])}, {found["win"]:,} won, {found["tie"]:,} tied, '
                     f'{found["loss"]:,} lost, sign test p = {found["p"]:.2g}')
    if found := scores.get('calibration'):
        lines += [f'calibration: {figure(tried["score"])} for {KNOWN[group]}' for group, tried in found['groups'].items()]
        lines += ['calibration: ' + finding for finding in found['findings']]
    if faults := scores['faults']:
        lines.append(f'FAILED: {len(faults):,} judgements, the first: {faults[0]}; the same command asks for them again')
    return lines


def write_report(path, scores, log):
    """Write the page for scores (the content of scores.json) and the log.jsonl at log."""
    data = json.dumps(finite(scores | {'curves': read_curves(log)}), separators=(',', ':'))
    # in a script element text ends at </script and nowhere else; the page itself only ever sets textContent
    data = data.replace('<', '\\u003c')
    template = Path(__file__).with_name('report_template.html').read_text(encoding='utf-8')
    write_aside(path, lambda file: file.write(template.replace('"DATA"', data)))


if __name__ == '__main__':
    source = Path(sys.argv[1])
    write_report(source.with_name(source.name.replace('scores', 'report')).with_suffix('.html'),
                 json.loads(source.read_text(encoding='utf-8')), source.with_name('log.jsonl'))
