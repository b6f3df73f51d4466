"""`hivtp serve`: transformers' own server answers from our checkpoints what `generate` does, and says what it cannot serve."""

import inspect
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import image_utils
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from checkpoints import GEOMETRY, build_pruned_checkpoint
from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.evaluation import Row
from hivtp_hf.serving import transformers_server
from hub_commands import contents
from hub_server import HubServer
from served import ON_CPU, Reference, Served, bytes_part, image_part, png_of, serving, text_part
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import photo

httpx = image_utils.httpx
CLIENTS = 8
PRUNING = {"retention_ratio": 2 / 9}
OUR_OPTIONS = {
    "allowed_media_domains",
    "allowed_local_media_path",
    "media_timeout",
    "max_media_mib",
    "max_media_pixels",
    "max_waiting_requests",
    "shutdown_timeout",
    "trust_clients",
}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return convert_checkpoint(str(CHECKPOINT), tmp_path_factory.mktemp("complete") / "shapes", PRUNING)


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    return convert_checkpoint(str(CHECKPOINT), tmp_path_factory.mktemp("light") / "shapes", PRUNING, config_only=True)


@pytest.fixture(scope="module")
def reference(complete):
    return Reference.of(complete)


@pytest.fixture(scope="module")
def rows():
    """One question about each of as many images as there are clients."""
    by_image: dict[str, Row] = {}
    for row in held_out_rows(100):
        by_image.setdefault(row.image_name, row)
    chosen = list(itertools.islice(by_image.values(), CLIENTS))
    assert len(chosen) == CLIENTS
    return chosen


@pytest.fixture(scope="module")
def server(complete, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), complete, *ON_CPU) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


def content_of(row: Row) -> list[dict[str, Any]]:
    return [image_part(row.open_image()), text_part(row.question)]


def refused(server: Served, model: object, content: Any, stream: bool, **options: Any) -> str:
    """The message of a request that is answered with the status 400."""
    with pytest.raises(openai.BadRequestError) as error:
        server.ask(model, content, stream=stream, **options)
    assert error.value.response.status_code == 400
    return error.value.body["message"]


def long_text(reference: Reference, tokens: int) -> str:
    """A text whose whole prompt has so many tokens."""
    around = reference.inputs("").input_ids.shape[1]
    text = "square " * (tokens - around)
    assert reference.inputs(text).input_ids.shape[1] == tokens
    return text


def test_clients_at_once_get_what_generate_returns(server, complete, reference, rows):
    """Half of them streaming; and those whose requests are refused meanwhile disturb nobody."""
    expected = [reference.answer(row.question, row.open_image()) for row in rows]
    assert len({answer.text for answer in expected}) > 1
    unpruned = reference.inputs(rows[0].question, rows[0].open_image(), retention_ratio=1.0).input_ids.shape[1]
    assert expected[0].prompt_tokens < unpruned / 3
    too_long = [text_part("square " * 3000)]
    with ThreadPoolExecutor(CLIENTS + 4) as pool:
        answers, messages = [], []
        for number, row in enumerate(rows):
            answers.append(pool.submit(server.ask, complete, content_of(row), stream=bool(number % 2)))
            if number % 2:
                content = too_long if number % 4 == 1 else [bytes_part(b"no image"), text_part(row.question)]
                messages.append(pool.submit(refused, server, complete, content, stream=number > 4))
        assert [answer.result() for answer in answers] == expected
        assert all(message.result() for message in messages)


def test_text_alone(server, complete, reference):
    question = "What colour is the square?"
    assert server.ask(complete, question) == reference.answer(question)


@pytest.mark.parametrize("budget", [{"retention_ratio": 1.0}, {"token_budget": 100}])
def test_a_request_can_name_a_budget(server, complete, reference, rows, budget):
    extra = {"chat_template_kwargs": {"processor_kwargs": budget}}
    answer = server.ask(complete, content_of(rows[0]), extra_body=extra)
    assert answer == reference.answer(rows[0].question, rows[0].open_image(), **budget)


