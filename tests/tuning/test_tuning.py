"""`hivtp tune` and `hivtp_hf.tune` on tiny models: against plain passes of the model itself, on every family."""

import inspect
import json

import pytest
import torch

import hivtp_hf
from checkpoints import GEOMETRY
from evaluations import ROWS, SIZES, data_folder, table_of
from examples.tiny_onevision_checkpoint import build_onevision_checkpoint
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import open_source
from hivtp_hf.cli import command_tune
from hivtp_hf.evaluation import Row
from hivtp_hf.tuning import calibration, tune_checkpoint
from hivtp_hf.tuning.objectives import OBJECTIVES
from nightly import mostly_nightly
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import photo
from tiny_onevision import SMALL
from tiny_qwen import save_stock_qwen_checkpoint

PHOTOS = {name: photo(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}
SAMPLES = [(PHOTOS[name], question) for name, question, _, _ in ROWS]
QUICK = {"method": "hivtp", "ratio": 0.25, "trials": 3, "show_progress": False, "batch_size": 3}


def build(family, folder):
    if family == "llava_onevision":
        return build_onevision_checkpoint(folder / "stock", **SMALL)
    if family.startswith("qwen"):
        (folder / "stock").mkdir()
        return save_stock_qwen_checkpoint(folder / "stock", family, sharp=True)
    return build_stock_checkpoint(folder / "stock", family=family, **GEOMETRY)


FAMILIES = ("llava_next", "llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock checkpoint of LLaVA-NeXT."""
    return build("llava_next", tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def parts(stock):
    source = open_source(str(stock))
    return source.load_model({"method": "none"}), source.load_processor({"method": "none"})


@torch.no_grad()
def plain_pass(model, processor, image, question, pruning, answer=()):
    """The normed states from the prompt's last token on, and the next token's logits, as a user gets them."""
    before = model.config.pruning_config, processor.pruning_config
    model.config.pruning_config = processor.pruning_config = pruning
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    inputs = processor(images=image, text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
    if len(answer):
        more = torch.tensor([list(answer)])
        inputs["input_ids"] = torch.cat((inputs["input_ids"], more), 1)
        inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(more)), 1)
    states = model.model(**inputs).last_hidden_state[0, -1 - len(answer) :]
    logits = model(**inputs).logits[0, -1]
    model.config.pruning_config, processor.pruning_config = before
    return states.double(), logits.double()


def plain_value(model, processor, objective, pruning):
    unpruned, values = {"method": "none"}, []
    for image, question in SAMPLES:
        answer = ()
        if objective == "answer":
            for _ in range(3):
                _, logits = plain_pass(model, processor, image, question, unpruned, answer)
                answer = (*answer, int(logits.argmax()))
                if answer[-1] == model.generation_config.eos_token_id:
                    break
            answer = answer[:-1]
        (stock_states, stock_logits), (states, logits) = (
            plain_pass(model, processor, image, question, settings, answer) for settings in (unpruned, pruning)
        )
        if objective == "next-token":
            wanted = stock_logits.softmax(0)
            values.append(-float((wanted * (wanted.log() - logits.softmax(0).log())).sum()))
        else:
            values.append(float(torch.cosine_similarity(stock_states, states).mean()))
    return sum(values) / len(values)


def settings_of(trial, start):
    return VisualTokenPruningConfig(**{**start.to_dict(), "importance_start_layer": None, **trial.settings})


def without_seconds(trials):
    return [trial._replace(seconds=0) for trial in trials]


@pytest.mark.parametrize(
    "family", mostly_nightly(FAMILIES, lambda family: family in ("llava_next", "llava_onevision", "qwen2_5_vl"))
)
def test_a_trial_is_a_plain_pass(family, tmp_path):
    """Every family, every objective: a trial's value is what processor and model give who are set by hand."""
    source = open_source(str(build(family, tmp_path)))
    model, processor = source.load_model({"method": "none"}), source.load_processor({"method": "none"})
    values = {}
    for objective in OBJECTIVES:
        found = hivtp_hf.tune(model, processor, SAMPLES, **QUICK, objective=objective, answer_tokens=3)
        measured = [trial for trial in found.trials if trial.value is not None]
        assert len(measured) == 3
        for trial in measured:
            settings = settings_of(trial, found.start)
            wanted = plain_value(model, processor, objective, settings.to_dict())
            assert trial.value == pytest.approx(wanted, abs=2e-5)
        values[objective] = [trial.value for trial in measured]
        assert len(set(values[objective])) > 1  # or equal settings would prove nothing
        assert found.value == max(values[objective])
    assert values["state"] != values["answer"]
    assert model.config.pruning_config == processor.pruning_config == VisualTokenPruningConfig("none")


@pytest.mark.parametrize("method", ["vflowopt", "cls_attention", "spread", "gprune"])
def test_methods_that_read_other_evidence(method, parts):
    model, processor = parts
    found = hivtp_hf.tune(model, processor, SAMPLES, **{**QUICK, "method": method})
    best = plain_value(model, processor, "state", found.settings.to_dict())
    assert found.value == pytest.approx(best, abs=2e-5)
    assert found.settings.method == method
    assert found.settings.retention_ratio == 0.25


def counted_looks(monkeypatch):
    seen, original = [], calibration.see

    def counted(model, inputs, prunings, layers=()):
        seen.append(list(layers))
        return original(model, inputs, prunings, layers)

    monkeypatch.setattr(calibration, "see", counted)
    return seen


@pytest.mark.once
def test_an_image_is_encoded_once_within_the_memory(parts, monkeypatch):
    looks = counted_looks(monkeypatch)
    kept = hivtp_hf.tune(*parts, SAMPLES, **QUICK)
    assert len(looks) == 2  # four images, three at a time
    assert (kept.images, kept.images_kept) == (4, 4)
    looks.clear()
    # Room for no part: each is encoded for the unpruned pass and for every trial.
    again = hivtp_hf.tune(*parts, SAMPLES, **QUICK, memory=1e-7)
    assert len(looks) == 2 * 4
    assert again.images_kept == 0
    assert looks[1:] == [[]] * 7  # after the first, only what is read
    assert without_seconds(again.trials) == without_seconds(kept.trials)


@pytest.mark.once
def test_stages_keep_the_average_over_layers(parts):
    found = hivtp_hf.tune(*parts, SAMPLES, **{**QUICK, "ratio": 0.3, "trials": 6}, stages=2, search=["regions"])
    measured = [trial for trial in found.trials if trial.value is not None]
    assert {len(trial.settings["stages"]) for trial in measured[1:]} == {2}
    # Each of three roundings a view is of half a token at most.
    assert max(trial.tokens_per_layer for trial in measured) - min(trial.tokens_per_layer for trial in measured) < 3
    assert any("ascend" in trial.reason for trial in found.trials if trial.reason)


@pytest.mark.once
def test_it_goes_on_where_it_was(parts, tmp_path, monkeypatch):
    options = {**QUICK, "trials": 13, "seed": 5}
    whole = hivtp_hf.tune(*parts, SAMPLES, **options)
    original, done = calibration.CalibrationPasses.measure, []

    def interrupted(self, settings, advance):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(settings)
        return original(self, settings, advance)

    monkeypatch.setattr(calibration.CalibrationPasses, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hivtp_hf.tune(*parts, SAMPLES, **options, journal=tmp_path / "journal")
    monkeypatch.setattr(calibration.CalibrationPasses, "measure", original)
    rest = hivtp_hf.tune(*parts, SAMPLES, **options, journal=tmp_path / "journal")
    assert without_seconds(rest.trials) == without_seconds(whole.trials)
    assert rest.settings == whole.settings
    finished = hivtp_hf.tune(*parts, SAMPLES, **options, journal=tmp_path / "journal")
    assert without_seconds(finished.trials) == without_seconds(whole.trials)
    assert finished.images_kept is None
    with pytest.raises(ValueError, match="keeps trials of another search"):
        hivtp_hf.tune(*parts, SAMPLES, **{**options, "seed": 6}, journal=tmp_path / "journal")


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1}, "above 0 and below 1"),
        ({"ratio": 0}, "`retention_ratio` is 0.0"),
        ({"trials": 1}, "`trials` is 1"),
        ({"memory": -1}, "`memory` is -1"),
        ({"objective": "accuracy"}, "must be one of 'state', 'answer', 'next-token'"),
        ({"method": "uniform"}, "nothing to tune"),
        ({"method": "none"}, "keeps every token"),
        ({"method": "hivtp", "settings": {"method": "hiprune"}}, "Give those of one"),
        ({"settings": {"exact_count": False}, "method": "hivtp"}, "`exact_count` is False"),
        ({"samples": [("a.png", "What?")]}, r"sample 1 is \('a.png', 'What\?'\)"),
        ({"samples": []}, "samples has 0 rows"),
        ({"samples": [(PHOTOS["wide.png"], " ")]}, "the question is empty"),
    ],
)
def test_what_cannot_be_tuned(parts, changes, message):
    arguments = {**QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        hivtp_hf.tune(*parts, arguments.pop("samples", SAMPLES), **arguments)


@pytest.mark.once
def test_an_error_names_the_row(parts, monkeypatch):
    def broken(*arguments):
        raise ValueError("it is broken")

    monkeypatch.setattr(calibration, "prefill", broken)
    rows = [Row(image, "a.png", question, "") for image, question in SAMPLES[:1]]
    with pytest.raises(RuntimeError, match=r"row 1 \(image 'a.png', .*\) cannot be passed .* ValueError: it is broken"):
        hivtp_hf.tune(*parts, rows, **QUICK)


@pytest.mark.once
def test_a_missing_optuna_is_named(hivtp, stock, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    ended = hivtp("tune", "--checkpoint", stock, "--data", data_folder(tmp_path / "data"), "--ratio", "1/4")
    assert ended.returncode == 1
    assert 'pip install "hivtp-hf[tune]"' in ended.stderr


def arguments_of(stock, folder, *more):
    return (
        "--checkpoint",
        stock,
        "--data",
        folder / "data",
        "--ratio",
        "1/4",
        "--runs",
        folder / "runs",
        "--device",
        "cpu",
        *more,
    )


@pytest.mark.once
def test_the_command_makes_a_folder_and_a_checkpoint(hivtp, stock, tmp_path):
    # No answers, which are not needed.
    data_folder(tmp_path / "data", [row[:2] for row in ROWS], ("image", "question"))
    more = ("--trials", 12, "--output", tmp_path / "tuned", "--set", "hivtp.regions=3")
    ended = hivtp("tune", *arguments_of(stock, tmp_path, *more))
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    names = ["config.json", "environment.json", "study.log", "tuning.csv", "tuning.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert str(tmp_path / "tuned") in ended.stdout
    assert "importance_layers.first" in ended.stdout
    trials = table_of(folder / "tuning.csv")
    measured = [row for row in trials if row["objective"]]
    assert len(measured) == 12
    assert {row["tokens_per_layer"] for row in measured} == {measured[0]["tokens_per_layer"]}
    assert all(row["rejected_because"] for row in trials if not row["objective"])
    best = max(measured, key=lambda row: float(row["objective"]))
    settings = json.loads((tmp_path / "tuned" / "config.json").read_text())["pruning_config"]
    assert "+".join(map(str, settings["importance_layers"])) == best["importance_layers"]
    assert (settings["regions"], settings["retention_ratio"]) == (3, 0.25)
    card = " ".join((tmp_path / "tuned" / "README.md").read_text().split())
    assert "found `importance_layers` on" in card
    assert "12 trials (seed 0) on 4 questions about 3 images of the data `data`" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["questions"] == 4
    assert str(tmp_path) not in (folder / "config.json").read_text()
    # It loads as any converted checkpoint does.
    assert open_source(str(tmp_path / "tuned")).settings().importance_layers == tuple(settings["importance_layers"])

    again = hivtp("tune", *arguments_of(stock, tmp_path, *more))
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.once
def test_the_defaults_of_the_command_are_the_librarys():
    library = {**tune_checkpoint.__kwdefaults__, "changes": None}
    command = {name: parameter.default for name, parameter in inspect.signature(command_tune.tune).parameters.items()}
    assert {name: value for name, value in command.items() if value is not inspect.Parameter.empty} == {
        name: value for name, value in library.items() if name not in ("token", "say")
    }


@pytest.mark.once
def test_an_interrupted_run_goes_on_in_its_folder(stock, tmp_path, monkeypatch):
    data_folder(tmp_path / "data")
    options = {"runs": tmp_path / "runs", "trials": 4, "device": "cpu", "say": lambda text: None, "method": "hivtp"}
    original, done = calibration.CalibrationPasses.measure, []

    def interrupted(self, settings, advance):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(settings)
        return original(self, settings, advance)

    monkeypatch.setattr(calibration.CalibrationPasses, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(str(stock), tmp_path / "data", "1/4", **options)
    monkeypatch.setattr(calibration.CalibrationPasses, "measure", original)
    said = []
    run = tune_checkpoint(str(stock), tmp_path / "data", "1/4", **{**options, "say": said.append})
    assert "Going on in" in said[0]
    assert list((tmp_path / "runs").iterdir()) == [run.folder]
    fresh = tune_checkpoint(str(stock), tmp_path / "data", "1/4", **{**options, "runs": tmp_path / "others"})
    assert without_seconds(fresh.tuning.trials) == without_seconds(run.tuning.trials)
    # Finished, it makes another folder.
    more = tune_checkpoint(str(stock), tmp_path / "data", "1/4", **options)
    assert more.folder != run.folder


@pytest.mark.once
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratio", "2"), "is no ratio"),
        (("--method", "best"), "must be one of 'hivtp'"),
        (("--search", "region"), "can be searched are regions, importance_layers"),
        (("--dtype", "int8"), "`--dtype` is 'int8'"),
        (("--questions", "9"), "has 4 rows; `--questions` asks for 9"),
        (("--set", "hiprune.alpha=1"), "is no method with settings"),
        (("--stages", "9"), "`--stages` is 9"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(hivtp, stock, tmp_path, more, message):
    data_folder(tmp_path / "data")
    ended = hivtp("tune", *arguments_of(stock, tmp_path), *more)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert not (tmp_path / "runs").exists()
