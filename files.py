"""
Files that are whole or not there at all: written aside and renamed, downloaded with resume.

    from files import download, write_aside, write_json
"""
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from config import UserError

WAITS = 0, 1, 2, 4  # seconds before each try of an address
TIMEOUT = 10, 30  # seconds to connect, and without a byte


def unreadable(path, why):
    """-> the UserError of a broken file. Its .path is for from_pretrained, which removes what it has downloaded itself."""
    error = UserError(f'cannot read {path}: ' + (str(why) or type(why).__name__).splitlines()[0])
    error.path = path
    return error


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error


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
    except (OSError, RuntimeError) as error:  # torch.save hides what the system said behind an error of its own
        aside.unlink(missing_ok=True)
        error = error.__context__ if isinstance(error.__context__, OSError) else error
        why = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise UserError(f'cannot write {path}: {why}; what was there before is kept') from error


def write_json(path, value):
    write_aside(path, lambda file: json.dump(value, file, indent=1))


def fault_of(path, size, sha256):
    """-> what is wrong with a downloaded file, or ''. Servers send a page, with a good status, for what is not there."""
    if size and path.stat().st_size != size:
        return f'{path.stat().st_size:,} bytes instead of {size:,}'
    with open(path, 'rb') as file:
        if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
            return 'another sha256 than ' + sha256
        return '' if size or sha256 or file.read(1) not in (b'', b'<') else 'a web page in it, or nothing'


def download(urls, path, size=0, sha256=''):
    """
    Fetch path from the first of urls that gives it, unless it is there and right. Written to path.part, renamed when whole;
    with its size (bytes) or sha256 known, a partial file is gone on with. Time-outs, 5xx, 429 and broken lines are tried
    again, with back-off; anything else goes to the next address at once. Raises UserError with every address and its fault.
    """
    import requests
    path, faults = Path(path), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            fault = fault_of(path, size, sha256)
            if not fault:
                return path
            print(f'{path} has {fault}: downloading it anew', flush=True)
            path.unlink()
        for url in urls:
            for wait in WAITS:
                time.sleep(wait)
                try:
                    return fetch(url, path, size, sha256)
                except (UserError, ValueError, requests.exceptions.SSLError) as error:  # waiting would not mend it
                    fault = error
                    break
                except requests.RequestException as error:
                    fault = getattr(error.args[0] if error.args else error, 'reason', error)
            faults.append(f'{url}: {fault}')
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from error
    raise UserError(f'cannot download {path.name}: ' + '; '.join(faults))


def fetch(url, path, size, sha256):
    """One try of download: the rest of path.part if the server gives just that, else the whole."""
    import requests
    from tqdm import tqdm
    part, terminal = path.with_name(path.name + '.part'), sys.stderr.isatty()
    have = part.stat().st_size if (size or sha256) and part.exists() else 0
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        code, span = reply.status_code, reply.headers.get('Content-Range', '')
        if code == 416 or code == 206 and not span.startswith(f'bytes {have}-'):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f'what was there cannot be gone on with ({code} {span})')
        if code not in (200, 206, 408, 429) and code < 500:
            raise UserError(f'HTTP {code}')
        reply.raise_for_status()
        have = have if code == 206 else 0  # 200: the server knows no ranges, and sends the whole
        total = have + int(reply.headers.get('Content-Length', size - have))
        if size and total != size:
            raise UserError(f'{total:,} bytes instead of {size:,}')
        bar = tqdm(desc=path.name, total=total or None, initial=have, unit='B', unit_scale=True, disable=not terminal)
        with bar, open(part, 'ab' if have else 'wb') as file:
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
                if not terminal and total and have * 10 // total > (have - len(chunk)) * 10 // total:
                    print(f'{path.name}: {have:,} of {total:,} bytes', flush=True)
    if have < size:
        raise requests.ConnectionError(f'the line broke after {have:,} of {size:,} bytes')
    fault = fault_of(part, size, sha256)
    if fault:
        part.unlink()
        raise UserError(fault)
    os.replace(part, path)
    return path
