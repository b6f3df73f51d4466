"""Model cards: metadata that the Hub takes, numbers that the settings mean, code that runs, and values that stay data."""

import functools
import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from checkpoints import build_pruned_checkpoint
from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import model_card
from hivtp_hf.checkpoints.repository_names import PLACEHOLDER_OWNER, with_repository
from hivtp_hf.pruning.registry import METHODS
from hub_server import HubServer, run_client
from tested_methods import TESTED
from tiny_models import photo

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
BASE, COMMIT = "llava-hf/some-base", "0123456789abcdef" * 2 + "01234567"
REPOSITORY = "owner/pruned"
LOCAL_BASE = {"name": "/somewhere/else", "revision": None}
HUB_BASE = {"name": BASE, "revision": COMMIT}
SIZES = ["672 x 672", "480 x 640", "300 x 451", "1000 x 300", "100 x 1000"]


@pytest.fixture(autouse=True)
def no_name_of_the_template_is_left_undefined(monkeypatch):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """By family: checkpoints with weights, small tiles."""
    return {name: build_pruned_checkpoint(tmp_path_factory.mktemp(name), {}, name) for name in FAMILIES}


def variant(folder, target, pruning, base_model=None):
    """A copy of a checkpoint with other settings."""
    shutil.copytree(folder, target)
    for name in ("config.json", "processor_config.json"):
        stored = json.loads((target / name).read_text())
        stored["pruning_config"] = VisualTokenPruningConfig.coerce(pruning).to_dict()
        if base_model is not None and name == "config.json":
            stored["base_model"] = base_model
        (target / name).write_text(json.dumps(stored))
    return target


def check_metadata(card):
    """What the Hub refuses, or would not find anything by."""
    metadata = yaml.safe_load(card.data.to_yaml())
    assert metadata == yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata.get("base_model_relation") == ("finetune" if "base_model" in metadata else None)
    return metadata


def check_text(card):
    """What every card keeps to, whatever it was made of."""
    text = str(card)
    assert str(ModelCard(text)) == text
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    assert not re.search(r"\{\{|\{%|%\}|\{#|Undefined|Hyperparameter\(", text.partition("```bibtex")[0])
    assert text.count("```") == 2 * len(re.findall(r"^```\w+$", text, re.MULTILINE))
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1
    for block in blocks(card):
        compile(block, "card", "exec")
    return text


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def table(card, heading):
    section = card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


