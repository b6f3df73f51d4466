"""Shared fixtures. Everything runs offline, on models made here."""

import importlib.util
import os
import socket

# Read by transformers and huggingface_hub when they are imported: nothing may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where workers share the cores


# Tests that need vLLM, which has an environment of its own: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["with_vllm"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
