"""
Score the predictions that sample.py wrote: reference metrics always, and a language model's judgement of every answer.

    python judge.py config/sft_medium.py
    python judge.py config/sft_medium.py --judge=reference
    python judge.py --judge=openai --judge_url=http://127.0.0.1:8000 --judge_model=some-model
    python judge.py --judge_style=mtbench --predictions=out/question-answers.json

Writes scores.json and report.html into out_dir (scores-mtbench.json and so on in the other styles), and appends each of
the judge's answers to judge.jsonl as it comes: a run goes on where it was stopped, and a repeated one asks nothing.
Exit 1 if the judge failed on a row.
"""
import json
import random
import statistics
import sys
from pathlib import Path

from ask import TRIES, Server, ask_all
from config import UserError, configure
from files import write_json
from metrics import interval, paired, reference_metrics
from report import judge_lines, metrics_lines, summary_lines, write_report
from rubric import (
    KNOWN,
    LIMITS,
    PROMPTS,
    READERS,
    SCALES,
    SCHEMAS,
    SWAYING,
    answers,
    judgement,
    questions,
    references,
    turns,
)

# -----------------------------------------------------------------------------
# files
out_dir = 'out'  # where sample.py's predictions are and the scores go
predictions = ''  # predictions, or answers to questions; empty: <out_dir>/instruction-data-with-response.json
baseline = ''  # predictions to compare with; empty: the same name with -before, the untuned model's, if it is there
# judge
judge = 'ollama'  # 'ollama', 'openai' (any server with /v1/chat/completions), 'reference' (metrics only, no server)
judge_model = 'llama3'  # a model of that server
judge_url = ''  # the server's base; empty: OLLAMA_HOST or http://127.0.0.1:11434
judge_style = 'score'  # 'score' (0 to 100), 'mtbench' (1 to 10, explained), 'pairwise' (against the baseline)
judge_seeds = 1  # times that each question is asked; more than one need a temperature
judge_temperature = 0.0  # 0: the likeliest answer
calibrate = 20  # rows on which the judge itself is tried, with answers of known worth; 0: none
seed = 123  # of the judge's answers, the calibration's rows and the intervals
# server
judge_workers = 1  # questions asked at the same time
judge_timeout = 300.0  # seconds that an answer may take
judge_backoff = 1.0  # seconds before a failed request is sent again; doubled each time
# -----------------------------------------------------------------------------
config = configure(globals())


