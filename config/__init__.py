"""
The configurator, mistakes that end in one line, and files that are written whole or not at all.

    python train.py config/sft_medium.py --batch_size=4     # files and flags in order, the later one wins
    python train.py --help

The settings of a stage are the globals above its line `config = configure(globals())`. A config file is
Python and serves every stage, so each of its keys must be a setting of some stage; a flag must be a setting
of the stage that runs. A rule in brackets at the end of a setting's comment is checked: [>= 1], [> 0],
[0 .. 1] or [one | another].
"""
import ast
import contextlib
import difflib
import errno
import glob
import hashlib
import json
import math
import os
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake that the user can fix: one line on stderr, no traceback, exit status 2."""
    exit_code = 2


# -----------------------------------------------------------------------------
# settings

class Setting(NamedTuple):
    default: object  # None: an expression, which only its own stage computes
    comment: str
    rule: str  # what stood in brackets, or ''


class Config(dict):
    """The settings of a stage by name. flags: names set on the command line; files: names set by a file."""
    flags = frozenset()
    files = frozenset()


# what other programs call our settings: not accepted, but the error message names ours
SYNONYMS = {
    'lr': 'learning_rate', 'bs': 'batch_size', 'batch': 'batch_size', 'micro_batch_size': 'batch_size',
    'per_device_train_batch_size': 'batch_size', 'grad_accum': 'gradient_accumulation_steps',
    'num_train_epochs': 'epochs', 'num_epochs': 'epochs', 'steps': 'max_steps', 'iters': 'max_steps',
    'max_iters': 'max_steps', 'wd': 'weight_decay', 'warmup': 'warmup_steps', 'warmup_iters': 'warmup_steps',
    'model': 'init_from', 'model_name': 'init_from', 'base_model': 'init_from', 'data': 'source',
    'file': 'source', 'output': 'out_dir', 'output_dir': 'out_dir', 'max_length': 'block_size',
    'max_seq_length': 'block_size', 'context': 'block_size', 'max_tokens': 'max_new_tokens',
    'precision': 'dtype', 'fp16': 'dtype', 'bf16': 'dtype', 'gpu': 'device', 'cuda': 'device',
    'rank': 'lora_rank', 'lora_r': 'lora_rank', 'format': 'to', 'eval_every': 'eval_interval',
}


def settings_of(path):
    """
    The Settings of a stage by name, in the order of its text; {} for other files. They are read from the
    text, not by an import: a config file may set what any stage knows, and the packages that the other stages
    import need not be there.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
        call = re.search(r'^config = configure\(globals\(\)\)', text, re.MULTILINE)
        body = ast.parse(text[:call.start()]).body if call else []
    except (OSError, ValueError, SyntaxError):  # a file of the user's that happens to lie here
        return {}
    # of each assignment the names, the value, and the comment, which Python's parser drops
    lines = text.splitlines()
    settings = {}
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError):  # an expression like `2 * batch_size`
            value = None
        comment = lines[node.end_lineno - 1].partition('  # ')[2]
        rule = re.search(r' ?\[([^\[\]]+)\]$', comment)
        if rule:
            comment = comment[:rule.start()]
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith('_'):
                settings[target.id] = Setting(value, comment, rule[1] if rule else '')
    return settings


def settings_of_all_stages():
    """The Settings of every stage, in one dict: what a config file may hold."""
    settings = {}
    for path in sorted(ROOT.glob('*.py')):
        settings |= settings_of(path)
    return settings


def check_type(key, value, settings, where):
    """
    The value in the type of its setting. An int is accepted for a float, but a bool for no number. where: the
    file or flag that sets it, for the UserError about a wrong name or type.
    """
    if key not in settings:
        nearest = SYNONYMS.get(key)
        if nearest not in settings:
            nearest = difflib.get_close_matches(key, settings, 1, 0.0)[0]
        raise UserError(f'{where}: no setting is called {key!r}; the nearest is {nearest!r} '
                        '(--help lists them)')
    default = settings[key].default
    kind = type(value) if default is None else type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is int and abs(value) >= 2**63:
        raise UserError(f'{where}: {key} takes {kind.__name__}, like {default!r}, not {value!r}')
    # a shell leaves the ~ of --source=~/rows.json as it is
    return os.path.expanduser(value) if kind is str and value.startswith('~/') else value


