"""Python programs in processes of their own that start in a second: `run_python`, `run_together`.

A new interpreter spends most of its start on torch, scipy and sympy. Here one process per test worker imports these once and
forks for each program. It imports nothing that reads the environment on import, as huggingface_hub and transformers do, nor
any code of ours: a program does that itself, under the environment it was given, and nothing of one program reaches another.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

_SERVER = """
import gc, json, os, runpy, signal, sys, types
import numpy, PIL.Image, scipy.optimize, scipy.stats, torch
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.nn.attention.flex_attention

def wait_for_a_task():
    for line in iter(sys.stdin.readline, ""):
        children = []
        for task in json.loads(line):
            child = os.fork()
            if child == 0:
                return task
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
    sys.exit()

gc.freeze()  # or every process that ends would take apart what was imported here
task = wait_for_a_task()
for descriptor, file in enumerate((os.devnull, task["stdout"], task["stderr"])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT if descriptor else os.O_RDONLY), descriptor)
signal.alarm(300)  # which kills it: by then something is wrong
os.environ.clear()
os.environ.update(task["environment"])
os.chdir(task["folder"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
option, program, *arguments = task["arguments"]
sys.argv = [option, *arguments]
if option == "-m":
    runpy.run_module(program, run_name="__main__", alter_sys=True)
else:
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
"""

_lock = threading.Lock()
_servers: list["subprocess.Popen[str]"] = []


def run_python(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run([sys.executable, *arguments], ...)` gives for `-c PROGRAM ...` and `-m MODULE ...`.

    The process runs in `folder`, and has `environment` and no input.
    """
    return run_together([arguments], folder, environment)[0]


def run_together(
    programs: list[list[str]], folder: Path, environment: Mapping[str, str]
) -> list["subprocess.CompletedProcess[str]"]:
    """Several such processes at a time, each by its arguments."""
    with tempfile.TemporaryDirectory() as outputs:
        tasks = [
            {
                "arguments": list(map(str, arguments)),
                "folder": str(folder),
                "environment": dict(environment),
                "stdout": f"{outputs}/{number}.stdout",
                "stderr": f"{outputs}/{number}.stderr",
            }
            for number, arguments in enumerate(programs)
        ]
        with _lock:
            server = _server()
            server.stdin.write(json.dumps(tasks) + "\n")
            server.stdin.flush()
            statuses = json.loads(server.stdout.readline())
        texts = [[Path(task[name]).read_text() for name in ("stdout", "stderr")] for task in tasks]
        return [
            subprocess.CompletedProcess(arguments, status, *text)
            for arguments, status, text in zip(programs, statuses, texts, strict=True)
        ]


def _server() -> "subprocess.Popen[str]":
    """The process that forks; it ends when its input does, at the latest with this one."""
    if not _servers:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = "1"  # as in the tests' own process
        command = [sys.executable, "-c", _SERVER]
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(server.communicate)
        _servers.append(server)
    return _servers[0]
