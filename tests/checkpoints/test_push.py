"""`hivtp push` by the real client to a Hub on loopback: what is there afterwards loads without the package."""

import json
from typing import Any

import pytest

from checkpoints import build_pruned_checkpoint
from families import FAMILIES
from hivtp_hf.checkpoints import convert_checkpoint
from hub_commands import contents, message_of, run_commands
from hub_server import HubServer
from pushes import (
    CARD,
    WEIGHTS,
    check_same_answers,
    check_that_no_token_got_out,
    pushed_commit,
    uploads,
    with_changes,
    with_settings,
    with_shards,
)

pytestmark = pytest.mark.once

PRUNING = {"llava_next": {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 5}, "llava": {"retention_ratio": 0.4}}
EVIL = "raise SystemExit('foreign code ran')\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned checkpoint of each family, as `convert_checkpoint` makes it and as `save_pretrained` leaves it."""
    root = tmp_path_factory.mktemp("folders")
    made = {family: build_pruned_checkpoint(root / family, PRUNING[family], family) for family in FAMILIES}
    source, target = made["llava_next"].with_name("stock_source"), root / "llava_next" / "converted"
    convert_checkpoint(str(source), target, PRUNING["llava_next"], show_progress=False)
    return {**made, "llava_next": target}


@pytest.fixture(scope="module")
def small(folders):
    """One of them, for what is the same in every family."""
    return folders["llava"]


def test_what_is_pushed_loads_without_the_package(folders, tmp_path):
    sharded = with_shards(folders["llava"], tmp_path / "sharded")
    unseen = {".env": "secret", ".cache/huggingface/x.json": "{}", "__pycache__/a.pyc": "x", "additional/.hidden/x": "x"}
    seen = {"figures/cells.png": b"\x89PNG", "empty.txt": ""}
    whole = with_changes(folders["llava_next"], tmp_path / "whole", {**unseen, **seen})
    (whole / "copy.json").symlink_to("generation_config.json")
    (whole / "again").symlink_to("figures", target_is_directory=True)
    before = contents(whole)
    with HubServer() as hub:
        cases = [(["push", whole, "owner/whole", "--private"], hub.token), (["push", sharded, "owner/sharded"], hub.token)]
        outcomes = run_commands(hub, tmp_path / "home", cases)
        check_that_no_token_got_out(hub, outcomes, [hub.token])
        commits = [
            pushed_commit(outcome, name) for outcome, name in zip(outcomes, ("owner/whole", "owner/sharded"), strict=True)
        ]
        assert outcomes[0]["out"].splitlines()[0] == f"{hub.endpoint}/owner/whole"
        assert [hub.commits(name)[0].oid for name in ("owner/whole", "owner/sharded")] == commits
        assert [len(hub.commits(name)) for name in ("owner/whole", "owner/sharded")] == [2, 2]
        assert hub.repository("owner/whole").private
        assert not hub.repository("owner/sharded").private

        files = hub.files("owner/whole")
        del files[".gitattributes"]
        card = files.pop("README.md").decode()
        assert "owner/whole" in card
        assert card == before["README.md"].decode().replace("your-name/converted", "owner/whole")
        assert files.pop("copy.json") == before["generation_config.json"]
        expected = {name: content for name, content in before.items() if name not in (*unseen, "README.md", "copy.json")}
        assert files == {name: content for name, content in expected.items() if not name.startswith("again/")}
        # Without a card of its own it gets one, which names the repository.
        assert "owner/sharded" in hub.files("owner/sharded")["README.md"].decode()
        assert not hub.unanswered

        loaded = {("owner/whole", commits[0]): whole, ("owner/sharded", commits[1]): sharded, ("owner/sharded", None): sharded}
        check_same_answers(hub, loaded, tmp_path / "loading", hub.token)
    assert contents(whole) == before


