"""
Runs stages in copies of itself: a process that has imported what the stages import, which takes most of the time of a tiny run.

It reads lines of JSON from its standard input. A request, {folder, stdin, stdout, stderr, environment, first, argv}: it forks a copy, in
which the stage argv[0] runs as __main__ after the Python code `first`, and writes the copy's pid. A pid: it waits for that copy, and writes
its exit code. conftest.py uses it on Linux; elsewhere, or with FORKER=0 in the environment, each stage is a process of its own.
"""
import atexit
import functools
import gc
import json
import os
import runpy
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def import_all():
    """Import what the stages import, and load the tokenizer."""
    import fastapi  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import prometheus_client  # noqa: F401
    import requests  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import sacrebleu.metrics  # noqa: F401
    import scipy.stats  # noqa: F401
    import stdnum  # noqa: F401
    import tiktoken.load
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401
    import uvicorn  # noqa: F401
    tiktoken.load.data_gym_to_mergeable_bpe_ranks = functools.cache(tiktoken.load.data_gym_to_mergeable_bpe_ranks)
    import prepare
    prepare.get_tokenizer()
    os.fsync = lambda file: None  # what a test writes need not outlive a power failure


def run(request):
    """Become the stage: its files, folder, environment and arguments; end as it ends."""
    os.dup2(os.open(request['stdin'], os.O_RDONLY), 0)
    for number, name in ((1, request['stdout']), (2, request['stderr'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = os.fdopen(0)
    os.chdir(request['folder'])
    os.environ.update(request['environment'])
    sys.argv = request['argv']
    sys.path[0] = os.path.dirname(sys.argv[0])
    code = 1
    try:
        try:
            exec(request['first'], {})  # with globals of its own, which its functions see
            runpy.run_path(sys.argv[0], run_name='__main__')
            code = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as Python ends, but for freeing all objects, which takes half a second


def serve():
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            return request
        print(pid, flush=True)
    os._exit(0)


if __name__ == '__main__':
    import_all()
    gc.freeze()  # or each copy would touch, and so copy, all of its memory
    run(serve())
