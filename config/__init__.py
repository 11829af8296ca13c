"""
The configurator, errors that end in one line, files that are written whole or not at all, rows, the device.

    python train.py config/sft_medium.py --batch_size=4     # files and flags in order, the later one wins
    python train.py --help

Knobs are a stage's globals; below them a stage says `config = configure(globals())`. A config file is Python
and serves every stage, so each of its keys must be a knob of some stage; a flag must be one of the stage
that runs.
"""
import ast
import atexit
import ctypes
import difflib
import gzip
import itertools
import json
import os
import platform
import re
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: one line on stderr, no traceback."""
    exit_code = 2

def print_in_one_line(kind, error, traceback):
    """sys.excepthook: an error whose class has an exit_code prints one line, any other its traceback."""
    if kind is ModuleNotFoundError:
        package = error.name.partition('.')[0]
        kind, error = UserError, f'{error}: pip install {package} (its version: requirements*.txt)'
    exit_code = 130 if kind is KeyboardInterrupt else getattr(kind, 'exit_code', None)
    if exit_code is None:
        return sys.__excepthook__(kind, error, traceback)
    message = 'interrupted' if kind is KeyboardInterrupt else str(error).partition('\n')[0]
    # not sys.stderr: init_process_group's hook replaces it, and drops what it holds at sys.exit
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.__stderr__)
    sys.exit(exit_code)

# --- configuration

def knobs_of(path):
    """-> {name: (default, comment)}: the literal assignments above configure(globals()), if it is called."""
    text, knobs = Path(path).read_text(encoding='utf-8'), {}
    call = re.search(r'^\w+ = configure\(globals\(\)\)', text, re.MULTILINE)
    head = text[:call.start()] if call else ''
    for node in ast.parse(head).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
            comment = head.splitlines()[node.end_lineno - 1].partition('  # ')[2]
            knobs[node.targets[0].id] = ast.literal_eval(node.value), comment
    return knobs

def check_value(key, value, knobs, where):
    """-> value in the type of the knob `key`, an int taken for a float. UserError: a wrong name or type."""
    if key not in knobs:
        nearest = difflib.get_close_matches(key, knobs, 1, 0.0)[0]
        raise UserError(f'{where}: no knob is called {key!r}; the nearest is {nearest!r} (--help lists them)')
    kind = type(knobs[key][0])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f'{where}: {key} takes {kind.__name__}, like {knobs[key][0]!r}, not {value!r}')
    return kind(value)

def read_config_file(path, all_knobs):
    """Run a config file -> {key: value}, each checked against the knobs of all stages."""
    settings = {}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), settings)
    except Exception as error:  # whatever its code may raise
        raise UserError(f'config file {path}: {error}') from error
    return {key: check_value(key, value, all_knobs, path)
            for key, value in settings.items() if not key.startswith('_')}

def read_flag(flag, knobs):
    """'--key=value' -> {key: value}. A string needs no quotes, any other type is a Python literal."""
    key, equals, value = flag[2:].partition('=')
    if not equals:
        raise UserError(f'{flag}: flags are written --key=value')
    if not isinstance(knobs.get(key, [''])[0], str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # it stays text, and check_value says which type it should have been
    return {key: check_value(key, value, knobs, '--' + key)}

def configure(stage):
    """
    Override the knobs in `stage` (a module's globals) from the command line; print and return them.
    An imported stage keeps its defaults. Raises UserError.
    """
    knobs, argv = knobs_of(stage['__file__']), sys.argv[1:]
    if stage['__name__'] != '__main__':
        return {key: stage[key] for key in knobs}
    sys.excepthook = print_in_one_line
    sys.stdout.reconfigure(errors='backslashreplace')  # for text that the terminal cannot show
    if '-h' in argv or '--help' in argv:
        lines = [f'  --{key}={default!r}'.ljust(44) + comment for key, (default, comment) in knobs.items()]
        print(stage['__doc__'].strip(), '', *lines, sep='\n')
        sys.exit(0)

    all_knobs = {}
    for path in Path(stage['__file__']).parent.glob('*.py'):
        all_knobs |= knobs_of(path)
    for arg in argv:
        if arg.startswith('--'):
            settings = read_flag(arg, knobs)
        else:
            settings = read_config_file(arg, all_knobs | knobs)
        stage.update({key: value for key, value in settings.items() if key in knobs})

    config = {key: stage[key] for key in knobs}
    if int(os.environ.get('RANK', 0)) == 0:
        for key, value in config.items():
            print(f'{key} = {value!r}' + ('' if value == knobs[key][0] else '  # set'))
    return config

# --- files

def atomic_write(path, write, mode='w'):
    """
    Call write(file) on a temporary file beside path, sync it and rename it to path: a reader finds the old
    content or the new, whole. Where it cannot be written, UserError says why and the old content is kept.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch.save raises a RuntimeError of its own while it handles the system's error, which says more
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, 'strerror', None) or str(cause).splitlines()[0]
        raise UserError(f'cannot write {path}: {reason}; what was there before is kept') from error

