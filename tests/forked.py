"""Scripts of the project in processes that are forked from one which has imported torch, torchvision, timm and
accelerate: that takes longer than most of what they do. Nothing of the project is imported there.
"""

import dataclasses
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = []  # the process that forks, once it is there


@dataclasses.dataclass
class Finished:
    """What became of one script; a signal's number is negative, as subprocess has it."""

    returncode: int
    stdout: str
    stderr: str


def run(folder, script, *arguments, processes=1, timeout=240):
    """`python script ...` in a folder, several joined as `accelerate launch` joins them. Returns a Finished of each."""
    if not SERVER:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        SERVER.append(subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes))
    [server] = SERVER
    with tempfile.TemporaryDirectory() as outputs, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {
            "folder": str(folder), "command": [script, *map(str, arguments)], "processes": processes,
            "port": free.getsockname()[1], "outputs": outputs, "timeout": timeout,
        }  # fmt: skip
        free.close()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        read = [[Path(outputs, f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(processes)]
    return [Finished(code, *texts) for code, texts in zip(codes, read, strict=True)]


def become(job, rank):
    """Have this process, a forked one, be where a script of the job begins."""
    os.chdir(job["folder"])
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['outputs']}/{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["processes"] > 1:
        count = str(job["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]), OMP_NUM_THREADS="1")
        torch.set_num_threads(1)
    sys.argv = job["command"]
    sys.path[0] = str(Path(job["command"][0]).resolve().parent)


def wait(children, timeout):
    """Exit codes of processes, which are killed where they have not ended in so many seconds."""
    codes, end = {}, time.monotonic() + timeout
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import huggingface_hub  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    for line in sys.stdin:
        job, children = json.loads(line), []
        for rank in range(job["processes"]):
            children.append(os.fork())
            if not children[-1]:
                become(job, rank)
                break
        if not children[-1]:
            break
        print(json.dumps(wait(children, job["timeout"])), flush=True)
    else:
        sys.exit()
    runpy.run_path(sys.argv[0], run_name="__main__")
