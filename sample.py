"""
Answer the test split with the fine-tuned model and with the one it came from; or one prompt; or talk.

    python sample.py config/sft_medium.py
    python sample.py config/sft_medium.py --prompt="Rewrite in passive voice." --input="The cat ate the fish."
    python sample.py config/sft_medium.py --interactive=True
    torchrun --nproc_per_node=2 sample.py config/sft_medium.py
"""
import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from config import (
    UserError,
    check_made_of,
    configure,
    newest_run,
    read_json,
    read_jsonl,
    sha256_of,
    sha256_of_file,
    write_json,
)
from engine import choose_device, for_inference, generate, join_processes
from lora import load_adapter, merge_lora
from model import GPT, RELEASED, GPTConfig, ModelError, find_checkpoint, fingerprint
from prepare import (
    IGNORE,
    RESPONSE_HEADER,
    VOCAB_SIZE,
    data_hash,
    detokenize,
    encode_prompt,
    make_batch,
    read_split,
)

import torch
import torch.distributed as dist
from tqdm import tqdm

# -----------------------------------------------------------------------------
# model
out_dir = 'out'  # the run: its <model>-sft.pth answers
init_from = 'gpt2-medium'  # what answers where there is no run, or as a flag if it is not the run's base
adapter = ''  # an adapter.safetensors to put on init_from
download_from = 'openai'  # whose files of gpt2* are tried first [openai | huggingface]
cache_dir = ''  # where downloaded weights are kept; empty: gpt2-sft in the user's cache folder
# what is answered
dataset = 'instruction-data'  # its test split; where it is not set, that of the run
other_data = False  # let a run answer a test split that is not its own, whose rows it may have learned
before = True  # let the model before fine-tuning answer the test split too
prompt = ''  # one instruction instead
input = ''  # and its input
interactive = False  # talk with the terminal instead
questions = ''  # a JSONL file of questions instead, like data/questions.jsonl; for judge_style=mtbench
# generation
max_new_tokens = 256  # [>= 1]
temperature = 0.0  # 0: greedy [>= 0]
top_k = 0  # sample among the k likeliest; 0: among all [>= 0]
seed = 123  # of the sampling
# device
device = 'auto'  # [auto | cpu | cuda | mps]
dtype = 'auto'  # auto: the GPU's best on cuda, else float32 [auto | float32 | bfloat16 | float16]
# -----------------------------------------------------------------------------
config = configure(globals())

PREDICTIONS = 'instruction-data-with-response'
BEFORE = 'instruction-data-with-response-before'

# -----------------------------------------------------------------------------
# the model that answers: the run's, or the one that init_from names

class Loaded(NamedTuple):
    model: GPT
    name: str  # for people
    made_of: dict  # the fingerprint of its weights, and for a run what it was made of


def find_run(config):
    """
    The .json of the newest run in out_dir; None if a flag names another model than the one it came from, or
    if there is no run but a model is named. UserError if there is neither.
    """
    out = Path(config['out_dir'])
    run, about = newest_run(out)
    if run:
        is_another = config['init_from'] not in ('resume', about['init_from'])
        return None if 'init_from' in config.flags and is_another else run
    is_named = 'init_from' in config.flags | config.files
    if not is_named or config['init_from'] in ('scratch', 'resume'):
        there = 'has no run' if out.exists() else 'does not exist'
        raise UserError(f'{out} {there}: train one with python train.py, or name a model, like '
                        '--init_from=gpt2')
    return None


def dataset_of(run, config):
    """The data set that is named, else the one that the run was trained on. run: as find_run returns it."""
    is_named = 'dataset' in config.flags | config.files
    return config['dataset'] if is_named or not run else read_json(run)['config']['dataset']


def load_run(run):
    """The model of a run's .json. UserError if the weights beside it are others."""
    about = read_json(run)
    path = run.with_suffix('.pth')
    model = GPT.from_pretrained(path, vocab_size=VOCAB_SIZE)
    weights = fingerprint(model.state_dict())
    check_made_of(run, about, {'weights': weights}, f'{path} was replaced')
    made_of = about.get('made_of', {}) | {'weights': weights, 'source rows': about['sha256']}
    val_loss = 'not measured' if about['val_loss'] is None else f'{about["val_loss"]:.4f}'
    return Loaded(model, f'{path} (step {about["step"]}, val loss {val_loss})', made_of)


