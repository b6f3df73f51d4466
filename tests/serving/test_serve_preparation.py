"""How `hivtp serve` makes requests ready: beside the event loop, with images in memory no longer than that takes."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from hivtp_hf.serving.media import Media
from hivtp_hf.serving.preparation import Preparation, image_parts
from served import image_part, text_part
from tiny_models import photo

pytestmark = pytest.mark.once


class Handler:
    """Does what transformers' handlers do, and notes where."""

    model_manager = SimpleNamespace(force_model="model")

    def __init__(self):
        self.seen, self.threads = [], {}

    def _resolve_model(self, body):
        self.threads["loading"] = threading.current_thread()

    def get_processor_inputs_from_messages(self, messages):
        parts = [{"type": "image", "url": part["image_url"]} for part in messages[0]["content"] if "image_url" in part]
        return [{"role": "user", "content": parts}]

    async def handle_request(self, body, request_id):
        self.threads["preparing"] = threading.current_thread()
        (message,) = self.get_processor_inputs_from_messages(body["messages"])
        self.seen += [part["url"] for part in message["content"]]
        return self._streaming(request_id) if body["stream"] else await self._non_streaming(request_id)

    def _streaming(self, request_id):
        self.threads["answering"] = threading.current_thread()
        return request_id

    async def _non_streaming(self, request_id):
        self.threads["answering"] = threading.current_thread()
        return request_id


def asked(content, stream=False):
    return {"stream": stream, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_prepared_beside_the_event_loop(stream):
    handler = Handler()
    body = asked([image_part(photo(20, 30)), text_part("?"), image_part(photo(30, 20))], stream)
    Preparation(Media()).take_over(handler)
    assert asyncio.run(handler.handle_request(body, "request")) == "request"
    assert [image.size for image in handler.seen] == [photo(20, 30).size, photo(30, 20).size]
    assert handler.threads["answering"] is threading.current_thread()
    assert handler.threads["loading"] is handler.threads["preparing"] is not threading.current_thread()
    assert [part["image_url"] for part in image_parts(body)] == ["", ""]


def test_nothing_but_an_image_in_memory_goes_to_the_processor():
    handler = Handler()
    Preparation(Media()).take_over(handler)
    for content in ([{"image_url": "/etc/passwd"}], [{"type": "other", "image_url": "/etc/passwd"}]):
        with pytest.raises(ValueError, match="takes texts and images"):
            asyncio.run(
                handler.handle_request({"stream": False, "messages": [{"role": "user", "content": content}]}, "request")
            )
    assert handler.seen == []
    image = Image.new("RGB", (2, 2))
    asyncio.run(handler.handle_request(asked([{"image_url": image}]), "request"))
    assert handler.seen == [image]
