"""
The configurator: knobs are a stage's globals, overridden in order by config files and --key=value flags.

    python train.py config/sft_medium.py --batch_size=4
    python train.py --help

A config file is Python and serves every stage, so its keys must be knobs of some stage; a flag must be one of the stage
that runs. A stage says `config = configure(globals())` below its knobs; imported, it keeps its defaults.
"""
import ast
import difflib
import os
import sys
from pathlib import Path


class UserError(Exception):
    """What the user can mend. Ends the program in one line on stderr and exit 2, without a traceback."""


def end_in_one_line(kind, error, trace):
    if not issubclass(kind, (UserError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(f'{Path(sys.argv[0]).name}: {error}' if str(error) else 'interrupted', file=sys.stderr)
    sys.exit(2 if kind is UserError else 130)


def knobs_of(path):
    """-> {name: (default, comment)}: the literal assignments above the line that calls configure; {} if none does."""
    text, knobs = Path(path).read_text(encoding='utf-8'), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
            comment = text.splitlines()[node.end_lineno - 1].partition('  # ')[2]
            knobs[node.targets[0].id] = ast.literal_eval(node.value), comment
        elif isinstance(node, ast.Assign) and 'configure(globals())' in ast.get_source_segment(text, node):
            return knobs
    return {}


def checked(key, value, knobs, where):
    """-> value, if key is one of knobs and value of its type (an int passes for a float). UserError otherwise."""
    if key not in knobs:
        near = difflib.get_close_matches(key, knobs, 1, 0.0)[0]
        raise UserError(f'{where}: no knob is called {key!r}; the nearest is {near!r} (--help lists them)')
    kind = type(knobs[key][0])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f'{where}: {key} takes {kind.__name__}, like {knobs[key][0]!r}, not {value!r}')
    return kind(value)


def configure(stage):
    """Override the knobs in `stage` (a module's globals) from the command line; print and return them. Raises UserError."""
    own, every, argv = knobs_of(stage['__file__']), {}, sys.argv[1:]
    if stage['__name__'] != '__main__':
        return {key: stage[key] for key in own}
    sys.excepthook = end_in_one_line
    sys.stdout.reconfigure(errors='backslashreplace')  # rows may hold what a terminal cannot show
    if {'-h', '--help'} & set(argv):
        rows = [f'  --{key}={default!r}'.ljust(44) + comment for key, (default, comment) in own.items()]
        print(stage['__doc__'].strip(), '', *rows, sep='\n')
        sys.exit(0)
    for path in Path(stage['__file__']).parent.glob('*.py'):
        every |= knobs_of(path)
    for arg in argv:
        key, equals, value = arg[2:].partition('=')
        if not arg.startswith('--'):
            settings = {}
            try:
                exec(compile(Path(arg).read_text(encoding='utf-8'), arg, 'exec'), settings)
            except (OSError, SyntaxError, NameError, UnicodeDecodeError) as error:
                raise UserError(f'config file {arg}: {error}') from error
            settings = {k: checked(k, v, every | own, arg) for k, v in settings.items() if not k.startswith('_')}
        elif not equals:
            raise UserError(f'{arg}: flags are written --key=value')
        else:
            if not isinstance(own.get(key, [''])[0], str):  # strings need no quotes: the text is the value
                try:
                    value = ast.literal_eval(value)
                except (ValueError, SyntaxError):
                    pass  # checked() says what it should have been
            settings = {key: checked(key, value, own, '--' + key)}
        stage.update({k: v for k, v in settings.items() if k in own})
    config = {key: stage[key] for key in own}
    if int(os.environ.get('RANK', 0)) == 0:
        print(*(f'{k} = {v!r}' + ('  # set' if v != own[k][0] else '') for k, v in config.items()), sep='\n')
    return config
