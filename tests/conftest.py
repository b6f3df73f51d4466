"""Shared fixtures. Everything runs offline, on models made here."""

import importlib.util
import os
import socket
import sys
from typing import NamedTuple

# Read by transformers and huggingface_hub when they are imported: nothing may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
import typer

from deprecations import watched_deprecations

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where workers share the cores


# Tests that need vLLM, which has an environment of its own: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["integration/with_vllm"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def deprecations():
    """Fails a test in which our code uses what transformers calls deprecated: a later release will not know it."""
    with watched_deprecations() as watch:
        yield watch
    assert not watch.found, "\n".join(watch.found)


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def hivtp(monkeypatch, capsys):
    """Runs the command line in this process, which spares every case the imports."""
    from hivtp_hf import cli  # which most tests do without

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hivtp", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs the command line of an example or a benchmark, a function for `typer.run`, in this process."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            typer.run(main)
        printed, code = capsys.readouterr(), ended.value.code
        # A message, which the interpreter would print at its end.
        return Ended(1, printed.out, printed.err + code) if isinstance(code, str) else Ended(code or 0, *printed)

    return run
