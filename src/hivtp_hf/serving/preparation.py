"""Requests made ready for the model, off the event loop that all clients share."""

import asyncio
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image

from .media import Media

_IMAGE_PARTS = ("image_url", "input_image")
_BUDGETS = ("retention_ratio", "token_budget")
_TEMPLATE_ARGUMENTS = ("enable_thinking", "processor_kwargs", *_BUDGETS)


class Preparation:
    """The steps before generation: fetching in the event loop without holding it up, all others in a thread.

    transformers' handlers do all of them in the event loop, and nobody else is served meanwhile. There is one thread: images of
    one request at a time lie decoded in memory, and tokenizers are not made for several.

    Args:
        media: where images come from.
        trust_clients: whether a request may carry a `generation_config`.
    """

    def __init__(self, media: Media, trust_clients: bool = False) -> None:
        self._media = media
        self._trust_clients = trust_clients
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preparation")

    def take_over(self, handler: Any) -> None:
        """Has a handler (of chats, responses or completions) prepare its requests here.

        Args:
            handler: its `handle_request` ends with a call of `_streaming` or `_non_streaming`, which generate. These are put
                off here, so that all before them is preparation.
        """
        handle, stream, complete = handler.handle_request, handler._streaming, handler._non_streaming
        messages = handler.get_processor_inputs_from_messages

        async def put_off(*args: Any, **kwargs: Any) -> Any:
            return partial(complete, *args, **kwargs)

        async def handle_request(body: dict[str, Any], request_id: str) -> Any:
            check_template_arguments(body.get("chat_template_kwargs"))
            if not self._trust_clients:
                check_no_generation_config(body)
            parts = list(image_parts(body))
            files = await self._media.fetch([_named(part) for part in parts])

            if not isinstance(body.get("model") or handler.model_manager.force_model, str):
                raise ValueError("the request names no model.")

            def prepare() -> Any:
                handler._resolve_model(dict(body))  # here, as what goes wrong in loading is no mistake in the request's form
                for part, image in zip(parts, self._media.decode(files), strict=True):
                    part["image_url"] = image
                try:
                    return _without_mistakes(lambda: asyncio.run(handle(body, request_id)))
                finally:  # the request itself stays in memory until it is answered; its images need not
                    files.clear()
                    for part in parts:
                        part["image_url"] = ""

            answer = (await self._in_thread(prepare))()
            return await answer if inspect.isawaitable(answer) else answer

        handler._streaming = lambda *args, **kwargs: partial(stream, *args, **kwargs)
        handler._non_streaming = put_off
        handler.get_processor_inputs_from_messages = lambda *args: checked_messages(messages(*args))
        handler.handle_request = handle_request

    def take_over_decisions(self, handler: Any) -> None:
        """Has the handler of decisions load models here, and refuse images, which it would fetch by itself.

        Args:
            handler: `SystemOneHandler`, or None where the installed transformers has none.
        """
        if handler is None:
            return
        handle = handler.handle_request

        async def handle_request(body: dict[str, Any], request_id: str) -> Any:
            handler._validate_request(body)
            if body.get("assets"):
                raise ValueError("this end point takes no images here; send them to /v1/chat/completions.")
            await self._in_thread(handler._resolve_model, dict(body))
            return await handle(body, request_id)

        handler.handle_request = handle_request

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _without_mistakes(prepare: Any) -> Any:
    """What `prepare` returns; a ValueError for a request whose form is wrong, which the handlers do not check."""
    try:
        return prepare()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the request has not the form that it should have: {type(error).__name__}: {error}.") from error


def image_parts(body: Any) -> Iterator[dict[str, Any]]:
    """The parts of a request that name an image, wherever they are in it, in order."""
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("type") in _IMAGE_PARTS:
                yield value
            else:
                waiting.extend(reversed(value.values()))
        elif isinstance(value, list):
            waiting.extend(reversed(value))


def _named(part: dict[str, Any]) -> Any:
    name = part.get("image_url")
    return name.get("url") if isinstance(name, dict) else name


def checked_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they go to the processor, which would open whatever is named there: so nothing is but images in memory."""
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else []:
            if part["type"] == "text" or (part["type"] == "image" and isinstance(part["url"], Image.Image)):
                continue
            raise ValueError(f"this server takes texts and images, no {part['type']} (of {', '.join(part)}).")
    return messages


def check_no_generation_config(body: dict[str, Any]) -> None:
    """A ValueError for a request with a `generation_config`, whose beams and caches take memory and time without a limit."""
    if body.get("generation_config") is not None:
        raise ValueError(
            "the request has a generation_config, which this server takes with --trust-clients alone. Send the fields of "
            "OpenAI's API, such as max_tokens, temperature, top_p and seed."
        )


def check_template_arguments(arguments: Any) -> None:
    """A ValueError for arguments of a template that a client may not give.

    Among all that the processor takes are images, by name, sizes for resizing them, and templates, which are programs.
    """
    if arguments is None:
        return
    inner = arguments.get("processor_kwargs") or {} if isinstance(arguments, dict) else None
    if not isinstance(inner, dict):
        raise ValueError('chat_template_kwargs, and processor_kwargs in it, must be objects: {"retention_ratio": 0.5}.')
    refused = sorted(set(arguments) - set(_TEMPLATE_ARGUMENTS)) + sorted(set(inner) - set(_BUDGETS))
    if refused:
        raise ValueError(
            f"chat_template_kwargs names {', '.join(refused)}; a request may give {', '.join(_TEMPLATE_ARGUMENTS)}, and "
            f"{' and '.join(_BUDGETS)} in processor_kwargs. For all requests, others can be set as the server is started "
            "(--chat-template-kwargs)."
        )