def load_named(where, cache_dir='', download_from='openai', adapter=''):
    """
    A model by name or path, and the adapter, merged, if one is named. What was tuned says which rows it
    learned. Raises ModelError, and UserError if the adapter is of another base.
    """
    run = None if where in RELEASED else find_checkpoint(where).with_suffix('.json')
    if run and run.name.endswith('-sft.json') and run.exists() and 'made_of' in read_json(run):
        loaded = load_run(run)
    else:
        model = GPT.from_pretrained(where, cache_dir, download_from, vocab_size=VOCAB_SIZE)
        loaded = Loaded(model, where, {'weights': fingerprint(model.state_dict())})
    if not adapter:
        return loaded
    about = load_adapter(loaded.model, adapter)
    merge_lora(loaded.model)
    made_of = about.get('made_of', {}) | {'weights': fingerprint(loaded.model.state_dict())}
    return Loaded(loaded.model, f'{where} with {adapter}', made_of)


def load_base(run, cache_dir='', download_from='openai'):
    """The model that a run started from. UserError if that is another one by now."""
    about = read_json(run)
    if about['init_from'] == 'scratch':  # made again from its shape and seed
        torch.manual_seed(about['config']['seed'])
        model = GPT(GPTConfig(**about['model']))
    else:  # by the name or the path that training was given
        # a run that was copied to another machine is often there without its base
        try:
            model = GPT.from_pretrained(about['init_from'], cache_dir, download_from, vocab_size=VOCAB_SIZE)
        except ModelError as error:
            raise UserError(f'{error}. The run began with it: --before=False leaves it out') from error
    made_of = {'base weights': fingerprint(model.state_dict())}
    check_made_of(run, about.get('made_of', {}), made_of,
                  f'{about["init_from"]} is not what it was: --before=False leaves it out')
    name = f'{about["init_from"]} (before fine-tuning)'
    return Loaded(model, name, {'weights': made_of['base weights']})


# -----------------------------------------------------------------------------
# answers

def response_text(ids):
    """New ids -> the answer's text. Some models say the header again."""
    return detokenize(ids).strip().removeprefix(RESPONSE_HEADER.strip()).strip()


def answer(model, rows, on_done, settings, seeds=None):
    """
    Answer rows; on_done(i, {'model_response', 'truncated': met the limit}) is called as each one ends.
    settings: max_new_tokens, temperature, top_k, seed. seeds: one for each row instead.
    """
    # the ids of prepare.py's template, as in training: nothing else would be the model's own task
    prompts = [encode_prompt(row) for row in rows]
    limit = settings['max_new_tokens']

    def finish(i, ids):
        its_limit = min(limit, model.config.block_size - len(prompts[i]))
        on_done(i, {'model_response': response_text(ids), 'truncated': len(ids) == its_limit})

    generate(model, prompts, limit, settings['temperature'], settings['top_k'], seeds or settings['seed'],
             on_done=finish)


@torch.inference_mode()
def reference_losses(model, data, device='cpu'):
    """
    For each row of a Split {'reference_loss': nats per token of the reference answer, 'reference_tokens'}:
    how likely the model finds the right answer, which says more of small models than whether they give it.
    """
    results = []
    numbers = range(len(data.meta['start']))
    for i in range(0, len(numbers), 8):
        batch = make_batch(data, numbers[i:i + 8], packing=False)
        ids, targets, positions = [torch.from_numpy(array).to(device) for array in batch[:3]]
        losses = model(ids, targets, positions, loss_reduction='none')
        for its_losses in losses.split((targets != IGNORE).sum(1).tolist()):
            results.append({'reference_loss': its_losses.mean().item(), 'reference_tokens': len(its_losses)})
    return results