def test_a_broken_image(server, complete, free_port):
    png = png_of(photo(60, 100))
    parts = [bytes_part(content) for content in (b"no image", b"", png[: len(png) // 2], png[:60] + b"\0" + png[61:])]
    for part in [*parts, {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{free_port}/photo.jpg"}}]:
        for stream in (False, True):
            assert 0 < len(refused(server, complete, [part, text_part("What is shown?")], stream)) < 1000


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_leaves_no_room(server, complete, reference, stream):
    context = reference.model.config.text_config.max_position_embeddings
    fits = [text_part(long_text(reference, context - 1))]
    assert server.ask(complete, fits, stream=stream, max_tokens=1).prompt_tokens == context - 1
    message = refused(server, complete, [text_part(long_text(reference, context))], stream)
    assert f"{context} tokens" in message
    assert f"holds {context}" in message


def test_an_answer_ends_with_the_context(server, complete, reference):
    """However many tokens a request asks for, and whether or not the model would stop."""
    config = reference.model.config.text_config
    room = 4
    text = long_text(reference, config.max_position_embeddings - room)
    with server.client() as client:
        answer = client.chat.completions.create(
            model=str(complete),
            messages=[{"role": "user", "content": text}],
            max_tokens=10**9,
            temperature=0,
            logit_bias={str(reference.model.generation_config.eos_token_id): -100.0},
        )
    assert answer.usage.completion_tokens == room
    assert answer.choices[0].finish_reason == "length"


def test_a_revision_on_the_hub(config_only, reference, rows, tmp_path):
    """Of a checkpoint whose weights are in another repository."""
    files, stock = contents(config_only), contents(CHECKPOINT)
    config = json.loads(files["config.json"])
    with HubServer() as hub:
        config["base_model"] = {"name": "owner/stock", "revision": hub.add_repository("owner/stock", stock)}
        main = hub.add_repository("owner/pruned", {"README.md": b"# On a branch\n"})
        hub.repository("owner/pruned").refs["refs/heads/branch"] = main
        hub.commit("owner/pruned", {**files, "config.json": json.dumps(config).encode()}, revision="branch")
        name, environment = "owner/pruned@branch", hub.environment(tmp_path / "home", token=False)
        with serving(tmp_path, name, *ON_CPU, environment=environment) as server:
            assert server.ask(name, content_of(rows[0])) == reference.answer(rows[0].question, rows[0].open_image())


def test_checkpoints_named_in_requests(config_only, reference, rows, tmp_path):
    """Of both kinds and of both families, to a server that was given none."""
    llava = build_pruned_checkpoint(tmp_path, {"retention_ratio": 0.25}, "llava", vision_layers=9)
    strict = shutil.copytree(config_only, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}", encoding="utf-8")
    with serving(tmp_path, *ON_CPU) as server:
        assert server.ask(config_only, content_of(rows[0])) == reference.answer(rows[0].question, rows[0].open_image())
        answer = server.ask(llava, [image_part(photo(60, 100)), text_part("What is shown?")])
        assert answer.prompt_tokens < GEOMETRY["tile_size"] ** 2 // GEOMETRY["patch_size"] ** 2
        assert "missing" in refused(server, tmp_path / "missing", "What?", stream=False)
        for stream in (False, True):
            assert "roles must alternate" in refused(server, strict, "What?", stream)
    assert "Traceback" not in server.log.read_text()


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, trust_env=False, timeout=60)


def test_clients_do_not_administrate(server, complete, rows):
    """Nor set how answers are generated beyond OpenAI's fields, unless they are trusted."""
    for path in ("/reset", "/load_model"):
        answer = post(server, path, model=str(complete))
        assert answer.status_code == 403
        assert "--trust-clients" in answer.json()["error"]["message"]
    for stream in (False, True):
        message = refused(server, complete, "What?", stream, extra_body={"generation_config": '{"num_beams": 100}'})
        assert "--trust-clients" in message


def test_trusted_clients(complete, tmp_path):
    with serving(tmp_path, complete, *ON_CPU, "--trust-clients") as server:
        # An error once an answer has begun: the status has been sent, and the client is told all the same.
        with pytest.raises(openai.APIError):
            server.ask(complete, "What?", stream=True, extra_body={"generation_config": '{"num_beams": 2}'})
        assert '"ready"' in post(server, "/load_model", model=str(complete)).text
        assert post(server, "/reset").json() == {"status": "ok"}


def test_the_server_does_not_know_our_classes_by_itself(complete):
    """Where this fails, transformers has learnt to: make_classes_known can be deleted, once our oldest release has."""
    with pytest.raises(AttributeError, match="HIVTPLlavaNext"):
        ModelManager(device="cpu").load_model_and_processor(f"{complete}@main")


def test_help_lists_every_option_of_the_server(hivtp):
    status, shown, _ = hivtp("serve", "--help")
    assert status == 0
    for name in (set(inspect.signature(Serve).parameters) | OUR_OPTIONS) - {"force_model", "non_blocking"}:
        assert f"--{name.replace('_', '-')}"[:20] in shown, name


def test_a_stock_checkpoint_is_refused(hivtp, tmp_path):
    status, out, err = hivtp("serve", build_stock_checkpoint(tmp_path / "stock", **GEOMETRY), *ON_CPU)
    assert (status, out) == (1, "")
    assert "would be served unpruned" in err
    assert "hivtp convert --config-only" in err
    assert "Traceback" not in err


def test_missing_packages_are_named(hivtp, monkeypatch):
    monkeypatch.setattr(transformers_server, "is_serve_available", lambda: False)
    status, out, err = hivtp("serve")
    assert (status, out) == (1, "")
    assert "pip install 'hivtp-hf[serving]'" in err


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["{folder}/missing"], 1, "is no folder"),
        (["{folder}"], 1, "has no config.json"),
        (["{folder}/a@b"], 1, "has an @ in its path"),
        (["{folder}", "--no-such-option"], 2, "--no-such-option"),
        (["--port", "many"], 2, "Invalid value"),
        (["--allowed-media-domains", "https://images.example.com/"], 1, "is no host"),
        (["--allowed-local-media-path", "{folder}/missing"], 1, "is no folder"),
        (["--media-timeout", "0"], 1, "above 0"),
        (["--max-media-mib", "nan"], 1, "above 0"),
        (["--max-media-pixels", "0"], 1, "1 to"),
        (["--max-waiting-requests", "-1"], 1, "--max-waiting-requests"),
    ],
)
def test_errors_of_the_command(hivtp, tmp_path, arguments, status, named):
    (tmp_path / "a@b").mkdir()
    ended, out, err = hivtp("serve", *(argument.format(folder=tmp_path) for argument in arguments))
    assert (ended, out) == (status, "")
    assert named in err
    assert "Traceback" not in err


@pytest.mark.nightly
def test_weights_and_original_positions(rows, tmp_path):
    pruning = {"retention_ratio": 2 / 9, "token_weights": "cluster_size", "positions": "original"}
    told = convert_checkpoint(str(CHECKPOINT), tmp_path / "told", pruning)
    reference = Reference.of(told)
    expected = [reference.answer(row.question, row.open_image()) for row in rows]
    with serving(tmp_path, told, *ON_CPU) as server:
        assert [server.ask(told, content_of(row)) for row in rows] == expected
