"""
Files that are whole or not there at all: written aside and renamed, downloaded with resume.

    from files import download, write_aside, write_json
"""
import json
import os
import sys
import time
from pathlib import Path

from config import UserError


def write_aside(path, write, mode='w'):
    """Call write(file) on a file beside path, sync it, and rename it to path: a reader meets the old or the new, whole."""
    path = Path(path)
    aside = path.with_name(path.name + '.aside')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}: {error.strerror or error}; what was there before is kept') from error


def write_json(path, value):
    write_aside(path, lambda file: json.dump(value, file, indent=1))


def download(urls, path, size=0):
    """
    Fetch path from the first of urls that gives it, unless it is there. Written to path.part, renamed when whole; with
    its size known (bytes), a partial file is gone on with. Time-outs, 5xx and broken lines are tried again, with back-off.
    Raises UserError with every address and its fault.
    """
    import requests
    path, faults = Path(path), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        for wait in (0, 1, 2, 4):
            time.sleep(wait)
            try:
                return path if path.exists() else fetch(url, path, size)
            except (requests.RequestException, UserError) as error:
                fault = f'{url}: {error}'
                reply = getattr(error, 'response', None)
                if isinstance(error, UserError) or reply is not None and reply.status_code in range(400, 500):
                    break
        faults.append(fault)
    raise UserError(f'cannot download {path.name}: ' + '; '.join(faults))


def fetch(url, path, size):
    """One try of download: the rest of path.part if the server takes a Range, else the whole."""
    import requests
    from tqdm import tqdm
    part = path.with_name(path.name + '.part')
    have = part.stat().st_size if size and part.exists() else 0
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as reply:
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        total = size or int(reply.headers.get('Content-Length', 0))
        bar = tqdm(desc=path.name, total=total, initial=have, unit='B', unit_scale=True, disable=not sys.stderr.isatty())
        with bar, open(part, 'ab' if have else 'wb') as file:
            for chunk in reply.iter_content(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    if size and got != size:
        part.unlink()
        raise UserError(f'{got:,} bytes instead of {size:,}')
    os.replace(part, path)
    return path
