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
from transformers.pipelines import SUPPORTED_TASKS

from checkpoints import GEOMETRY, build_pruned_checkpoint
from families import FAMILIES
from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.cards import PLACEHOLDER_OWNER, model_card, with_repository
from hivtp_hf.cards.card_files import citations_of
from hivtp_hf.methods import METHODS
from hub_server import HubServer, run_client
from nightly import mostly_nightly
from tested_methods import TESTED
from tiny_models import photo

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
BASE, COMMIT = "llava-hf/some-base", "0123456789abcdef" * 2 + "01234567"
REPOSITORY = "owner/pruned"
LOCAL_BASE = {"name": "/somewhere/else", "revision": None}
HUB_BASE = {"name": BASE, "revision": COMMIT}

# What the Hub's documentation allows (huggingface/hub-docs, August 2026): docs/hub/model-cards.md and repositories-licenses.md.
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LICENCES = {
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0"),
    *("bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"),
    *("c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0"),
    *("cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0"),
    *("gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research"),
    *("lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openmdw-1.1"),
    *("openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr"),
    *("deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3"),
    *("llama4", "grok2-community", "gemma", "unknown", "other"),
}


@pytest.fixture(autouse=True)
def no_name_of_the_template_is_left_undefined(monkeypatch):
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """By family: checkpoints with weights, small tiles."""
    return {name: build_pruned_checkpoint(tmp_path_factory.mktemp(name), {}, name, **GEOMETRY) for name in FAMILIES}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """By family: checkpoints with the geometry of the real ones, without weights."""
    real = {"tile_size": 336, "patch_size": 14}
    folders = {name: build_pruned_checkpoint(tmp_path_factory.mktemp(name), {}, name, **real) for name in FAMILIES}
    for folder in folders.values():
        (folder / "model.safetensors").unlink()
    return folders


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


def settings_of(method, **more):
    budget = {} if METHODS[method].keeps_everything else {"retention_ratio": 2 / 9}
    return {"method": method, **budget, **TESTED[method].small, **more}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_metadata(card):
    """What the Hub refuses, or would not find anything by."""
    metadata = yaml.safe_load(card.data.to_yaml())
    assert metadata == yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["pipeline_tag"] in SUPPORTED_TASKS
    assert ("base_model" in metadata) == ("base_model_relation" in metadata)
    assert metadata.get("base_model_relation", "finetune") in RELATIONS
    assert len(set(metadata["tags"])) == len(metadata["tags"])
    assert all(re.fullmatch("[a-z0-9_-]+", tag) for tag in metadata["tags"])
    licences = metadata.get("license", [])
    assert set([licences] if isinstance(licences, str) else licences) <= LICENCES
    assert not set(metadata) & {"license_name", "license_link"} or "license" in metadata
    return metadata


def check_text(card):
    """What every card keeps to, whatever it was made of."""
    text = str(card)
    again = ModelCard(text)
    assert str(again) == text
    assert again.data.to_dict() == card.data.to_dict()
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n" not in text
    assert not re.search(r"\{\{|\{%|%\}|\{#|Undefined|Hyperparameter\(", text.replace(citations(card), ""))
    assert text.count("```") == 2 * len(re.findall(r"^```\w+$", text, re.MULTILINE))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for block in blocks(card):
        compile(block, "card", "exec")
    return text


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def citations(card):
    found = re.findall(r"```bibtex\n(.*?)```", card.text, re.DOTALL)
    assert len(found) <= 1
    return found[0] if found else ""


