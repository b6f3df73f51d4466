"""vLLM's server as a process of its own, in which nothing of this project can be imported."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

# By this name clients ask for the model, whatever the folder is called.
MODEL = "served"
# What a checkpoint of ours needs, and a small machine: see docs/serving_engines.md.
PRUNED = ("--model-impl", "transformers", "--trust-remote-code")
_SMALL = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
# What `vllm serve` runs. That command itself asks for the version of a package called vllm, which builds for CPUs are not.
_SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
_SECONDS_TO_START = 600
_SECONDS_TO_STOP = 60
_LINES_OF_LOG = 40


def engine_environment(work_folder: Path) -> dict[str, str]:
    """The environment variables of an engine on a CPU that runs a checkpoint by the code that lies in it, offline.

    Args:
        work_folder: where remote code is copied to.
    """
    # PYTHONPATH would let the engine import the package where it is to be served without it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work_folder / "modules"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextlib.contextmanager
def serving(checkpoint: Path | str, work_folder: Path, arguments: Sequence[str] = PRUNED) -> Iterator[str]:
    """A server of a checkpoint, for as long as the block runs.

    Args:
        checkpoint: a folder.
        work_folder: an existing folder, which gets the log `server.log` and the engine's caches.
        arguments: of `vllm serve`, beside those for a small machine.

    Yields:
        The address of its OpenAI interface, such as "http://127.0.0.1:8000/v1".

    Raises:
        RuntimeError: where it ends before it answers, or does not answer in ten minutes, with the end of its log.
    """
    port = _free_port()
    command = [*_SERVE, "--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", MODEL, *_SMALL, *arguments]
    log = work_folder / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=work_folder,
            env=engine_environment(work_folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the engine's own processes it forms a group, which is ended as one
        )
        try:
            _wait_until_healthy(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with status {process.returncode} before it answered:\n{_end_of(log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"vLLM's server did not answer in {_SECONDS_TO_START} seconds:\n{_end_of(log)}")
        time.sleep(0.5)


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_LOG:])


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_STOP)
    # What is left of the group, such as an engine that lost its server.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