def answer_all(loaded, rows, path, settings, rank, world_size, seeds=None):
    """
    Answer rows, shared among the processes: the list of their results. Each answer is appended to
    <path>.part<rank> as it comes, so that an interrupted run computes none again.
    """
    # a hash of all that could change an answer, so that no other model's is taken
    key = sha256_of([loaded.made_of['weights'], settings, rows, seeds])
    results = {}
    for part in sorted(path.parent.glob(f'{path.name}.part*')):
        for record in read_jsonl(part):
            if record.pop('key') == key:
                results[record.pop('row')] = record
    if results and rank == 0:
        print(f'{len(results)} of {len(rows)} answers are there already')
    if world_size > 1:
        dist.barrier()  # all have read before one writes
    # each takes every world_size-th of what is left, so that all have about as much to do
    todo = [i for i in range(len(rows)) if i not in results][rank::world_size]
    bar = tqdm(total=len(todo), unit='answer', disable=None if rank == 0 else True)
    with open(f'{path}.part{rank}', 'a', encoding='utf-8') as file:
        file.write('\n')  # ends a line at which it was killed

        def on_done(i, result):
            results[todo[i]] = result
            file.write(json.dumps({'key': key, 'row': todo[i], **result}) + '\n')
            file.flush()
            bar.update()

        answer(loaded.model, [rows[i] for i in todo], on_done, settings, seeds and [seeds[i] for i in todo])
    bar.close()
    # the first process writes, so it needs what the others found
    if world_size > 1:
        from_each = [None] * world_size
        dist.all_gather_object(from_each, results)
        for others in from_each:
            results |= others
    return [results[i] for i in range(len(rows))]


def write_answers(path, rows, loaded, made_of, config, **more):
    """<path>.json, and in <path>.about.json what it was made of; the part files are no longer needed."""
    write_json(f'{path}.json', rows)
    about = {'model': loaded.name, 'config': config, 'made_of': loaded.made_of | made_of,
             'sha256': sha256_of_file(f'{path}.json')}
    write_json(f'{path}.about.json', about | more)
    for part in path.parent.glob(f'{path.name}.part*'):
        part.unlink()


def predict(loaded, data, path, config, device, rank, world_size):
    """Answer the rows of a Split into <path>.json."""
    # what else is set, like out_dir, changes no answer, and must not make an interrupted run begin anew
    rows = data.meta['rows']
    settings = {key: config[key] for key in ('max_new_tokens', 'temperature', 'top_k', 'seed', 'dtype')}
    results = answer_all(loaded, rows, path, settings, rank, world_size)
    if rank > 0:
        return
    # by the same weights, in the same precision, right behind the answers
    losses = reference_losses(loaded.model, data, device)
    rows = [row | result | loss for row, result, loss in zip(rows, results, losses)]
    write_answers(path, rows, loaded, {'data': data_hash(config['dataset'])}, config)
    n_ended = sum(not row['truncated'] for row in rows)
    print(f'{len(rows)} answers of {loaded.name}, {n_ended} of them ended by themselves: wrote {path}.json')


def read_test_split(config, loaded):
    """The test split. UserError if it is not the run's own, or does not fit the model."""
    dataset = config['dataset']
    data = read_split(dataset, 'test')
    if not config['other_data']:
        now = {'data': data_hash(dataset), 'source rows': data.meta['sha256']}
        check_made_of(loaded.name, loaded.made_of, now, f'rows of data/{dataset} may be among those it '
                      'learned: prepare them as they were, or set --other_data=True')
    longest = int((data.meta['end'] - data.meta['start']).max())
    if longest > loaded.model.config.block_size:
        block_size = loaded.model.config.block_size
        raise UserError(f'data/{dataset} has a test row of {longest} tokens, the model {block_size} '
                        f'positions; prepare the data again with --block_size={block_size}')
    return data


# -----------------------------------------------------------------------------
# other forms of asking