def test_later_pushes(small, tmp_path):
    old = {"added_tokens.json": "{}", "extra.py": EVIL, "LICENSE.txt": "mine", "photo.png": b"p", "eval_results.json": "{}"}
    first = with_changes(small, tmp_path / "first", old)
    second = with_settings(small, tmp_path / "second", {"retention_ratio": 0.125})
    shards = with_shards(second, tmp_path / "shards")
    evil = with_changes(second, tmp_path / "evil", {"hivtp_llava.py": EVIL, "sitecustomize.py": EVIL})
    push = [
        (first, "owner/model"),
        (second, "owner/model"),
        (second, "owner/model"),
        (shards, "owner/model"),
        (second, "owner/model", "--revision", "a/branch"),
        (evil, "owner/model", "--revision", "a/branch"),
    ]
    with HubServer() as hub:
        guest = hub.add_user("guest")
        # Somebody's own .gitignore would leave out half of a checkpoint.
        start = hub.add_repository("owner/model", {".gitignore": b"*.json\n", "notes/config.json": b"{}"})
        cases = [(["push", *arguments], hub.token) for arguments in push]
        cases += [(["push", second, "owner/model", "--pr"], guest), (["push", shards, "owner/model", "--pr"], guest)]
        # Another commit in that request.
        cases += [(["push", first, "owner/model", "--revision", "refs/pr/1"], hub.token)]
        outcomes = run_commands(hub, tmp_path / "home", cases)
        check_that_no_token_got_out(hub, outcomes, [hub.token, guest])
        pushed = [pushed_commit(outcome, "owner/model") for outcome in outcomes]
        assert not hub.unanswered
        kept = {
            ".gitattributes",
            ".gitignore",
            "notes/config.json",
            "LICENSE.txt",
            "photo.png",
            "eval_results.json",
            "extra.py",  # nothing names it, so it changes nothing
            "README.md",
        }
        at = [hub.files("owner/model", commit) for commit in pushed]

        main = hub.commits("owner/model")
        # The third push found nothing to change.
        assert [commit.oid for commit in reversed(main)] == [
            hub.commits("owner/model", start)[-1].oid,
            start,
            *pushed[:2],
            pushed[3],
        ]
        assert pushed[2] == pushed[1]
        assert at[0].keys() == kept | contents(first).keys()
        assert at[1].keys() == kept | contents(second).keys()
        assert at[3].keys() == kept | contents(shards).keys()
        assert main[1].message.endswith(": added_tokens.json.")
        assert "Taken away there: added_tokens.json\n" in outcomes[1]["out"]
        assert "Taken away" not in outcomes[0]["out"]
        assert "Nothing was changed.\n" in outcomes[2]["out"]
        assert "Nothing was changed" not in outcomes[1]["out"] + outcomes[4]["out"]
        assert f"{hub.endpoint}/owner/model/tree/a%2Fbranch\n" in outcomes[4]["out"]
        assert main[0].message.endswith(f": {WEIGHTS}.")
        for folder, files in zip((first, second, second, shards), at, strict=False):
            assert {name: files[name] for name in contents(folder)} == contents(folder)
        # A branch begins where the main one stands, and a pull request leaves it where it is.
        branch = hub.commits("owner/model", "a/branch")
        assert [commit.oid for commit in branch[:3]] == [pushed[5], pushed[4], pushed[3]]
        assert at[4].keys() == at[1].keys()
        assert at[5]["hivtp_llava.py"] == EVIL.encode()
        assert [commit.oid for commit in hub.commits("owner/model", "refs/pr/1")][:3] == [pushed[8], pushed[6], pushed[3]]
        assert hub.repository("owner/model").pull_requests == ["guest"]
        assert f"Pull request: {hub.endpoint}/owner/model/discussions/1" in outcomes[6]["out"]
        # A pull request that would change nothing is none.
        assert pushed[7] == pushed[3]
        assert "Pull request" not in outcomes[7]["out"]
        assert "Nothing was changed, and no pull request opened." in outcomes[7]["out"]

        # Weights went up once, and two shards; everything after that was there already. Storage was asked about those alone
        # that the branch did not have under their names.
        assert len(uploads(hub)) == 3
        assert len(hub.asked("POST", "/info/lfs/objects/batch")) == 4


