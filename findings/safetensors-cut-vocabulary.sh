#!/usr/bin/env bash
# torch 2.13.0, safetensors 0.8.0, huggingface_hub 2.4.0.
# Seen: a vocabulary padded from 257 to 512 rows is cut back, weight[:257], and written. torch.save writes all
#   512 rows (the file is twice as large, and loading shows 257); safetensors' save_file writes the 257;
#   huggingface_hub's save_torch_state_dict, which is made for this very format, raises RuntimeError: it finds
#   no name that covers the whole memory. Two halves of one tensor under two names: save_file writes both,
#   save_torch_state_dict raises as well. With .clone() all three write the rows that are meant.
# A good guess: a view is its values, at most torch.save keeps its memory; one library of the same house does as
#   the other.
# Why it matters: q, k and v split out of c_attn, and embeddings cut from nanoGPT's 50,304 rows to 50,257, are
#   such views: an export works with one writer and ends in an error, or in a larger file with the padding in
#   it, with another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 huggingface_hub==2.4.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

folder = Path(os.environ['FOLDER'])
padded = torch.randn(512, 64)
row = 64 * 4  # bytes


def written(state):
    """Rows of 256 bytes in the file of each writer; None where it raises."""
    torch.save(state, folder / 'model.pt')
    save_file(state, folder / 'model.safetensors')
    rows = [(folder / name).stat().st_size // row for name in ('model.pt', 'model.safetensors')]
    hub = folder / 'hub'
    hub.mkdir(exist_ok=True)
    try:
        save_torch_state_dict(state, hub)
        rows.append((hub / 'model.safetensors').stat().st_size // row)
    except RuntimeError as error:
        print('  save_torch_state_dict:', str(error)[:90])
        rows.append(None)
    print(f'{list(state)}: rows in the files of torch.save, save_file, save_torch_state_dict: {rows}')
    return rows


cut = written({'wte': padded[:257]})
halves = written({'first': padded[:256], 'second': padded[256:]})
cloned = written({'wte': padded[:257].clone()})
assert cut[0] >= 512 and 257 <= cut[1] < 270 and cut[2] is None
assert halves[1] >= 512 and halves[2] is None
assert all(257 <= rows < 290 for rows in cloned)
PY