def table(card, heading):
    section = card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("base_model", [None, HUB_BASE, LOCAL_BASE], ids=["complete", "base_on_the_hub", "base_in_a_folder"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_family(tiny, tmp_path, method, family, base_model):
    pruning = VisualTokenPruningConfig(**settings_of(method))
    folder = variant(tiny[family], tmp_path / "made", pruning, base_model)
    given = {} if base_model else {"base_name": BASE, "base_revision": COMMIT}
    card = model_card(folder, repo_id=REPOSITORY, base_card=ModelCardData(license="apache-2.0"), **given)
    on_the_hub = base_model != LOCAL_BASE

    metadata, text = check_metadata(card), check_text(card)
    assert metadata.get("base_model") == (BASE if on_the_hub else None)
    assert metadata["license"] == "apache-2.0"
    assert {"visual-token-pruning", "token-pruning", "training-free", family} <= set(metadata["tags"])
    assert (method in metadata["tags"]) == (method != "none")

    assert ("no weights in this repository" in text) == (base_model is not None)
    assert (f"hivtp convert {REPOSITORY} FOLDER" in text) == (base_model is not None)
    assert (COMMIT in text) == (f"https://huggingface.co/{BASE}" in text) == on_the_hub
    assert LOCAL_BASE["name"] not in text
    assert FAMILIES[family].model.__name__ in text
    assert "has not been measured" in text

    shown = {row[0].strip("`"): row[1:] for row in table(card, "Settings")}
    assert {name: value.strip("`") for name, (value, _) in shown.items()} == {
        name: str(value) for name, value in pruning.to_dict().items()
    }
    for setting in METHODS[method].hyperparameters:
        assert shown[setting.name][1] == setting.meaning
    assert all(meaning for _, meaning in shown.values())
    assert ("rules over" in text) == (method == "hivtp")


@pytest.mark.parametrize(
    "pruning",
    [
        {"method": method, **changes}
        for method in METHODS
        for changes in ({}, {"retention_ratio": 1 / 9}, {"token_budget": 300}, {"keep_newlines": False})
        if method != "none" or "keep_newlines" in changes or not changes
    ]
    + [{"exact_count": False}],
    ids=str,
)
def test_counts_are_those_of_the_layout(full, tmp_path, pruning):
    settings = VisualTokenPruningConfig(**pruning)
    card = model_card(variant(full["llava_next"], tmp_path / "next", pruning), repo_id=REPOSITORY)
    rows = table(card, "Tokens per image")
    assert [row[0] for row in rows] == ["672 x 672", "480 x 640", "300 x 451", "1000 x 300", "100 x 1000"]
    for size, *counts in rows:
        layout = TokenLayout.from_image_size(*map(int, size.split(" x ")), settings)
        assert counts == [str(count) for count in (layout.num_stock, layout.num_retained, layout.num_newlines)]
    assert ("fewer may be kept" in card.text) == (not settings.exact_count)
    assert ("Serving engines need" in card.text) == (not settings.exact_count)

    card = model_card(variant(full["llava"], tmp_path / "llava", pruning), repo_id=REPOSITORY)
    single = TokenLayout.single_tile(24, settings)
    assert table(card, "Tokens per image") == [["any", "576", str(single.num_retained), "0"]]


def test_what_prunes_nothing_says_so(tiny, tmp_path):
    for number, (pruning, prunes) in enumerate(
        [({}, True), ({"retention_ratio": 0.99}, True), ({"retention_ratio": 1.0}, False), ({"method": "none"}, False)]
    ):
        text = model_card(variant(tiny["llava"], tmp_path / str(number), pruning), repo_id=REPOSITORY).text
        assert ("a part of each image's visual" in text) == prunes
        assert ("keeps\nevery patch token" in text) == (not prunes)


def taken(folder, **arguments):
    """Of a card on such a base: what the metadata take over, and the text about the licence."""
    card = model_card(folder, repo_id=REPOSITORY, **arguments)
    check_text(card)
    metadata = check_metadata(card)
    kept = {name: metadata[name] for name in ("license", "license_name", "license_link", "language") if name in metadata}
    return kept, card.text.split("## Licence\n\n")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"license": "llama2", "language": ["en", "de", "en"]}, {"license": "llama2", "language": ["en", "de"]}, ": `llama2`."),
        ({"license": "mit", "language": "no"}, {"license": "mit", "language": "no"}, ": `mit`."),
        (
            {"license": ["mit", "apache-2.0"], "language": ["en"]},
            {"license": ["mit", "apache-2.0"], "language": "en"},
            "`mit`, `a",
        ),
        ({"license": ["openrail++"]}, {"license": "openrail++"}, ": `openrail++`."),
        (
            {"license": "other", "license_name": "my-licence-1.0", "license_link": "https://example.org/a_(b)"},
            {"license": "other", "license_name": "my-licence-1.0"},
            ": `my-licence-1.0`.",
        ),
        (
            {"license": "other", "license_name": "my-licence-1.0", "license_link": "https://example.org/LICENCE?v=1"},
            {"license": "other", "license_name": "my-licence-1.0", "license_link": "https://example.org/LICENCE?v=1"},
            ": [`my-licence-1.0`](https://example.org/LICENCE?v=1).",
        ),
        (
            {"license": "other", "license_link": "LICENSE"},
            {"license": "other", "license_link": f"https://huggingface.co/{BASE}/blob/{COMMIT}/LICENSE"},
            f": [see there](https://huggingface.co/{BASE}/blob/{COMMIT}/LICENSE).",
        ),
        ({"license": "unknown"}, {"license": "unknown"}, ": see [`"),
        # What is broken is left out, and what is right beside it is not.
        ({}, {}, ": see [`"),
        ({"license": "Apache 2.0", "license_name": "a", "language": "en"}, {"language": "en"}, ": see [`"),
        ({"license": ["mit", "{{ evil }}"]}, {}, ": see [`"),
        ({"license": {"mit": True}, "language": {"en": 1}}, {}, ": see [`"),
        ({"license": [["mit"]], "language": [False, None, 7, "en\n", "fr"]}, {"language": "fr"}, ": see [`"),
        ({"license": "mit\n---\nevil: true"}, {}, ": see [`"),
        ({"license": "other", "license_name": "{{ 7 * 7 }}", "license_link": "javascript:1"}, {"license": "other"}, ": see [`"),
        ({"license": "other", "license_name": ["a"], "license_link": "../LICENSE"}, {"license": "other"}, ": see [`"),
        ({"license_name": "alone", "license_link": "https://example.org"}, {}, ": see [`"),
        ({"license": 3, "language": "english", "base_model": "other/base", "tags": "x"}, {}, ": see [`"),
    ],
    ids=str,
)
def test_licence_and_language_of_the_base(tiny, given, kept, said):
    base = {"base_name": BASE, "base_revision": COMMIT}
    for base_card in (ModelCardData(**given), ModelCard(f"---\n{json.dumps(given)}\n---\n# Base\n")):
        metadata, text = taken(tiny["llava"], base_card=base_card, **base)
        assert metadata == kept
        assert said in text