@pytest.mark.parametrize(
    ("family", "pruning", "base_model"),
    [
        ("llava_next", {}, LOCAL_BASE),
        ("llava_next", {"exact_count": False}, None),
        ("llava_next", {"token_budget": 30, "keep_newlines": False}, HUB_BASE),
        ("llava", {"retention_ratio": 1.0}, HUB_BASE),
        ("llava", {"method": "hiprune", "object_layer": 5}, LOCAL_BASE),
        ("llava", {"method": "gprune", "retention_ratio": 2 / 9}, None),
        *(("llava_next", {"method": name, **TESTED[name].small}, None) for name in ("cls_attention", "random", "none")),
        ("llava", {"method": "uniform"}, HUB_BASE),
    ],
    ids=str,
)
def test_a_card_says_what_the_checkpoint_is(tiny, tmp_path, family, pruning, base_model):
    settings = VisualTokenPruningConfig(**pruning)
    method, ours = METHODS[settings.method], FAMILIES[family]
    folder = variant(tiny[family], tmp_path / "made", pruning, base_model)
    # The base that config.json names goes first.
    given = {"base_name": BASE, "base_revision": COMMIT} if base_model is None else {"base_name": "other/base"}
    card = model_card(folder, repo_id=REPOSITORY, base_card=ModelCardData(license="apache-2.0"), **given)
    on_the_hub = base_model != LOCAL_BASE

    metadata, text = check_metadata(card), check_text(card)
    assert metadata.get("base_model") == (BASE if on_the_hub else None)
    assert metadata["license"] == "apache-2.0"
    assert {"visual-token-pruning", "token-pruning", "training-free", family} <= set(metadata["tags"])
    assert (method.name in metadata["tags"]) == (not method.keeps_everything)
    assert ("no weights in this repository" in text) == (base_model is not None)
    assert (f"hivtp convert {REPOSITORY} FOLDER" in text) == (base_model is not None)
    assert (COMMIT in text) == (f"https://huggingface.co/{BASE}" in text) == on_the_hub
    assert LOCAL_BASE["name"] not in text
    assert ours.model.__name__ in text
    assert "has not been measured" in text

    shown = {name: (value, meaning) for name, value, meaning in table(card, "Settings")}
    assert {name: value for name, (value, _) in shown.items()} == {
        name: str(value) for name, value in settings.to_dict().items()
    }
    assert all(meaning for _, meaning in shown.values())
    assert {setting.name: shown[setting.name][1] for setting in method.settings} == {
        setting.name: setting.meaning for setting in method.settings
    }
    prunes = not method.keeps_everything and settings.retention_ratio != 1
    assert ("a part of each image's visual" in card.text) == prunes
    assert ("keeps\nevery patch token" in card.text) == (not prunes)
    has_budget = bool(settings.retention_ratio or settings.token_budget)
    assert ("rules over" in text) == (method.name == "hivtp" and has_budget)
    assert ("fewer may be kept" in text) == ("Serving engines need" in text) == (not settings.exact_count)

    processor, counts = ours.processor.from_pretrained(folder), table(card, "Tokens per image")
    assert [row[0] for row in counts] == (SIZES if family == "llava_next" else ["any"])
    for size, *numbers in counts:
        layout = processor.token_layout(*map(int, SIZES[0 if size == "any" else SIZES.index(size)].split(" x ")))
        assert numbers == [str(number) for number in (layout.num_stock, layout.num_retained, layout.num_newlines)]

    # A method says in its rule where it is from: papers by their numbers, or that it is a baseline.
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", method.rule)
    assert bool(papers) != (method.keeps_everything or method.rule.startswith("a baseline"))
    assert re.findall(r"eprint = \{(.*)\}", text) == papers
    assert ("## Citation" in text) == bool(papers)
    assert all((f"https://arxiv.org/abs/{paper}" in text.split("## Settings")[0]) == prunes for paper in papers)


OTHER = {"license": "other"}
ADDRESS, THERE = "https://example.org/LICENCE?v=1", f"https://huggingface.co/{BASE}/blob/{COMMIT}/LICENSE"


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"license": "llama2", "language": ["en", "de", "en"]}, {"license": "llama2", "language": ["en", "de"]}, ": `llama2`."),
        ({"license": ["mit", "openrail++"]}, {"license": ["mit", "openrail++"]}, "`mit`, `openrail++`"),
        ({**OTHER, "license_name": "own-1.0", "license_link": "a(b)"}, {**OTHER, "license_name": "own-1.0"}, ": `own-1.0`."),
        ({**OTHER, "license_link": ADDRESS}, {**OTHER, "license_link": ADDRESS}, f": [see there]({ADDRESS})."),
        ({**OTHER, "license_link": "LICENSE"}, {**OTHER, "license_link": THERE}, f": [see there]({THERE})."),
        # What is broken is left out, and what is right beside it is not.
        ({}, {}, ": see [`"),
        ({"license": "Apache 2.0", "license_name": "a", "language": "en"}, {"language": "en"}, ": see [`"),
        ({"license": ["mit", "{{ evil }}"], "base_model": "other/base", "tags": "x"}, {}, ": see [`"),
        ({"license": {"mit": True}, "language": [False, None, "en\n", "fr"]}, {"language": "fr"}, ": see [`"),
        ({"license": "mit\n---\nevil: true"}, {}, ": see [`"),
        ({**OTHER, "license_name": "{{ 7 * 7 }}", "license_link": "javascript:1"}, OTHER, ": see [`"),
        ({**OTHER, "license_name": ["a"], "license_link": "../LICENSE"}, OTHER, ": see [`"),
    ],
    ids=str,
)
def test_licence_and_language_of_the_base(tiny, given, kept, said):
    for base_card in (ModelCardData(**given), ModelCard(f"---\n{json.dumps(given)}\n---\n# Base\n")):
        card = model_card(tiny["llava"], repo_id=REPOSITORY, base_card=base_card, base_name=BASE, base_revision=COMMIT)
        check_text(card)
        metadata = check_metadata(card)
        taken = {name: metadata[name] for name in ("license", "license_name", "license_link", "language") if name in metadata}
        assert taken == kept
        assert said in card.text.split("## Licence\n\n")[1].split("\n")[0]


