"""
Figures with an interval: reference metrics of predictions, means, and paired comparisons. No network, no judge.

    from metrics import reference_metrics, interval, paired

An interval is {value, low, high, n}: 95 %, by the bootstrap over rows (percentiles of 1,000 resamples, seeded); of shares
(exact match, ended by itself) Wilson's, since a bootstrap of 0 % or 100 % has no width. BLEU and chrF are corpus scores:
they are computed anew from each resample's summed statistics. Two prediction files are compared under the same resamples.
"""
import functools
import math

import numpy as np

from config import UserError

RESAMPLES = 1000
SHARES = 'exact match %', 'ended by itself %'


@functools.lru_cache(8)
def resamples(n, seed):
    """-> (RESAMPLES, n): how often each resample of n rows holds each row."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]).astype(np.float32)


def percentiles(draws):
    draws = draws[np.isfinite(draws)]
    return [float(np.percentile(draws, q)) for q in (2.5, 97.5)] if len(draws) else [math.nan, math.nan]


def interval(values, seed):
    """values, one a row -> the interval of their mean; None if there are none."""
    if not len(values):
        return None
    values = np.asarray(values, dtype=float)
    low, high = percentiles(resamples(len(values), seed) @ values / len(values))
    return {'value': float(values.mean()), 'low': low, 'high': high, 'n': len(values)}


def wilson(hits, n):
    """-> (low, high) in percent of the share hits / n."""
    z = 1.96
    middle, half = (hits + z * z / 2) / (n + z * z), z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return 100 * max(middle - half, 0), 100 * min(middle + half, 1)


def sign_test(wins, losses):
    """-> two-sided p of so uneven a count of wins and losses, were both as likely; ties are left out."""
    n = wins + losses
    return min(2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2 ** n, 1.0)


def paired(differences, seed):
    """differences, run - baseline, one a row -> their mean's interval, wins, ties, losses and the sign test's p."""
    if not len(differences):
        return None
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {'difference': interval(differences, seed), 'win': wins, 'tie': len(differences) - wins - losses, 'loss': losses,
            'p': sign_test(wins, losses)}


def ratio(sums):
    return sums[0] / sums[1] if sums[1] else math.nan


def row_statistics(rows):
    """
    rows with `output` and `model_response` -> {metric: (statistics, score)}: an array (rows, k), and the function from
    its column sums to the metric. A metric whose field no row carries is left out.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UserError(f'the reference metrics need {error.name}: pip install sacrebleu rouge-score') from error
    answers, references = [row['model_response'] for row in rows], [row['output'] for row in rows]
    one = np.ones(len(rows))
    rouge = RougeScorer(['rougeL'])
    overlap = [rouge.score(reference, answer)['rougeL'].fmeasure for answer, reference in zip(answers, references)]
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references)]
    columns = {
        'exact match %': (100 * np.array(exact), one),
        'ROUGE-L': (100 * np.array(overlap), one),
        'length ratio': ([len(answer) for answer in answers], [len(reference) for reference in references]),
    }
    told = np.array([isinstance(row.get('truncated'), bool) for row in rows])
    if told.any():
        columns['ended by itself %'] = 100 * told * [not row.get('truncated') for row in rows], told
    told = np.array([isinstance(row.get('reference_loss'), float) and math.isfinite(row['reference_loss']) for row in rows])
    if told.any():
        tokens = told * [row.get('reference_tokens', 1) for row in rows]
        columns['reference loss'] = [row['reference_loss'] * n if n else 0 for row, n in zip(rows, tokens)], tokens
    stats = {name: (np.stack([np.asarray(c, dtype=float) for c in pair], 1), ratio) for name, pair in columns.items()}
    for name, metric in ('BLEU', BLEU(force=True)), ('chrF', CHRF()):
        # the package's own resampling works on these; it has no public name for them
        numbers = np.array(metric._extract_corpus_statistics(answers, [references]), dtype=float)
        stats[name] = numbers, lambda sums, metric=metric: metric._compute_score_from_stats(sums.tolist()).score
    return stats


def reference_metrics(rows, baseline, seed):
    """
    rows, and the baseline's (or []) in the same order -> ({group: {metric: {run, baseline, difference: interval}}}, and a
    list each for run and baseline of the rows' {exact, rouge_l}). Groups: 'all', and every `family` that rows carry.
    """
    groups = {'all': list(range(len(rows)))}
    for number, row in enumerate(rows):
        if isinstance(row.get('family'), str):
            groups.setdefault(row['family'], []).append(number)
    groups = {'all': groups.pop('all')} | dict(sorted(groups.items()))
    stats = {'run': row_statistics(rows)} | ({'baseline': row_statistics(baseline)} if baseline else {})
    table = {}
    for group, numbers in groups.items():
        table[group] = {name: {} for name in stats['run']}
        draws = {}
        weights = resamples(len(numbers), seed)
        for who in stats:
            for name, (columns, score) in stats[who].items():
                columns = columns[numbers]
                value = score(columns.sum(0))
                if not math.isfinite(value):
                    continue
                draws[who, name] = np.array([score(sums) for sums in weights @ columns])
                low, high = percentiles(draws[who, name])
                n = len(numbers)
                if name in SHARES:
                    hits, n = columns.sum(0)[0] / 100, round(columns.sum(0)[1])
                    low, high = wilson(float(hits), n)
                table[group].setdefault(name, {})[who] = {'value': float(value), 'low': low, 'high': high, 'n': n}
        for name, found in table[group].items():
            if len(found) == 2:
                low, high = percentiles(draws['run', name] - draws['baseline', name])
                difference = found['run']['value'] - found['baseline']['value']
                found['difference'] = {'value': difference, 'low': low, 'high': high, 'n': found['run']['n']}
    each = {who: [{'exact': bool(exact), 'rouge_l': round(overlap, 2)} for exact, overlap in
                  zip(stats[who]['exact match %'][0][:, 0], stats[who]['ROUGE-L'][0][:, 0])] for who in stats}
    return table, each