def test_a_licence_file_is_linked_where_it_lies(tiny, tmp_path):
    folder = shutil.copytree(tiny["llava"], tmp_path / "made")
    base_card = ModelCardData(license="other", license_name="own", license_link="LICENSE")
    assert taken(folder, base_card=base_card)[0] == {"license": "other", "license_name": "own"}
    on_main = f"https://huggingface.co/{BASE}/blob/main/LICENSE"
    assert taken(folder, base_card=base_card, base_name=BASE)[0]["license_link"] == on_main
    (folder / "LICENSE").write_text("Do as you like.")
    assert taken(folder, base_card=base_card, base_name=BASE)[0]["license_link"] == "LICENSE"


def test_without_a_base_on_the_hub(tiny):
    card = model_card(tiny["llava_next"], repo_id=REPOSITORY)
    assert not {"base_model", "base_model_relation", "license", "language"} & set(check_metadata(card))
    assert "huggingface.co" not in check_text(card)
    assert "see the model that they are from" in card.text
    for name in (
        "../other",
        "/somewhere/base",
        "a/b/c",
        "just-a-name",
        "o/{{ 7 * 7 }}",
        "o/x](y) `",
        "o/é",
        "o/" + "x" * 97,
        7,
    ):
        assert str(model_card(tiny["llava_next"], repo_id=REPOSITORY, base_name=name, base_revision=COMMIT)) == str(card)
    # A revision that is no commit's hash may mean something else tomorrow.
    assert "at commit" not in model_card(tiny["llava_next"], repo_id=REPOSITORY, base_name=BASE, base_revision="main").text


def test_the_base_that_config_json_names_goes_first(tiny, tmp_path):
    for number, base in enumerate((HUB_BASE, LOCAL_BASE)):
        folder = variant(tiny["llava"], tmp_path / str(number), {}, base)
        card = model_card(folder, repo_id=REPOSITORY, base_name="other/base", base_revision="f" * 40)
        assert check_metadata(card).get("base_model") == (BASE if base is HUB_BASE else None)
        assert "other/base" not in card.text


