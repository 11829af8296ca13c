#!/usr/bin/env bash
# scipy 1.17.1.
# Seen: two models are compared on 50 prompts; 45 scores are equal and five are better by one point. wilcoxon()
#   of the differences says p = 0.025. The same five differences alone, without the 45 zeros that it leaves out
#   anyway, say p = 0.0625, the least that five can say, and method='exact' says so with and without the zeros.
#   The zeros are left out of the ranks, but they count where the method is chosen: with zeros or equal
#   differences it takes the normal approximation from 14 rows on, however few of them differ.
# A good guess: zeros are dropped (zero_method='wilcox' is the default), so rows without a difference change
#   nothing.
# Why it matters: on exact match, or on a judge's whole numbers, most pairs are equal. Five wins in five look
#   significant at 0.05 beside 45 ties, and are not. Drop the zeros oneself, or say method='exact'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy
from scipy.stats import wilcoxon

wins = numpy.ones(5)
values = {}
for zeros in (0, 8, 9, 45):
    differences = numpy.concatenate([numpy.zeros(zeros), wins])
    values[zeros] = wilcoxon(differences).pvalue
    exact = wilcoxon(differences, method='exact').pvalue
    print(f'5 wins, {zeros} ties: p = {values[zeros]:.4f}, exact {exact:.4f}')
    assert exact == 0.0625
assert values[0] == values[8] == 0.0625
assert values[9] == values[45] < 0.03

# wins of different size: the same
assert wilcoxon(numpy.arange(1, 6)).pvalue == 0.0625
assert wilcoxon(numpy.concatenate([numpy.zeros(45), numpy.arange(1, 6)])).pvalue < 0.05
PY