def check_rule(key, value, rule):
    """
    UserError if the value breaks the rule that its setting's comment states, as [>= 1] in
    `batch_size = 8  # rows of a batch [>= 1]`. Infinity and NaN break every rule about numbers.
    """
    if '|' in rule:
        choices = [choice.strip() for choice in rule.split('|')]
        is_right = value in choices
        wanted = 'one of ' + ', '.join(choices)
    elif '..' in rule:
        lowest, highest = rule.split('..')
        is_right = float(lowest) <= value <= float(highest)
        wanted = f'from {lowest.strip()} to {highest.strip()}'
    elif rule.startswith('>='):
        is_right = float(rule[2:]) <= value < math.inf
        wanted = f'at least {rule[2:].strip()}'
    elif rule.startswith('>'):
        is_right = float(rule[1:]) < value < math.inf
        wanted = f'above {rule[1:].strip()}'
    else:
        raise AssertionError(f'{key} has an unknown rule: [{rule}]')
    if not is_right:
        raise UserError(f'{key}={value!r} must be {wanted}')


def read_config_file(path, settings):
    """
    Run a config file and return {key: value}, each checked against the settings of all stages. What it
    imports, the functions that it defines and names with a leading underscore are its own business.
    """
    found = {}
    if str(path).startswith('-'):
        raise UserError(f'{path}: flags are written --key=value')
    if Path(path).suffix != '.py':
        raise UserError(f'{path} is not a config file, which ends in .py; rows are named by --source={path}')
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
        exec(compile(text, path, 'exec'), found)
    except Exception as error:  # whatever its code may raise
        raise UserError(f'config file {path}: {error}') from error
    values = {}
    for key, value in found.items():
        is_import = isinstance(value, types.ModuleType) or callable(value)
        if not key.startswith('_') and not is_import:
            values[key] = check_type(key, value, settings, path)
    return values