NAMES = {
    "plain/Name_1.0-x": "plain/Name_1.0-x",
    f"{PLACEHOLDER_OWNER}/my model": f"{PLACEHOLDER_OWNER}/my-model",
    f"{PLACEHOLDER_OWNER}/a--b..c": f"{PLACEHOLDER_OWNER}/a-b-c",
    f"{PLACEHOLDER_OWNER}/.hidden.git": f"{PLACEHOLDER_OWNER}/hidden",
    f"{PLACEHOLDER_OWNER}/": f"{PLACEHOLDER_OWNER}/checkpoint",
    "alone": f"{PLACEHOLDER_OWNER}/alone",
    "a/b/c": "a-b/c",
    "o/{{ 7 * 7 }}{% raw %}": "o/7-7-raw",
    'o/x"); import os; ("': "o/x-import-os",
    "o/`*_[x](y)\n---\n|<b>": "o/_-x-y-b",
    "o/: &a !!x #": "o/a-x",
    "o/模型\udcff": "o/checkpoint",
    "o/" + "long" * 70: "o/" + "long" * 24,
}


@pytest.mark.parametrize(("given", "shown"), NAMES.items(), ids=map(ascii, NAMES))
def test_names_of_any_kind(tiny, given, shown):
    card = model_card(tiny["llava_next"], repo_id=given, base_name=BASE)
    check_metadata(card)
    text = check_text(card)
    assert re.findall('^checkpoint = "(.*)"$', text, re.MULTILINE) == [shown, shown]
    expected = str(model_card(tiny["llava_next"], repo_id="x/y", base_name=BASE))
    assert text.replace(shown, "x/y") == expected
    # The client's rules are the Hub's: nothing is left to change.
    assert str(model_card(tiny["llava_next"], repo_id=shown, base_name=BASE)) == text


def test_the_placeholder_makes_room_for_the_real_name(tiny, tmp_path):
    folder = variant(tiny["llava"], tmp_path / "made", {}, HUB_BASE)
    for name in ("made", "my.model_1", "x-y.z"):
        card = str(model_card(folder, repo_id=f"{PLACEHOLDER_OWNER}/{name}"))
        assert card.count(PLACEHOLDER_OWNER) == 3
        assert with_repository(card, REPOSITORY) == str(model_card(folder, repo_id=REPOSITORY))
        assert with_repository(card, r"owner/\1") == str(model_card(folder, repo_id=REPOSITORY)).replace(
            REPOSITORY, r"owner/\1"
        )
    others = f"not-{PLACEHOLDER_OWNER}/x a/{PLACEHOLDER_OWNER}/x {PLACEHOLDER_OWNER}s/x {PLACEHOLDER_OWNER} /x"
    assert with_repository(others, REPOSITORY) == others
    assert with_repository(f"({PLACEHOLDER_OWNER}/x.)", REPOSITORY) == f"({REPOSITORY}.)"


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
    card = model_card(folder, repo_id=REPOSITORY)
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert str(card) == str(model_card(tiny["llava_next"], repo_id=REPOSITORY))


@pytest.mark.parametrize("method", METHODS)
def test_papers_are_cited_where_there_are_any(tiny, tmp_path, method):
    card = model_card(variant(tiny["llava"], tmp_path / "made", settings_of(method)), repo_id=REPOSITORY)
    # A method says in its rule where it is from: papers by their numbers, or that it is a baseline.
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", METHODS[method].rule)
    is_baseline = METHODS[method].keeps_everything or METHODS[method].rule.startswith("a baseline")
    assert bool(papers) != is_baseline
    assert re.findall(r"eprint = \{(.*)\}", citations(card)) == papers
    assert ("## Citation" in card.text) == bool(papers)
    assert citations(card).strip() == citations_of(method)
    for paper in papers:
        assert f"https://arxiv.org/abs/{paper}" in card.text.split("## Settings")[0]


def test_citation_files():
    files = sorted((ROOT / "src/hivtp_hf/cards/templates/citations").iterdir())
    assert {path.stem for path in files} <= set(METHODS)
    known = {
        re.sub(r"\W", "", paper["title"]): paper for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    }
    keys, agreed = [], 0
    for path in files:
        for entry in re.split(r"\n(?=@)", path.read_text(encoding="utf-8")):
            keys += re.findall(r"^@misc\{(\w+),$", entry, re.MULTILINE)
            assert entry.count("{") == entry.count("}")
            fields = dict(re.findall(r"^  (\w+) = \{(.*?)\},$", entry, re.MULTILINE | re.DOTALL))
            assert {"title", "author", "year", "eprint", "archivePrefix", "url"} <= set(fields)
            assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
            assert fields["year"] == f"20{fields['eprint'][:2]}"
            paper = known.get(re.sub(r"\W", "", fields["title"]))
            if paper is not None:
                authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
                assert re.split(r"\s+and\s+", fields["author"]) == authors
                assert fields["url"] == paper["url"]
                agreed += 1
    assert agreed == len(known)
    assert len(set(keys)) == len(keys) >= len(files)