def read_predictions(path):
    """-> the rows of a file of predictions, or of answers to questions. UserError if one lacks what the judge needs."""
    try:
        rows = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'there is no {path}; write it with: python sample.py') from None
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} holds no list of rows')
    for number, row in enumerate(rows):
        try:
            texts = turns(row) + answers(row) + references(row)
            good = 0 < len(answers(row)) <= len(turns(row)) and all(isinstance(text, str) for text in texts)
        except (KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise UserError(f'{path}: row {number} lacks the texts of instruction, output and model_response, or '
                            'of turns and answers')
    return rows


def known_answers(rows):
    """
    -> {group of KNOWN: contests}, over `calibrate` rows with a reference. In the pairwise style each group's answer meets
    the reference, and the reference itself the floor.
    """
    able = [row for row in rows if len(turns(row)) == 1 and ''.join(references(row)).strip()]
    random.Random(seed).shuffle(able)
    groups = {group: [] for group in KNOWN}
    for n, row in enumerate(able[:calibrate]):
        right = references(row)
        other = next((references(other) for other in able[n + 1:] + able[:n] if references(other) != right), None)
        for group, replies in zip(groups, (right, other, [SWAYING[n % len(SWAYING)]], [''])):
            if other:
                groups[group].append((row, replies, other if group == 'ceiling' else right))
    return groups


def judge_all(server, groups):
    """{group: [(row, replies, rival's replies), ...]} -> {group: [judgement, ...]}, asked in this order."""
    entries = {group: [questions(judge_style, *contest, by_rule=group != 'empty') for contest in groups[group]]
               for group in groups}
    prompts = [entry for group in entries for row in entries[group] for entry in row if isinstance(entry, str)]
    # a token is a byte at least, so this many hold any prompt; rounded, so that another row seldom changes every request
    limit = LIMITS[judge_style]
    need = max([len(prompt.encode('utf-8', 'replace')) for prompt in prompts], default=0) + TRIES * (limit + 100)
    context = min(max(-(-need // 2048) * 2048, 4096), 32768)
    bodies = [server.body(prompt, SCHEMAS[judge_style], seed + n, judge_temperature, context, limit)
              for prompt in prompts for n in range(judge_seeds)]
    replies = iter(ask_all(server, bodies, READERS[judge_style], Path(out_dir, 'judge.jsonl'), judge_workers))
    return {group: [
        judgement(judge_style, row, [next(replies) for entry in row if isinstance(entry, str) for _ in range(judge_seeds)],
                  judge_seeds) for row in entries[group]] for group in entries}


def summary(rows, judged):
    """-> {score: interval, scored, empty, failed, ...} of judgements; by family too, where rows carry one."""
    kept = [(row, j) for row, j in zip(rows, judged) if j['status'] != 'failed']
    found = {'score': interval([j['score'] for _, j in kept], seed)}
    found |= {status: sum(j['status'] == status for j in judged) for status in ('scored', 'empty', 'failed')}
    if judge_seeds > 1:
        found['spread'] = statistics.mean([statistics.stdev(j['scores']) for _, j in kept if j['scores']] or [0.0])
    if judge_style == 'pairwise':
        found['orders_disagreed'] = sum(pair not in ('AB', 'BA', 'CC') for _, j in kept for pair in j.get('verdicts', []))
    families = {}
    for row, j in kept:
        families.setdefault(row.get('family') or row.get('category') or '', []).append(j['score'])
    if set(families) - {''}:
        found['families'] = {name: interval(families[name], seed) for name in sorted(families)}
    return found


def calibration(judged):
    """-> {groups: {group: summary}, told_apart: share of rows whose reference beat another's, findings: [sentences]}."""
    groups = {group: summary([{}] * len(judged[group]), judged[group]) for group in KNOWN}
    pairs = [(a['score'], b['score']) for a, b in zip(judged['ceiling'], judged['floor'])
             if None not in (a['score'], b['score'])]
    if not pairs:
        return {'groups': groups, 'told_apart': None, 'findings': ['the judge could not be tried']}
    ceiling, floor = groups['ceiling']['score'], groups['floor']['score']
    findings = []
    if ceiling['low'] <= floor['high']:
        findings.append("this judge cannot tell a reference from another row's: floor and ceiling overlap, "
                        'and its scores mean nothing')
    for group in ('swaying', 'empty'):
        tried = groups[group]['score']
        if tried and tried['low'] > floor['high']:
            findings.append(f'{KNOWN[group]} scores {tried["value"]:.1f}, above a wrong answer: this judge can be misled')
    return {'groups': groups, 'told_apart': sum(a > b for a, b in pairs) / len(pairs), 'findings': findings}


if __name__ == '__main__':
    if judge not in ('ollama', 'openai', 'reference'):
        raise UserError(f"judge={judge!r} is none of 'ollama', 'openai', 'reference'")
    if judge_style not in SCALES:
        raise UserError(f'judge_style={judge_style!r} is none of ' + ', '.join(map(repr, SCALES)))
    if judge_seeds > 1 and not judge_temperature:
        raise UserError(f'judge_seeds={judge_seeds} would ask for the same answer again: set --judge_temperature=0.7 or so')
    if min(judge_seeds, judge_workers) < 1 or min(judge_temperature, calibrate, judge_backoff) < 0 or judge_timeout <= 0:
        raise UserError('judge_seeds and judge_workers start at 1, judge_temperature, calibrate and judge_backoff at 0')
    path = Path(predictions or Path(out_dir, 'instruction-data-with-response.json'))
    rows, before = read_predictions(path), Path(baseline or path.with_name(path.stem + '-before.json'))
    others = read_predictions(before) if baseline or before.exists() else []
    if others and [turns(row) for row in others] != [turns(row) for row in rows]:
        raise UserError(f'{before} and {path} do not hold the same questions in the same order')
    if judge_style == 'pairwise' and not others:
        raise UserError(f'judge_style=pairwise compares with a baseline, and there is no {before}: name one with --baseline')
    if judge_style == 'score' and judge != 'reference' and not all(map(references, rows)):
        raise UserError(f'judge_style=score needs the correct answers, which {path} lacks: use --judge_style=mtbench')

    scores = {'format': 1, 'config': config, 'predictions': str(path), 'compared_with': str(before) if others else '',
              'judge': {'kind': judge}, 'style': judge_style, 'scale': SCALES[judge_style], 'metrics': {}}
    results = [{'row': row, 'run': {}, 'baseline': {}} for row in rows]
    for result, other in zip(results, others):
        result['baseline']['replies'] = answers(other)
    if not any('turns' in row for row in rows):  # an open question has no one answer to match
        scores['metrics'], each = reference_metrics(rows, others, seed)
        for who in each:
            for result, found in zip(results, each[who]):
                result[who] |= found
    print('', *metrics_lines(scores), sep='\n', flush=True)  # before the judge, which may not be there

    if judge != 'reference':
        server = Server(judge, judge_model, judge_url, judge_timeout, judge_backoff)
        server.check()
        groups = {'run': [(row, answers(row), answers(other)) for row, other in zip(rows, others or rows)]}
        if others and judge_style != 'pairwise':
            groups['baseline'] = [(row, answers(row), []) for row in others]
        judged = judge_all(server, groups | (known_answers(rows) if calibrate else {}))
        scores['judge'] |= {'url': server.url, 'model': judge_model, 'version': server.version, 'digest': server.digest}
        scores |= {'prompt': PROMPTS[judge_style], 'summary': {who: summary(rows, judged[who]) for who in groups}}
        for who in groups:
            for result, found in zip(results, judged[who]):
                result[who] |= found
        if others:
            # in the pairwise style a row's score is the difference already
            pairs = zip(judged['run'], judged.get('baseline', [{'status': 'scored', 'score': 0}] * len(rows)))
            pairs = [(a['score'], b['score']) for a, b in pairs if 'failed' not in (a['status'], b['status'])]
            scores['paired'] = paired([a - b for a, b in pairs], seed)
        if calibrate:
            scores['calibration'] = calibration(judged)
        scores['faults'] = [found['fault'] for group in judged.values() for found in group if 'fault' in found]
        print('', *judge_lines(scores), sep='\n')
    scores['rows'] = results
    print('', *summary_lines(scores, Path(out_dir, 'log.jsonl')), sep='\n')
    suffix = '' if judge_style == 'score' else '-' + judge_style
    write_json(Path(out_dir, f'scores{suffix}.json'), scores)
    write_report(Path(out_dir, f'report{suffix}.html'), scores, Path(out_dir, 'log.jsonl'))
    print(f'\nwrote {out_dir}/scores{suffix}.json and {out_dir}/report{suffix}.html')
    sys.exit(1 if scores.get('faults') else 0)