def test_a_licence_file_is_linked_where_it_lies(tiny, tmp_path):
    folder = shutil.copytree(tiny["llava"], tmp_path / "made")

    def link(**base):
        base_card = ModelCardData(license="other", license_link="LICENSE")
        return check_metadata(model_card(folder, repo_id=REPOSITORY, base_card=base_card, **base)).get("license_link")

    assert link() is None
    assert link(base_name=BASE) == f"https://huggingface.co/{BASE}/blob/main/LICENSE"
    (folder / "LICENSE").write_text("Do as you like.")
    assert link(base_name=BASE) == "LICENSE"


def test_without_a_base_on_the_hub(tiny):
    card = model_card(tiny["llava_next"], repo_id=REPOSITORY)
    assert not {"base_model", "license", "language"} & set(check_metadata(card))
    assert "huggingface.co" not in check_text(card)
    assert "see the model that they are from" in card.text
    for name in ("../other", "a/b/c", "just-a-name", "o/{{ 7 * 7 }}", "o/é", 7):
        assert str(model_card(tiny["llava_next"], repo_id=REPOSITORY, base_name=name, base_revision=COMMIT)) == str(card)
    # A revision that is no commit's hash may mean something else tomorrow.
    assert "at commit" not in model_card(tiny["llava_next"], repo_id=REPOSITORY, base_name=BASE, base_revision="main").text


NAMES = {
    "plain/Name_1.0-x": "plain/Name_1.0-x",
    f"{PLACEHOLDER_OWNER}/a--b..c": f"{PLACEHOLDER_OWNER}/a-b-c",
    f"{PLACEHOLDER_OWNER}/.hidden.git": f"{PLACEHOLDER_OWNER}/hidden",
    "alone": f"{PLACEHOLDER_OWNER}/alone",
    "a/b/c": "a-b/c",
    "o/{{ 7 * 7 }}{% raw %}": "o/7-7-raw",
    'o/x"); import os; ("': "o/x-import-os",
    "o/`*_[x](y)\n---\n|<b>": "o/_-x-y-b",
    "o/模型\udcff": "o/checkpoint",
    "o/" + "long" * 70: "o/" + "long" * 24,
}


@pytest.mark.parametrize(("given", "shown"), NAMES.items(), ids=map(ascii, NAMES))
def test_names_of_any_kind(tiny, given, shown):
    card = model_card(tiny["llava_next"], repo_id=given, base_name=BASE)
    check_metadata(card)
    text = check_text(card)
    assert re.findall('^checkpoint = "(.*)"$', text, re.MULTILINE) == [shown, shown]
    assert text.replace(shown, "x/y") == str(model_card(tiny["llava_next"], repo_id="x/y", base_name=BASE))


def test_the_placeholder_makes_room_for_the_real_name(tiny, tmp_path):
    folder = variant(tiny["llava"], tmp_path / "made", {}, HUB_BASE)
    for name in ("made", "my.model_1"):
        card = str(model_card(folder, repo_id=f"{PLACEHOLDER_OWNER}/{name}"))
        assert card.count(PLACEHOLDER_OWNER) == 3
        assert with_repository(card, REPOSITORY) == str(model_card(folder, repo_id=REPOSITORY))
    others = f"not-{PLACEHOLDER_OWNER}/x a/{PLACEHOLDER_OWNER}/x {PLACEHOLDER_OWNER}s/x {PLACEHOLDER_OWNER} /x"
    assert with_repository(others, REPOSITORY) == others
    assert with_repository(f"({PLACEHOLDER_OWNER}/x.)", r"owner/\1") == r"(owner/\1.)"


