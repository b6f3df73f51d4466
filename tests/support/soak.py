"""A server under many clients at once for a while, good ones and bad ones at random.

    make soak-serve SOAK_ARGS="--minutes 30"

Every good request must be answered as by `generate`; memory and the number of threads must not grow.
"""

import argparse
import base64
import contextlib
import json
import random
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from transformers import image_utils

from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf.checkpoints import convert_checkpoint
from image_host import ImageHost, image_host
from served import ON_CPU, Answer, Reference, Served, image_part, png_of, serving, text_part

# Clients are turned away only while some that have left are still noticed. Slow hosts are given up soon.
OPTIONS = (*ON_CPU, "--allowed-media-domains", "127.0.0.1", "--media-timeout", 1, "--max-waiting-requests", 7)
_GROWTH = 1.05  # of memory, from the second third of the time to the last
# So often at most the warm-up is repeated until pools of threads grow no more.
_WARM_UPS = 8
_httpx = image_utils.httpx


@dataclass
class Report:
    """What came of it."""

    seconds: float = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)  # seconds until /health had answered
    memory: list[int] = field(default_factory=list)  # KiB, each second
    threads: list[int] = field(default_factory=list)
    threads_at_rest: tuple[int, int] = (0, 0)  # after the warm-up, and once all clients have gone

    @property
    def thirds(self) -> list[float]:
        """The median of memory in each third of the time, in MiB."""
        length = max(1, len(self.memory) // 3)
        return [statistics.median(self.memory[start : start + length]) / 1024 for start in (0, length, 2 * length)]

    def faults(self, memory: bool = True) -> list[str]:
        """What must not be, in words. Memory says something only after minutes: it grows until caches are full."""
        faults = list(self.wrong)
        if self.threads_at_rest[1] > self.threads_at_rest[0]:
            faults.append(f"threads: {self.threads_at_rest[0]} after the warm-up, {self.threads_at_rest[1]} at the end")
        if memory and self.thirds[2] > _GROWTH * self.thirds[1]:
            faults.append(f"memory grew: medians of {self.thirds} MiB in each third")
        return faults

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.seconds:.0f} s: {sum(self.outcomes.values())} requests ({counts}).\n"
            f"/health: {len(self.health)} times, median {1000 * statistics.median(self.health):.0f} ms, "
            f"longest {1000 * max(self.health):.0f} ms.\n"
            f"Memory: medians of the thirds {', '.join(f'{value:.0f}' for value in self.thirds)} MiB, "
            f"most {max(self.memory) / 1024:.0f} MiB.\n"
            f"Threads: {self.threads_at_rest[0]} after the warm-up, at most {max(self.threads)}, "
            f"{self.threads_at_rest[1]} once all clients had gone."
        )