def test_weights_stay_at_the_base(folders, tmp_path):
    # With the weights of stock, byte for byte, and a card that names where they are from.
    stock = {family: contents(folder.parent / "stock_source") for family, folder in folders.items()}
    card = CARD.replace("owner/base", "owner/shards")
    plain = with_changes(folders["llava"], tmp_path / "plain", {"README.md": card, WEIGHTS: stock["llava"][WEIGHTS]})
    shards = with_shards(plain, tmp_path / "shards")
    complete = with_changes(folders["llava_next"], tmp_path / "complete", {"README.md": CARD})
    weights = {folder: {name for name in contents(folder) if "safetensors" in name} for folder in (complete, shards)}
    with HubServer() as hub:
        hub.add_repository("owner/base", stock["llava_next"])
        hub.add_repository("owner/shards", stock["llava"] | {name: (shards / name).read_bytes() for name in weights[shards]})
        hub.commit("owner/shards", {WEIGHTS: None})
        newest = {name: hub.commit(f"owner/{name}", {"NEWS.md": b"new"}) for name in ("base", "shards")}
        of_base = {"name": "owner/base", "revision": newest["base"]}
        config = json.loads((complete / "config.json").read_text())
        edited = json.dumps(config | {"base_model": of_base})
        config_only = with_changes(complete, tmp_path / "config_only", {"config.json": edited, WEIGHTS: None})

        refused = {
            "changed": ({WEIGHTS: (complete / WEIGHTS).read_bytes()[:-1] + b"\1"}, "is not the one of owner/base at commit"),
            "other": ({"README.md": card}, "what loads there is model.safetensors.index.json, here model.safetensors"),
            "nameless": ({"README.md": "# no metadata\n"}, "`base_model` in the metadata of README.md must name it"),
            "cardless": ({"README.md": None}, "`base_model` in the metadata of README.md must name it"),
            "absent": ({"README.md": CARD.replace("owner/base", "owner/absent")}, "Check that owner/absent exists"),
        }
        cases: list[Any] = []
        for name, (changed, _) in refused.items():
            cases.append([with_changes(complete, tmp_path / name, changed), "owner/refused", "--config-only"])
        cases += [[complete, "owner/base", "--config-only"], [config_only, "owner/base"], [config_only, "owner/full"]]
        full = hub.add_repository("owner/full", stock["llava_next"])
        accepted = [
            [complete, "owner/small"],
            [complete, "owner/small", "--config-only"],
            [shards, "owner/small2", "--config-only", "--private"],
            [config_only, "owner/small3"],
            [config_only, "owner/small3", "--config-only"],
        ]
        outcomes = run_commands(hub, tmp_path / "home", [(["push", *case], hub.token) for case in cases + accepted])
        check_that_no_token_got_out(hub, outcomes, [hub.token])
        messages = [message_of(outcome, [hub.token]) for outcome in outcomes[: len(cases)]]
        expected = [message for _, message in refused.values()] + ["is the base itself and would lose its weights"] * 2
        expected.append("owner/full has weights (model.safetensors), and this checkpoint has none")
        for message, text in zip(messages, expected, strict=True):
            assert text in message
        assert not hub.asked(pattern="owner/refused")
        assert hub.commits("owner/full")[0].oid == full
        assert {name: hub.commits(f"owner/{name}")[0].oid for name in newest} == newest
        commits = [pushed_commit(outcome, case[1]) for outcome, case in zip(outcomes[len(cases) :], accepted, strict=True)]
        assert commits[4] == commits[3]  # nothing to change

        # One upload: of the complete form. Its weights are taken away with the next push.
        assert [request.path.split("/")[4] for request in uploads(hub)] == ["small"]
        assert WEIGHTS in hub.files("owner/small", commits[0])
        for commit, (folder, name, *_) in list(zip(commits, accepted, strict=True))[1:3]:
            files, local = hub.files(name, commit), contents(folder)
            title, _, notice = files["README.md"].decode().partition("# A checkpoint\n\n")
            assert "base_model: owner/" in title
            assert notice.startswith("**There are no weights in this repository.**")
            assert newest["shards" if folder is shards else "base"] in notice
            base = "shards" if folder is shards else "base"
            written = json.loads(files.pop("config.json"))
            assert written.pop("base_model") == {"name": f"owner/{base}", "revision": newest[base]}
            assert written == json.loads(local.pop("config.json"))
            assert b"your-name" not in files.pop("README.md")
            del files[".gitattributes"], local["README.md"]
            assert files == {path: content for path, content in local.items() if path not in weights[folder]}
        assert json.loads(hub.files("owner/small3")["config.json"])["base_model"] == of_base
        assert not hub.unanswered
        small = {("owner/small", commits[1]): complete, ("owner/small2", commits[2]): shards, ("owner/small3", None): complete}
        check_same_answers(hub, small, tmp_path / "loading", hub.token)