def in_folder(code, folder, monkeypatch, capsys):
    """What a card's code prints, run beside a photograph."""
    photo(60, 100).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    exec(compile(code, "card", "exec"), {})
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_its_code_runs_with_the_package(tiny, tmp_path, monkeypatch, capsys, method, family):
    folder = variant(tiny[family], tmp_path / "made", settings_of(method))
    _, with_package, further = blocks(model_card(folder, repo_id=REPOSITORY))
    code = (with_package + further).replace(f'"{REPOSITORY}"', repr(str(folder)))
    printed = in_folder(code, tmp_path, monkeypatch, capsys)
    assert sum("tokens: " in line for line in printed) == (1 if method == "none" else 3)


def test_its_code_runs_without_a_chat_template(tiny, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny["llava_next"], tmp_path / "made")
    (folder / "chat_template.jinja").unlink()
    card = model_card(folder, repo_id=REPOSITORY)
    check_text(card)
    _, with_package, further = blocks(card)
    code = (with_package + further).replace(f'"{REPOSITORY}"', repr(str(folder)))
    assert in_folder(code, tmp_path, monkeypatch, capsys)


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


@pytest.mark.parametrize(
    ("family", "has_weights"),
    mostly_nightly(
        [("llava_next", True), ("llava", True), ("llava", False)],
        lambda family, has_weights: (family, has_weights) != ("llava", True),
    ),
)
def test_its_code_runs_without_the_package_from_the_hub(tiny, tmp_path, family, has_weights):
    photo(60, 100).save(tmp_path / "photo.png")
    with HubServer() as hub:
        folder = tiny[family]
        if not has_weights:
            base = hub.add_repository(BASE, contents(folder.parent / "stock_source"))
            folder = variant(folder, tmp_path / "made", {}, {"name": BASE, "revision": base})
            (folder / "model.safetensors").unlink()
        card = model_card(folder, repo_id=REPOSITORY)
        commit = hub.add_repository(REPOSITORY, contents(folder) | {"README.md": str(card).encode()})
        # What comes later does not reach a reader who names the commit.
        hub.commit(REPOSITORY, {path.name: b"raise SystemExit('not what was read')" for path in folder.glob("*.py")})
        without_package, _, further = blocks(card)
        code = without_package.replace('"COMMIT"', repr(commit)) + further
        assert code.count(commit) == 1
        printed, module, name = run_client(hub, run_from_the_hub, code=code, photograph=str(tmp_path / "photo.png"))
        assert not hub.unanswered
        assert bool(hub.asked("GET", f"^/storage/objects/{BASE}/")) == (not has_weights)
    assert module.startswith("transformers_modules.")
    assert name == FAMILIES[family].model.__name__
    assert printed.count("tokens: ") == 3


def validated(cards):
    """Runs in a process of its own: what the Hub says of every card, or None."""
    from huggingface_hub import ModelCard, constants, repocard

    # Older clients ask the Hub itself, whatever the environment says.
    session = repocard.get_session()
    post = session.post
    session.post = lambda address, **given: post(address.replace("https://huggingface.co", constants.ENDPOINT), **given)
    answers = []
    for card in cards:
        try:
            ModelCard(card).validate()
            answers.append(None)
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_the_hub_takes_them(tiny, tmp_path):
    cards = []
    for number, (family, base_model) in enumerate((name, base) for name in FAMILIES for base in (None, HUB_BASE, LOCAL_BASE)):
        folder = variant(tiny[family], tmp_path / str(number), settings_of("hiprune"), base_model)
        base_card = ModelCardData(license="other", license_name="my-licence", license_link="LICENSE", language=["en", "no"])
        cards.append(str(model_card(folder, repo_id="o/: &a {{ x }}", base_name=BASE, base_card=base_card)))
    with HubServer() as hub:
        answers = run_client(hub, validated, cards=cards)
        assert len(hub.asked("POST", "/api/validate-yaml")) == len(cards)
        assert all(request.json["repoType"] == "model" for request in hub.asked("POST", "/api/validate-yaml"))
        assert not hub.unanswered
    assert answers == [None] * len(cards)