class Soak:
    """Clients of a server, and what they get.

    Args:
        server: runs with `OPTIONS`.
        model: the checkpoint that it serves.
        reference: the same checkpoint in this process.
        host: where requests have images fetched from.
        questions: how many, each with an image of its own or without.
    """

    def __init__(self, server: Served, model: Path, reference: Reference, host: ImageHost, questions: int = 12) -> None:
        self.server, self.model, self.host, self.report = server, model, host, Report()
        self.lock = threading.Lock()
        self.good: list[tuple[Any, dict[str, Any], Answer]] = []
        for number, row in enumerate(held_out_rows(questions)):
            image, text = row.open_image(), text_part(row.question)
            budget = {"retention_ratio": (2 / 9, 0.5, 1.0)[number % 3]}
            extra = {"extra_body": {"chat_template_kwargs": {"processor_kwargs": budget}}}
            expected = reference.answer(row.question, image, **budget)
            host.files[f"/{number}.png"] = png_of(image)
            self.good.append(([image_part(image), text], extra, expected))
            self.good.append(([_named(host.url(f"/{number}.png")), text], extra, expected))
            self.good.append((row.question, {}, reference.answer(row.question)))
        self.broken = _broken_requests(host)

    def run(self, seconds: float, clients: int, seed: int = 0) -> Report:
        """Has so many clients at once send requests for so long."""
        for content, options, expected in self.good:  # the warm-up: every thread and cache that one client needs
            self.ask(content, options, expected, stream=False)
        kinds = (self.ask_good, self.ask_slow, self.ask_broken, self.ask_and_leave)

        def client(number: int, over: float) -> None:
            choice = random.Random(f"{seed} {number}")
            while time.monotonic() < over:
                choice.choices(kinds, (6, 1, 2, 2))[0](choice)

        with ThreadPoolExecutor(clients) as pool:
            before = self._threads_at_rest(pool, kinds, seed)
            self.report = Report(wrong=self.report.wrong)  # counts of the warm-up are not shown
            started = time.monotonic()
            over = started + seconds
            running = [pool.submit(client, number, over) for number in range(clients)]
            while not all(client.done() for client in running):
                self.observe()
                time.sleep(min(1, seconds / 20))
            for done in running:
                done.result()
        self.report.seconds = time.monotonic() - started
        self.report.threads_at_rest = (before, self._settled())
        for content, options, expected in self.good[:3]:
            self.ask(content, options, expected, stream=True)
        return self.report

    def _threads_at_rest(self, pool: ThreadPoolExecutor, kinds: tuple[Callable[[random.Random], None], ...], seed: int) -> int:
        """Threads after some of every kind at once, until none is added: pools of threads have their full size by then.

        A pool grows when a request meets all of its threads busy, which on a machine with other work one round may miss.
        """
        counts: list[int] = []
        while len(counts) < _WARM_UPS and counts[-2:] != [max(counts, default=-1)] * 2:
            numbers = range(8 * len(counts), 8 * len(counts) + 8)
            jobs = [pool.submit(kind, random.Random(f"warm {seed} {number}")) for kind in kinds for number in numbers]
            for job in jobs:
                job.result()
            counts.append(self._settled())
        return counts[-1]

    def _settled(self) -> int:
        """The number of threads once nothing is asked any more but /health, which has a thread too."""
        time.sleep(2)
        self.observe()
        return self._status("Threads")

    def observe(self) -> None:
        started = time.monotonic()
        answer = _httpx.get(f"{self.server.url}/health", trust_env=False, timeout=30)
        self.report.health.append(time.monotonic() - started)
        if answer.status_code != 200:
            self.wrong(f"/health: {answer.status_code}")
        self.report.memory.append(self._status("VmRSS"))
        self.report.threads.append(self._status("Threads"))

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.server.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def wrong(self, what: str) -> None:
        with self.lock:
            self.report.wrong.append(what)

    def count(self, outcome: str) -> None:
        with self.lock:
            self.report.outcomes[outcome] += 1

    def ask_good(self, choice: random.Random) -> None:
        self.ask(*choice.choice(self.good), stream=choice.random() < 0.5)

    def ask(self, content: Any, options: dict[str, Any], expected: Answer, stream: bool) -> None:
        try:
            answer = self.server.ask(self.model, content, stream=stream, **options)
        except openai.APIError as error:
            if getattr(error, "status_code", None) == 503:
                self.count("turned away")
            else:
                self.wrong(f"a good request: {error!r}")
            return
        if answer == expected:
            self.count("good")
        else:
            self.wrong(f"a good request (stream: {stream}): {answer}, and not {expected}")

    def ask_slow(self, choice: random.Random) -> None:
        part = _named(self.host.url(choice.choice(("/drip", "/hang"))))
        self.refused("slow", json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())

    def ask_broken(self, choice: random.Random) -> None:
        self.refused("broken", choice.choice(self.broken))

    def refused(self, kind: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        url = f"{self.server.url}/v1/chat/completions"
        try:
            answer = _httpx.post(url, content=body, headers=headers, trust_env=False, timeout=60)
        except _httpx.HTTPError as error:
            self.wrong(f"{kind}: {error!r} for {body[:200]!r}")
            return
        if answer.status_code == 503:
            self.count("turned away")
        elif answer.status_code in (400, 422):
            self.count(kind)
        else:
            self.wrong(f"{kind}: {answer.status_code} {answer.text[:200]} for {body[:200]!r}")

    def ask_and_leave(self, choice: random.Random) -> None:
        """After a while, which may be in the middle of the request, before the answer or within it."""
        content, _, _ = choice.choice(self.good)
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"messages": messages, "stream": choice.random() < 0.5, "max_tokens": 500}).encode()
        sent = body if choice.random() < 0.8 else body[: len(body) // 2]
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        address = urlsplit(self.server.url)
        with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port), 10) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + sent)
            time.sleep(choice.uniform(0, 0.5))
        self.count("abandoned")


def _named(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _data(content: bytes) -> dict[str, Any]:
    return _named(f"data:image/png;base64,{base64.b64encode(content).decode()}")


def _broken_requests(host: ImageHost) -> list[bytes]:
    png = host.files["/0.png"]
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = [
        _data(b"no image"),
        _data(png[: len(png) // 2]),
        _data(png[:60] + b"\0" + png[61:]),
        _data(png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]),
        _named("data:image/png;base64,abc"),
        _named("file:///etc/passwd"),
        _named("http://169.254.169.254/latest"),
        _named(host.url("/missing")),
        {"type": "video_url", "video_url": {"url": "/x"}},
        {"type": "image_url"},
        text_part("square " * 3000),
    ]
    bodies = [{"messages": [{"role": "user", "content": [part]}]} for part in parts]
    bodies += [{}, {"messages": "What?"}, {"messages": [{"content": "What?"}]}, {"messages": [], "unknown": 1}]
    return [b"", b"{", b"[]", *(json.dumps(body).encode() for body in bodies)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Has clients ask a server at random for a while.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, image_host() as host:
        folder = Path(name)
        model = convert_checkpoint(str(CHECKPOINT), folder / "shapes", {"retention_ratio": 2 / 9})
        with serving(folder, model, *OPTIONS) as server:
            report = Soak(server, model, Reference.of(model), host).run(60 * options.minutes, options.clients, options.seed)
        faults = report.faults()
        if "Traceback" in server.log.read_text():
            faults.append(f"the server's log:\n{server.log.read_text()[-3000:]}")
    print(report)
    print("\n".join(["All good requests were answered as by generate."] if not faults else ["Wrong:", *faults]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