def answer_questions(model, path, out, config):
    """The first turn of each question (the template has room for one) into out/question-answers.json."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').split('\n')
        asked = [json.loads(line) for line in lines if line.strip()]
        rows = [{'instruction': question['turns'][0]} for question in asked]
        if not rows:
            raise ValueError('it is empty')
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'{path} is not a JSONL of questions with turns: {error!r}') from error
    answer(model, rows, lambda i, result: asked[i].update(answers=[result['model_response']]), config)
    write_json(out / 'question-answers.json', asked)
    print(f'{len(asked)} answers: wrote {out}/question-answers.json')


def print_answer(model, instruction, input, config):
    """Print the answer to one instruction. ModelError if it leaves no room for one."""
    row = {'instruction': instruction, 'input': input}
    answer(model, [row], lambda i, result: print(result['model_response']), config)


def find_examples(rows):
    """
    Rows -> {family: its shortest row}. The demo's rows name their family, which is a kind of task; of other
    rows those that begin with the same three words are one.
    """
    def size(row):
        return len(row['instruction'] + (row.get('input') or ''))

    # a column of that name may hold anything, and some rows may have none
    has_families = any(isinstance(row.get('family'), str) for row in rows)
    examples = {}
    for row in rows:
        family = row.get('family') if has_families else ' '.join(row['instruction'].split()[:3])
        if isinstance(family, str):
            examples[family] = min(examples.get(family, row), row, key=size)
    return examples


def show_examples(rows):
    """Print some rows, of as many families as there are, so that a user knows what to type."""
    examples = find_examples(rows)
    if any('family' in row for row in examples.values()):
        print('it knows these tasks:', ', '.join(sorted(examples)))
    print('for example:')
    for row in list(examples.values())[:3]:
        print('  ' + ' | '.join(filter(None, [row['instruction'], row.get('input')])).replace('\n', ' '))


def talk(model, config):
    """Answer the lines of standard input until it ends or one is empty."""
    print('type an instruction, or "instruction | input"; an empty line or Ctrl-D ends')
    with contextlib.suppress(UserError):  # the data need not be here
        show_examples(read_split(config['dataset'], 'test', 1000).meta['rows'])
    while True:
        print('> ', end='', flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            break
        instruction, _, its_input = line.partition('|')
        try:
            print_answer(model, instruction.strip(), its_input.strip(), config)
        except ModelError as error:  # it is too long
            print(error)


def main():
    # what answers, and on what
    run = None if adapter else find_run(config)
    config['dataset'] = dataset_of(run, config)
    chosen_device, compute_dtype = choose_device(device, dtype)
    rank, world_size = join_processes(chosen_device)
    # one form of asking at a time, since a second one would be left unanswered; a flag that cannot have an
    # effect is a mistake
    asked = [name for name in ('prompt', 'interactive', 'questions') if config[name]]
    if len(asked) > 1:
        raise UserError(f'{" and ".join(asked)} do not go together')
    if input and not prompt:
        raise UserError('--input goes with --prompt')
    if asked and world_size > 1:
        raise UserError('several processes share the test split; for all else start one: python sample.py')
    loaded = load_run(run) if run else load_named(init_from, cache_dir, download_from, adapter)
    data = None if asked else read_test_split(config, loaded)
    for_inference(loaded.model, chosen_device, compute_dtype)
    out = Path(out_dir)
    if rank == 0:
        print(f'\nloaded {loaded.name}: {loaded.model.config.name} on {chosen_device}')

    if prompt:
        print_answer(loaded.model, prompt, input, config)
    elif interactive:
        talk(loaded.model, config)
    elif questions:
        answer_questions(loaded.model, questions, out, config)
    else:
        out.mkdir(parents=True, exist_ok=True)
        # a released model is what tuned ones are compared with, and so is what answers instead of the run
        is_untuned = init_from in RELEASED and not adapter
        is_baseline = not run and (is_untuned or any(out.glob('*-sft.json')))
        predict(loaded, data, out / (BEFORE if is_baseline else PREDICTIONS), config, chosen_device, rank,
                world_size)
        if run and before:
            # one after the other, as both may not fit into a GPU's memory
            del loaded
            base = load_base(run, cache_dir, download_from)
            for_inference(base.model, chosen_device, compute_dtype)
            predict(base, data, out / BEFORE, config, chosen_device, rank, world_size)


if __name__ == '__main__':
    main()