def write_json(path, value):
    atomic_write(path, lambda file: json.dump(value, file, indent=1))

def write_safetensors(path, tensors):
    """
    Write {name: fp32 tensor of any strides}, one after the other: the package safetensors takes contiguous
    ones only, so that a transposed model would be in memory twice.
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy())

def read_values(path):
    """Yields the values of a JSON list, JSONL or Parquet; a ValueError where a line is not JSON."""
    path = str(path)
    if path.endswith('.parquet'):
        from pyarrow import parquet
        for batch in parquet.ParquetFile(path).iter_batches(8192):
            yield from batch.to_pylist()
        return
    opened = gzip.open if path.endswith('.gz') else open
    with opened(path, 'rt', encoding='utf-8-sig', newline='\n') as file:  # JSONL's lines may hold U+2028
        first = ' '
        while first.isspace():
            first = file.read(1)
        if first == '[':
            yield from read_list(file)
        elif first == '{':
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield ValueError(f'line {number} is not JSON ({error.msg})')
        else:
            raise ValueError(f'it begins with {first!r}')

def read_list(file):
    """Yields the values of a JSON list whose [ has been read, a block of text at a time."""
    decode, comma = json.JSONDecoder().raw_decode, re.compile(r'[\s,]*')
    text, i, n = '', 0, 0
    while True:
        i = comma.match(text, i).end()
        if text[i:i + 1] == ']':
            break
        try:
            value, i = decode(text, i)
        except json.JSONDecodeError as error:  # it goes on in the next block, or nowhere
            block = file.read(1 << 20)
            if not block:
                raise ValueError(f'after {n:,} rows: {error}') from error
            text, i = text[i:] + block, 0
            continue
        yield value
        n += 1
    if (text[i + 1:] + file.read()).strip():
        raise ValueError('there is text after the end of its list')

def read_jsonl(path):
    """-> the objects of a JSONL file, without lines that an interruption cut; nan and inf become None."""
    records = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        try:
            records.append(dict(json.loads(line, parse_constant=lambda name: None)))
        except (ValueError, TypeError):
            continue
    return records

# --- rows, whatever their fields are called

CONVENTIONS = [  # what instruction, input and output are called; an input may be missing
    ('instruction', 'input', 'output'),  # Alpaca
    ('instruction', 'context', 'response'),  # Dolly
    ('prompt', 'input', 'completion'),
    ('question', 'context', 'answer')]
CHATS = 'messages', 'conversations'  # fields of chats, lists of {role or from, content or value}
ROLES = {'human': 'user', 'gpt': 'assistant'}  # other names of them

def first_exchange(messages, is_answered):
    """Messages -> the first user message that is answered, as a row; its input is a leading system message.
    is_answered=False: the first user message. Raises ValueError, or what wrong types raise."""
    keys = ('role', 'content') if 'role' in messages[0] else ('from', 'value')
    talk = [(ROLES.get(one[keys[0]], one[keys[0]]), one[keys[1]]) for one in messages]
    has_system = talk[0][0] == 'system'
    for (role, question), (next_role, answer) in itertools.pairwise([*talk, ('', '')]):
        has_answer = next_role == 'assistant'
        if role == 'user' and (has_answer or not is_answered):
            return {'instruction': question, 'input': talk[0][1] if has_system else '',
                    'output': answer if has_answer else '',
                    'messages_left_out': len(talk) - 1 - has_answer - has_system}
    raise ValueError('no message of the user is followed by an answer')

def to_row(value, conventions, needed):
    """
    A value of a file -> its row: instruction, input and output, and its other fields; those needed are there.
    ValueError says what is wrong with it.
    """
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f'it is {type(value).__name__}, not an object')
    row = dict(value)
    for chat in value.keys() & CHATS:
        try:
            row |= first_exchange(row.pop(chat), 'output' in needed)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f'its {chat} are wrong: {error!r}') from error
    # the convention of which it has most: instruction and output, or one of them
    names = max(conventions, key=lambda names: len(row.keys() & names[::2]))
    row |= {key: row.pop(name) for key, name in zip(CONVENTIONS[0], names) if name in row}
    if names in CONVENTIONS and 'input' not in row and isinstance(row.get('context'), str):
        row['input'] = row.pop('context')  # which may go with the other names of any convention
    for key in needed:
        if key not in row:
            there = ', '.join(map(str, value))
            raise ValueError(f'{key} is missing; ' + (
                f'say which of {there} it is: --fields=instruction:...,output:...' if 'output' in needed
                else f'rename the one of {there} that it is'))
        if not isinstance(row[key], str):
            raise ValueError(f'{key} is {row[key]!r}')
    if not row['instruction'].strip():
        raise ValueError('instruction is empty')
    for key in 'input', 'output':
        if not isinstance(row.get(key), str | None):
            raise ValueError(f'{key} is {row[key]!r}')
    return row

def read_rows(path, fields='', is_answered=True):
    """Yields a file's rows with instruction, input and output, whatever their convention. is_answered=False:
    they need no output. UserError names the faulty rows (20, then a count)."""
    conventions, faults, n = CONVENTIONS, [], 0
    needed = ('instruction', 'output') if is_answered else ('instruction',)
    if fields:
        given = dict(pair.strip().partition(':')[::2] for pair in fields.split(','))
        if not {'instruction', 'output'} <= given.keys() <= set(CONVENTIONS[0]):
            raise UserError(f'fields={fields!r} must be like instruction:q,output:a, or with input:c, too')
        conventions = [tuple(given.get(key, '') for key in CONVENTIONS[0]), *CONVENTIONS]
    try:
        for n, value in enumerate(read_values(str(path)), 1):
            try:
                row = to_row(value, conventions, needed)
            except ValueError as error:
                faults.append(f'row {n - 1}: {error}')
            else:
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    except ValueError as error:  # pyarrow's errors are such, too
        raise UserError(f'{path} is not JSON, or not whole: {error}') from error
    if not n:
        raise UserError(f'{path} has no rows')
    if faults:
        more = f'; and {len(faults) - 20} more' if len(faults) > 20 else ''
        raise UserError(f'{path}: {"; ".join(faults[:20])}{more}')

# --- the device, and the processes that share the work

def keep_freed_memory():
    """
    glibc keeps what a step frees for the next one, instead of returning it and faulting it in again: on a CPU
    generation on Medium takes 9 % less time, a step of training 20 %.
    """
    if platform.libc_ver()[0] == 'glibc':
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)

def init_device(device, dtype):
    """
    -> (torch.device, torch.dtype, rank, world size). device 'auto': cuda, mps or cpu. dtype 'auto': on cuda
    bfloat16 if the GPU has it, else float16; float32 elsewhere. Under torchrun this joins the processes, by
    nccl on cuda, by gloo elsewhere. Raises UserError.
    """
    import torch
    keep_freed_memory()
    rank, local_rank, world_size = (int(os.environ.get(key, default)) for key, default in
                                    (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    if device == 'auto':
        has_mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    name = device
    try:
        device = torch.device(name, local_rank) if name == 'cuda' else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device={name!r} is not available here: {str(error).splitlines()[0]}') from error

    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype={dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
    if dtype == 'auto' and device.type == 'cuda':
        # GPUs before Ampere, such as Colab's T4, only emulate bfloat16, and slowly
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        dtype = 'float32'

    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if world_size > 1:
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        atexit.register(torch.distributed.destroy_process_group)
    return device, getattr(torch, dtype), rank, world_size
