"""Files and folders that appear whole or not at all, a lock, and processes that end with the one that made them."""

import contextlib
import glob
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def replacing(path, alone=False):
    """A path beside `path` to make a file or folder at; when the block ends well it takes that place, else it goes.

    The file, or those that lie right in the folder, reach the disk before. alone: the caller holds a lock, so nobody
    else is at it, and what killed processes left of it is removed. A folder that another process has put there in the
    meantime stays, as it may be read already.
    """
    path = Path(path)
    there = path.is_dir()
    if alone:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            remove(leftover)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # containers may have equal process ids
    try:
        yield aside
        for file in (file for file in (aside, *aside.glob("*")) if file.is_file()):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if there:
            remove(path)
        if there or not path.is_dir():
            os.replace(aside, path)
    finally:
        remove(aside)


def remove(path):
    """Remove a file or a folder, as far as that goes."""
    with contextlib.suppress(OSError):
        if Path(path).is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


@contextlib.contextmanager
def lock(path):
    """Wait for a lock file, and hold it until the block ends or the process dies.

    Yields whether it is held: not on Windows, nor where the file system has no locks.
    """
    with open(path, "w") as file:
        held = fcntl is not None
        if held:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held


def follow_parent():
    """For the processes of a pool: end with the parent, however it ends, and of SIGTERM; other signals are its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in {"SIGINT", "SIGUSR1"} & set(dir(signal)):  # Windows has one of them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def processes(count):
    """A pool of so many processes, which import nothing again where they can be forked."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(count, context, follow_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # else an exception, such as a signal's, would wait for all that is left