def read_flag(flag, settings):
    """
    '--key=value' as (key, value). A string needs no quotes, any other type is a Python literal, as in
    --packing=False or --learning_rate=1e-3. UserError.
    """
    key, equals, value = flag[2:].partition('=')
    if key in settings and not equals:
        raise UserError(f'{flag}: flags are written --key=value')
    if key in settings and not isinstance(settings[key].default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # it stays text, and check_type says which type it should have been
    return key, check_type(key, value, settings, '--' + key)


def show_help(path, settings):
    """Print the docstring of a stage, and its settings with their comments."""
    print(ast.get_docstring(ast.parse(Path(path).read_text(encoding='utf-8'))), '\n')
    for key, (default, comment, rule) in settings.items():
        flag = f'  --{key}={default!r}'
        print(f'{flag:43} {comment}' + (f' [{rule}]' if rule else ''))


def configure(stage):
    """
    Override the settings in `stage` (a module's globals) from the command line; print them, and return them
    as a Config. A stage that is imported keeps its defaults. Raises UserError.
    """
    # the defaults as the stage has computed them: `2 * batch_size` too
    path = Path(stage['__file__'])
    settings = {}
    for key, setting in settings_of(path).items():
        if type(stage[key]) not in (bool, int, float, str):
            raise UserError(f'{path.name}: {key} is a {type(stage[key]).__name__}; '
                            'a setting is a bool, an int, a float or a str')
        settings[key] = setting._replace(default=stage[key])
    if stage['__name__'] != '__main__':
        return Config({key: stage[key] for key in settings})
    sys.excepthook = print_in_one_line
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has no such method
        sys.stdout.reconfigure(errors='backslashreplace')  # for text that the terminal cannot show
        sys.stdout = Output(sys.stdout)
    if wants_help():
        show_help(path, settings)
        sys.exit(0)

    # in their order, so that the later one wins; what a file sets for other stages is checked and left aside
    flags = set()
    files = set()
    settings_of_files = settings_of_all_stages() | settings
    for argument in sys.argv[1:]:
        if argument.startswith('--'):
            key, value = read_flag(argument, settings)
            flags.add(key)
            stage[key] = value
        else:
            values = read_config_file(argument, settings_of_files)
            files |= values.keys()
            stage.update({key: value for key, value in values.items() if key in settings})

    # the rules come last, as a file may set what a flag then mends
    config = Config({key: stage[key] for key in settings})
    config.flags = frozenset(flags)
    config.files = frozenset(files)
    for key, setting in settings.items():
        if setting.rule:
            check_rule(key, config[key], setting.rule)
    # under torchrun the first process speaks for all
    if int(os.environ.get('RANK', 0)) == 0:
        for key, value in config.items():
            print(f'{key} = {value!r}' + ('' if value == settings[key].default else '  # set'))
    return config


# -----------------------------------------------------------------------------
# errors

class Output:
    """
    Standard output whose reader may go away: at Ctrl-C `tee` ends with the stage, and a terminal may be lost.
    What is printed from then on is dropped, so that the stage can still save its work.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.dropping():
            self.stream.write(text)

    def flush(self):
        with self.dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def dropping(self):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def wants_help():
    """Whether the command line asks for help, which is given even where packages are missing."""
    return '-h' in sys.argv[1:] or '--help' in sys.argv[1:]


def install_command(module):
    """What to type to get a module: the requirements file that names its package, or the package itself."""
    other_names = {'stdnum': 'python-stdnum', 'llama_cpp': 'llama-cpp-python'}
    package = other_names.get(module, module.replace('_', '-'))
    for path in sorted(ROOT.glob('requirements*.txt')):
        if re.search(rf'^{re.escape(package)}\b', path.read_text(encoding='utf-8'), re.MULTILINE):
            return f'pip install -r {path.name}'
    return f'pip install {package}'


def message_of(kind, error):
    """
    (the line to print for an error, the exit status), or None for a bug, whose traceback is worth more than
    any line. kind: the error's class.
    """
    if issubclass(kind, ModuleNotFoundError):
        return f'{error}: {install_command(error.name.partition(".")[0])}', 2
    if issubclass(kind, KeyboardInterrupt):
        return 'interrupted', 130
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f'cannot write {error.filename or "a file"}: {error.strerror}', 2
    if issubclass(kind, OSError) and error.filename:  # no permission, no folder
        return f'cannot use {error.filename}: {error.strerror}', 2
    # torch raises an OutOfMemoryError on a GPU, and a RuntimeError of its allocator on a CPU
    is_torchs = kind.__name__ == 'OutOfMemoryError' or 'DefaultCPUAllocator' in str(error)
    if is_torchs or issubclass(kind, MemoryError):
        return ('out of memory; lower batch_size (and raise gradient_accumulation_steps), block_size or '
                'max_new_tokens, or train with lora_rank=16'), 2
    if hasattr(kind, 'exit_code'):
        return str(error).partition('\n')[0], kind.exit_code
    return None


def print_in_one_line(kind, error, traceback):
    """sys.excepthook: a mistake of the user's prints one line, a bug its traceback."""
    if issubclass(kind, ModuleNotFoundError) and wants_help():
        show_help(sys.argv[0], settings_of(sys.argv[0]))  # which needs nothing installed
        sys.exit(0)
    found = message_of(kind, error)
    if found is None:
        return sys.__excepthook__(kind, error, traceback)
    message, exit_code = found
    # not sys.stderr: init_process_group's hook replaces it, and drops what it holds at sys.exit
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.__stderr__)
    sys.exit(exit_code)


