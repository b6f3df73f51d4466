"""`hivtp serve` goes on: with slow hosts, clients that leave or ask for too much, too many of them, and a signal."""

import contextlib
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import openai
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, image_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.serving import Server
from image_host import image_host
from served import ON_CPU, Reference, bytes_part, image_part, png_of, serving, text_part

httpx = image_utils.httpx
QUESTION = "What colour is the square?"
LONG = 300  # tokens
WAITING = 2


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return convert_checkpoint(str(CHECKPOINT), tmp_path_factory.mktemp("complete") / "shapes", {"retention_ratio": 2 / 9})


@pytest.fixture(scope="module")
def reference(complete):
    return Reference.of(complete)


@pytest.fixture(scope="module")
def row():
    return next(iter(held_out_rows(1)))


@pytest.fixture(scope="module")
def host(row):
    with image_host() as host:
        host.files["/photo.png"] = host.files["/hang"] = png_of(row.open_image())
        yield host


@pytest.fixture(scope="module")
def server(complete, host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    options = ("--allowed-media-domains", "127.0.0.1", "--allowed-local-media-path", folder, "--max-media-mib", "1")
    (folder / "photo.png").write_bytes(host.files["/photo.png"])
    with serving(folder, complete, *ON_CPU, *options, "--max-waiting-requests", WAITING, "--media-timeout", 60) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


def url_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def endless(model):
    """Options of a request whose answer has as many tokens as it may have."""
    return {"temperature": 0, "logit_bias": {str(model.generation_config.eos_token_id): -100.0}}


def test_images_from_a_host_and_from_a_folder(server, complete, host, reference, row):
    expected = reference.answer(row.question, row.open_image())
    for url in (host.url("/photo.png"), (server.log.parent / "photo.png").as_uri()):
        assert server.ask(complete, [url_part(url), text_part(row.question)]) == expected


def test_others_are_served_while_a_host_is_slow_and_too_many_are_turned_away(server, complete, host, reference, row):
    expected = reference.answer(row.question, row.open_image())
    hanging = [url_part(host.url("/hang")), text_part(row.question)]
    with ThreadPoolExecutor(WAITING + 1) as pool:
        try:
            held = [pool.submit(server.ask, complete, hanging, stream=bool(number)) for number in range(WAITING)]
            for _ in held:
                assert host.hanging.acquire(timeout=60)
            assert server.ask(complete, QUESTION) == reference.answer(QUESTION)
            assert httpx.get(f"{server.url}/health", trust_env=False).json() == {"status": "ok"}
            held.append(pool.submit(server.ask, complete, hanging))
            assert host.hanging.acquire(timeout=60)
            with pytest.raises(openai.InternalServerError, match="Try again later") as error:
                server.ask(complete, QUESTION)
            assert error.value.status_code == 503
            assert int(error.value.response.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        finally:
            host.released.set()
        assert [answer.result() for answer in held] == [expected] * (WAITING + 1)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": [{"role": "user", "content": [url_part("file:///etc/passwd")]}]}, "is no file in the folder"),
        ({"messages": [{"role": "user", "content": [url_part("/etc/passwd")]}]}, "no image"),
        ({"messages": [{"role": "user", "content": [url_part("http://10.0.0.1/")]}]}, "--allowed-media-domains"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "NoneType"),
        ({"messages": [{"role": "user", "content": [bytes_part(bytes(2**20 + 1))]}]}, "1 MiB"),
        ({"messages": [{"role": "user", "content": [bytes_part(bytes(5 * 2**20))]}]}, "bytes"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/x"}}]}]}, "no video"),
        ({"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "/x"}}]}]}, "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "/x"}]}]}, "audio"),
        ({"messages": [{"content": "What?"}]}, "role"),
        ({"messages": "What?"}, "form"),
        ({}, "messages"),
        ({"messages": [], "chat_template_kwargs": {"images": ["/etc/passwd"]}}, "images"),
        ({"messages": [], "chat_template_kwargs": {"processor_kwargs": {"images": ["/etc/passwd"]}}}, "images"),
        ({"messages": [], "chat_template_kwargs": {"processor_kwargs": {"size": 10**6}}}, "size"),
        ({"messages": [], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        ({"messages": [], "chat_template_kwargs": [1]}, "objects"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_request_may_not_have(server, body, named, stream):
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": stream}, trust_env=False)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert named in message
    assert len(message) < 600


def test_the_other_end_points(server, host, reference, row):
    """Which take images in their own ways."""
    for content in ([{"type": "input_image", "image_url": host.url("/photo.png")}], [image_part(row.open_image())]):
        body = {"input": [*content, {"type": "input_text", "text": row.question}], "stream": False, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/responses", json={**body, "max_output_tokens": 5}, trust_env=False, timeout=60)
        assert answer.json()["output"][0]["content"][0]["text"] == reference.answer(row.question, row.open_image()).text
    text = {"prompt": "The square is", "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/completions", json=text, trust_env=False, timeout=60)
    assert 0 < answer.json()["usage"]["completion_tokens"] <= 2


FILE = {"type": "input_image", "image_url": "/etc/passwd"}


@pytest.mark.parametrize(
    ("end_point", "body"),
    [
        ("responses", {"input": [FILE]}),
        ("responses", {"input": [{"role": "user", "content": [FILE]}]}),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": [FILE]}]}),
        ("completions", {"prompt": "square " * 3000}),
        pytest.param(
            "systemone",
            {"state": "", "questions": {"a": {"type": "noul", "instructions": "?"}}, "assets": {"b": {"image": "/etc/passwd"}}},
            marks=pytest.mark.skipif(find_spec("transformers.cli.serving.systemone") is None, reason="not in this release"),
        ),
    ],
)
def test_what_other_end_points_refuse(server, end_point, body):
    answer = httpx.post(f"{server.url}/v1/{end_point}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "form" not in answer.json()["error"]["message"]


def test_a_signal_lets_answers_end(complete, reference, tmp_path):
    """Those that have begun; nobody else is let in."""
    with serving(tmp_path, complete, *ON_CPU) as server, server.client() as client:
        chunks = client.chat.completions.create(
            model=str(complete),
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            max_tokens=LONG,
            **endless(reference.model),
        )
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        last = list(chunks)[-1]
        assert (last.choices[0].finish_reason, last.usage.completion_tokens) == ("length", LONG)
        server.process.wait(timeout=60)
    assert "exceeded" not in server.log.read_text()


def test_an_answer_that_takes_too_long_is_cut_off(complete, reference, host, tmp_path):
    host.released.clear()
    options = ("--shutdown-timeout", 1, "--allowed-media-domains", "127.0.0.1", "--media-timeout", 1000)
    with serving(tmp_path, complete, *ON_CPU, *options) as server, ThreadPoolExecutor(1) as pool:
        while host.hanging.acquire(blocking=False):
            pass
        held = pool.submit(server.ask, complete, [url_part(host.url("/hang"))])
        assert host.hanging.acquire(timeout=60)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            held.result()
        server.process.wait(timeout=60)
    assert "exceeded" in server.log.read_text()


class Steps(StoppingCriteria):
    """Counts the tokens of one answer, and holds it after the first until its client has gone."""

    def __init__(self, gone):
        self.gone, self.count = gone, 0
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.count += 1
        self.begun.set()
        assert self.gone.wait(60)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.fixture(scope="module")
def server_here(complete):
    """A server in this process, its address, and the model that it runs."""
    known = dict(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    server = Server(force_model=str(complete), device="cpu", dtype="float32", host="127.0.0.1", port=0, non_blocking=True)
    while not server.server.started:
        server._thread.join(0.05)
    model, _ = server._model_manager.load_model_and_processor(server._model_manager.process_model_name(str(complete)))
    try:
        yield server.server.servers[0].sockets[0].getsockname(), model
    finally:
        server.kill_server()
        server._thread.join(60)
        # Other tests in this process see what transformers' server knows by itself.
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.clear()
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.update(known)


def abandoned(address, body):
    """A connection on which a request was sent."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(address)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_generation(server_here, stream):
    """And that of one that still waits does not begin."""
    address, model = server_here
    generate, runs = model.generate, []

    def counted(**arguments):
        (watch,) = arguments.pop("stopping_criteria")
        runs.append(Steps(watch._gone))
        try:
            return generate(**arguments, stopping_criteria=StoppingCriteriaList([runs[-1], watch]))
        finally:
            runs[-1].ended.set()

    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": stream, "max_tokens": LONG, **endless(model)}
    model.generate = counted
    try:
        first = abandoned(address, body)
        while not runs:
            first.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                first.recv(1, socket.MSG_PEEK)
        assert runs[0].begun.wait(60)
        waiting = abandoned(address, body)
        waiting.close()
        first.close()
        assert runs[0].ended.wait(60)
        assert runs[0].count <= 2
    finally:
        del model.generate
    url = f"http://{address[0]}:{address[1]}/v1/chat/completions"
    answer = httpx.post(url, json={**body, "stream": False, "max_tokens": 7}, trust_env=False, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 7
    assert len(runs) == 1


def test_no_image_is_opened_but_those_that_were_fetched(server, complete):
    """Whatever its type is called."""
    part = {"type": "image", "url": "/etc/passwd"}
    answer = server.ask(complete, [part, text_part(QUESTION)])
    assert answer == server.ask(complete, QUESTION)