def test_a_stock_checkpoint_has_none(tiny):
    with pytest.raises(ValueError, match="is a stock checkpoint; a card describes a pruned one"):
        model_card(tiny["llava"].parent / "stock_source", repo_id=REPOSITORY)


def test_nothing_of_the_folder_is_run_or_changed(tiny, tmp_path):
    folder = shutil.copytree(tiny["llava_next"], tmp_path / "made")
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    (folder / "README.md").write_text("{{ 7 * 7 }} of the folder's own")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert str(model_card(folder, repo_id=REPOSITORY)) == str(model_card(tiny["llava_next"], repo_id=REPOSITORY))
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_citations():
    entries = "\n".join(method.citation.strip() for method in METHODS.values() if method.citation)
    assert entries.count("{") == entries.count("}")
    found = {}
    for entry in re.split(r"\n(?=@\w+\{\w+,$)", entries, flags=re.MULTILINE):
        fields = dict(re.findall(r"^  (\w+) = \{(.*?)\},$", entry, re.MULTILINE | re.DOTALL))
        if "eprint" not in fields:  # older than arXiv's
            assert fields["doi"]
            continue
        assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
        assert fields["year"] == f"20{fields['eprint'][:2]}"
        found[fields["url"]] = re.sub(r"\W", "", fields["title"]), re.split(r"\s+and\s+", fields["author"])
    for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]:
        authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
        assert found[paper["url"]] == (re.sub(r"\W", "", paper["title"]), authors)


@pytest.mark.parametrize(("family", "method", "has_template"), [("llava_next", "hivtp", False), ("llava", "none", True)])
def test_its_code_runs_with_the_package(tiny, tmp_path, monkeypatch, capsys, family, method, has_template):
    folder = variant(tiny[family], tmp_path / "made", {"method": method})
    if not has_template:
        (folder / "chat_template.jinja").unlink()
    card = model_card(folder, repo_id=REPOSITORY)
    check_text(card)
    _, with_package, further = blocks(card)
    photo(60, 100).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile((with_package + further).replace(f'"{REPOSITORY}"', repr(str(folder))), "card", "exec"), {})
    assert capsys.readouterr().out.count("tokens: ") == (1 if method == "none" else 3)


def run_from_the_hub(code, photograph):
    """Runs in a process of its own, without the package: code beside a photograph; gives what it prints."""
    import contextlib
    import io
    import shutil
    import sys

    sys.modules["hivtp_hf"] = None
    shutil.copy(photograph, "photo.jpg")
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), names)
    return [printed.getvalue(), type(names["model"]).__module__, type(names["model"]).__name__]


@pytest.mark.parametrize(("family", "has_weights"), [("llava_next", True), ("llava", False)])
def test_its_code_runs_without_the_package_from_the_hub(tiny, tmp_path, family, has_weights):
    photo(60, 100).save(tmp_path / "photo.png")
    with HubServer() as hub:
        folder = tiny[family]
        if not has_weights:
            stock = folder.parent / "stock_source"
            base = hub.add_repository(BASE, {path.name: path.read_bytes() for path in stock.iterdir()})
            folder = variant(folder, tmp_path / "made", {}, {"name": BASE, "revision": base})
            (folder / "model.safetensors").unlink()
        card = str(model_card(folder, repo_id=REPOSITORY))
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        commit = hub.add_repository(REPOSITORY, files | {"README.md": card.encode()})
        # What comes later does not reach a reader who names the commit.
        hub.commit(REPOSITORY, {path.name: b"raise SystemExit('not what was read')" for path in folder.glob("*.py")})
        without_package, _, further = blocks(ModelCard(card))
        code = without_package.replace('"COMMIT"', repr(commit)) + further
        assert code.count(commit) == 1
        printed, module, name = run_client(hub, run_from_the_hub, code=code, photograph=str(tmp_path / "photo.png"))
        assert not hub.unanswered
        assert bool(hub.asked("GET", f"^/storage/objects/{BASE}/")) == (not has_weights)
    assert module.startswith("transformers_modules.")
    assert name == FAMILIES[family].model.__name__
    assert printed.count("tokens: ") == 3
