"""Work in several processes that end with the one that asked for it, and folders and files held by one process at a time."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def lock(path, wait=False):
    """Hold a lock file until the block ends or the process dies; nothing on Windows.

    Raises OSError when another process holds it, unless that is waited for, and where the file system has no locks.
    """
    if not fcntl:
        yield
        return
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def follow_parent():
    """For the processes of a pool: end with the parent, however it ends, and of SIGTERM; other signals are the parent's to handle."""
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


def in_order(pool, function, jobs, ahead):
    """function(job) of each job, in their order; at most `ahead` of them are under way or wait to be taken."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
