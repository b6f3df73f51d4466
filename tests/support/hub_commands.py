"""The command line in processes of their own whose Hub is one on loopback, and what became of it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from forked import run_python
from hub_server import HubServer, program


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command_line(*arguments: object) -> list[str]:
    """Arguments for Python that run the command line."""
    return ["-m", "hivtp_hf.cli", *map(str, arguments)]


def finished(hub: HubServer, home: Path, command: list[str], token: str | bool = False) -> subprocess.CompletedProcess[str]:
    """A process that has ended, whose Hub is `hub`; it has no token unless one is given."""
    home.mkdir(parents=True, exist_ok=True)
    return run_python(command, home, hub.environment(home, token=token))


def commands(cases: list[dict[str, Any]], parent: str) -> list[dict[str, Any]]:
    """Runs in a process of its own: the command line once per case, with its exit status and all that it wrote.

    Streams are taken at their descriptors, so that warnings of any library are among it. Nothing sleeps between attempts.
    """
    import os
    import sys
    import tempfile
    import time
    import traceback
    from pathlib import Path

    import hivtp_hf.cli

    slept: list[float] = []
    time.sleep = slept.append
    outcomes = []
    for case in cases:
        os.environ.pop("HF_TOKEN", None)
        if case.get("token"):
            os.environ["HF_TOKEN"] = case["token"]
        sys.argv = ["hivtp", *case["arguments"]]
        before, status = [os.dup(1), os.dup(2)], None
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                hivtp_hf.cli.main()
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for descriptor, stream in zip((1, 2), before, strict=True):
                    os.dup2(stream, descriptor)
                    os.close(stream)
            out.seek(0)
            err.seek(0)
            left = sorted(path.name for path in Path(parent).iterdir())
            outcomes.append({"status": status, "out": out.read(), "err": err.read(), "left": left, "slept": len(slept)})
    return outcomes


def run_commands(
    hub: HubServer, home: Path, cases: list[tuple[list[Any], str | None]], parent: Path | None = None
) -> list[dict[str, Any]]:
    """How the command line ended for each (arguments, token), one after the other in one process.

    Each outcome names what then lies in `parent`, a folder that is made here.
    """
    parent = parent or home / "nothing_is_left_here"
    parent.mkdir(parents=True, exist_ok=True)
    listed = [{"arguments": list(map(str, arguments)), "token": token} for arguments, token in cases]
    run = finished(hub, home, program(commands, cases=listed, parent=parent))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def message_of(outcome: dict[str, Any], tokens: list[str]) -> str:
    """The message of a command that failed as it should: one, without traceback or token, and with nothing left behind."""
    error = outcome["err"]
    assert outcome["status"] == 1, error
    assert "Traceback" not in error + outcome["out"], error
    assert not any(token in error + outcome["out"] for token in tokens)
    assert error.count("hivtp: ") == 1, error
    assert outcome["out"] == ""
    assert outcome["left"] == []
    message = error.partition("hivtp: ")[2].strip()
    assert message
    return message
