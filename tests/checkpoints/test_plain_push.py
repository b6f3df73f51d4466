"""transformers' own `push_to_hub` of model and processor: what is there then loads without the package."""

from typing import Any

from checkpoints import build_pruned_checkpoint
from families import FAMILIES
from hub_commands import contents
from hub_server import HubServer, run_client
from pushes import check_same_answers

PRUNING = {"llava_next": {"method": "gprune"}, "llava": {"retention_ratio": 0.4}}


def pushed(folders: dict[str, str]) -> dict[str, Any]:
    """Runs in a process of its own: pushes checkpoints, by repository."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import hivtp_hf

    for repo, folder in folders.items():
        model, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
        assert type(model).__module__.startswith(hivtp_hf.__name__)
        model.push_to_hub(repo)
        processor.push_to_hub(repo)
    return {}


def test_model_and_processor_pushed_by_themselves(tmp_path):
    with HubServer() as hub:
        folders = {
            f"owner/{family}": build_pruned_checkpoint(tmp_path / family, PRUNING[family], family) for family in FAMILIES
        }
        run_client(hub, pushed, home=tmp_path / "pushing", folders=folders)
        for repo, folder in folders.items():
            files = hub.files(repo)
            assert {name for name in contents(folder) if name.endswith(".py")} <= files.keys()
            assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files.keys()
        check_same_answers(hub, {(repo, None): folder for repo, folder in folders.items()}, tmp_path / "loading")
        assert not hub.unanswered