# each stage imports this file first: so a package that is missing is told in one line, too
if Path(sys.argv[0]).resolve().parent == ROOT:
    sys.excepthook = print_in_one_line


# -----------------------------------------------------------------------------
# files

def remove_leftovers(folder, name='*'):
    """Remove the temporary files name.<process>.tmp of processes that were killed."""
    for leftover in folder.glob(f'{name}.*.tmp'):
        try:
            # 0 is no signal: it only asks whether the process runs
            if os.name == 'posix':
                os.kill(int(leftover.name.split('.')[-2]), 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (ValueError, OverflowError, OSError):  # a file of someone else's; a process of another user
            continue


def lock_folder(folder):
    """
    Make the folder if need be, and lock it until this process ends, so that no other one writes to it. What
    killed processes left there half-written is removed. UserError if it is locked or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write {folder}: {error.strerror}') from error
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f'another process writes to {folder}: wait for it, or name another folder') from error
    except (ImportError, OSError):  # Windows and some network file systems know no such locks
        return
    remove_leftovers(folder)


def atomic_write(path, write, mode='w'):
    """
    Call write(file) on a temporary file beside path, sync it and rename it to path: a reader finds the old
    content or the new, whole. Where it cannot be written, UserError says why and the old content is kept.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # a system that is read-only refuses this, too
            temporary.unlink(missing_ok=True)
        # torch.save raises a RuntimeError of its own while it handles the system's error, which says more
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, 'strerror', None) or str(cause).partition('\n')[0]
        raise UserError(f'cannot write {path}: {reason}; what was there before is kept') from error


def write_json(path, value):
    """Write a value as JSON, whole or not at all. UserError if it cannot be written."""
    atomic_write(path, lambda file: json.dump(value, file, indent=1))


def finite(text):
    """A number of JSON, None if it is too large to be one here: 1e999."""
    number = float(text)
    return number if math.isfinite(number) else None


# NaN and Infinity, which JSON does not know, are read as null
DECODER = json.JSONDecoder(parse_float=finite, parse_constant=lambda name: None)


def read_json(path):
    """The value of a JSON file. UserError if it is not whole."""
    try:
        return DECODER.decode(Path(path).read_text(encoding='utf-8-sig'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'cannot read {path}: {error}') from error


def read_jsonl(path):
    """The objects of a JSONL file, [] if there is none; lines that an interruption cut are left out."""
    records = []
    path = Path(path)
    for line in path.read_bytes().split(b'\n') if path.exists() else []:
        try:
            records.append(dict(DECODER.decode(line.decode())))
        except (ValueError, TypeError, RecursionError):
            continue
    return records


def newest(paths):
    """The path that was written last; None of none."""
    return max(paths, key=os.path.getmtime, default=None)


def newest_run(folder):
    """
    (path, content) of the .json of the newest run in a folder; (None, {}) if there is none. UserError if a
    file of such a name is something else.
    """
    path = newest(Path(folder).glob('*-sft.json'))
    if not path:
        return None, {}
    about = read_json(path)
    if not isinstance(about, dict) or 'init_from' not in about:
        raise UserError(f'{path} is not the .json of a run: train it again, or name another --out_dir')
    return path, about


# -----------------------------------------------------------------------------
# provenance: what a stage writes names what it was made of, {'weights': a fingerprint, 'data': a hash, ...}

def check_made_of(path, made_of, now, advice):
    """
    UserError if the file at path was made of other things than are here now. made_of: the hashes that it
    tells; now: those of what is here, by the same names. A name that the file lacks is not compared.
    """
    for name, value in now.items():
        if made_of.get(name, value) != value:
            raise UserError(f'{path} was made with other {name} than these '
                            f'({made_of[name][:8]}, not {value[:8]}); {advice}')


def sha256_of(value):
    """The sha256 of any value that JSON can hold; dicts of any order of their keys are equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path):
    """The sha256 of a file's bytes. UserError if it cannot be read."""
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
