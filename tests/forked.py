"""Python programs in processes of their own that start in a second: `run_python`.

A new interpreter spends most of its start on torch, scipy and sympy. Here one process per test worker imports these once and
forks for each program. It imports nothing that reads the environment on import, as huggingface_hub and transformers do, nor
any code of ours: a program does that itself, under the environment it was given, and nothing of one program reaches another.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

_SERVER = """
import json, os, runpy, signal, sys, types
import numpy, PIL.Image, scipy.optimize, scipy.stats, torch
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.nn.attention.flex_attention

for line in iter(sys.stdin.readline, ""):
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(task["timeout"])
os.environ.clear()
os.environ.update(task["environment"])
os.chdir(task["folder"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
for descriptor, file in enumerate((os.devnull, task["stdout"], task["stderr"])):
    os.dup2(os.open(file, os.O_WRONLY if descriptor else os.O_RDONLY), descriptor)
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


def run_python(
    arguments: list[str], folder: Path, environment: Mapping[str, str], timeout: int = 300
) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run([sys.executable, *arguments], ...)` gives for `-c PROGRAM ...` and `-m MODULE ...`.

    The process runs in `folder`, has `environment` and no input, and is killed after `timeout` seconds. Where there is no
    fork that can be relied on, it is an interpreter that starts as any other.
    """
    if sys.platform != "linux":
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with _lock, tempfile.TemporaryDirectory() as outputs:
        files = {name: Path(outputs, name) for name in ("stdout", "stderr")}
        for file in files.values():
            file.touch()
        task = {"arguments": arguments, "folder": str(folder), "environment": dict(environment), "timeout": timeout}
        server = _server()
        server.stdin.write(json.dumps(task | files, default=str) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files.values()))


def _server() -> "subprocess.Popen[str]":
    """The process that forks; it ends with this one, when its input does."""
    if not _servers:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = "1"  # as in the tests' own process
        command = [sys.executable, "-c", _SERVER]
        _servers.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    return _servers[0]
