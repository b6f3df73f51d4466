"""`hivtp evaluate`, as a user runs it."""

import pytest
import typer
from typer.testing import CliRunner

from checkpoints import GEOMETRY
from evaluations import ROWS, data_folder, table_of
from hivtp_hf.cli.command_evaluate import evaluate
from hivtp_hf.evaluation import run as run_module
from hivtp_hf.evaluation.variants import DEFAULT_RATIOS
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("next") / "stock", **GEOMETRY)


def arguments_of(stock, folder, *more):
    return [str(part) for part in ("--checkpoint", stock, "--data", folder / "data", "--output", folder / "runs", *more)]


def test_it_prints_a_table_and_the_folder(stock, tmp_path):
    data_folder(tmp_path / "data")
    arguments = arguments_of(stock, tmp_path, "--methods", "hivtp,base-only", "--ratios", "1,1/2", "--questions", "3")
    arguments += ["--device", "cpu", "--dtype", "bfloat16", "--batch-size", "2", "--max-new-tokens", "2"]
    arguments += ["--set", "hivtp.regions=1", "--set", "hivtp.local_window=1"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines()[-1] == str(folder)
    shown = [line.split() for line in done.stdout.splitlines() if line.strip().startswith(("none", "hivtp", "base-only"))]
    metrics = [row for row in table_of(folder / "metrics.csv") if row["question_type"] == "all"]
    assert [line[0] for line in shown] == ["none", "hivtp", "base-only"]
    for line, row in zip(shown, metrics, strict=True):
        tokens = f"{float(row['patch_tokens']):.0f} + {float(row['newline_tokens']):.0f}"
        interval = f"{float(row['ci_low']):.3f}-{float(row['ci_high']):.3f}"
        cells = [f"{float(row['ratio']):.3f}", tokens, f"{float(row['accuracy']):.3f}", interval]
        assert " ".join(line[1:]).startswith(" ".join(cells))
    assert "…" not in done.stdout
    assert "3 questions" in done.stdout


def test_its_table_names_weights_and_positions_and_smaller_images(stock, tmp_path):
    data_folder(tmp_path / "data")
    arguments = arguments_of(stock, tmp_path, "--methods", "uniform,downsample+uniform", "--ratios", "1/2")
    arguments += ["--questions", "2", "--device", "cpu", "--max-new-tokens", "2", "--weights-and-positions", "published,both"]
    lines = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout.splitlines()
    names = [line.split()[0] if line.strip()[:1] != "+" else line.strip() for line in lines if line.strip()]
    start = names.index("uniform")
    assert names[start : start + 8] == [
        *("uniform", "uniform", "+ both"),
        *("downsample", "+ uniform", "downsample", "+ uniform", "+ both"),
    ]
    assert "…" not in "".join(lines)


def test_its_defaults_are_the_librarys(stock, tmp_path, monkeypatch):
    given = {}

    def stand_in(checkpoint, data, **options):
        given.update(options, checkpoint=checkpoint, data=data)
        raise ValueError("enough")

    monkeypatch.setattr("hivtp_hf.evaluation.evaluate_checkpoint", stand_in)
    with pytest.raises(ValueError, match="enough"):
        CliRunner().invoke(app, ["--checkpoint", "owner/name"], catch_exceptions=False)
    del given["say"], given["checkpoint"]
    library = run_module.evaluate_checkpoint.__kwdefaults__
    assert given.pop("data") is None
    assert given == {name: library[name] for name in given}
    assert given["ratios"] == DEFAULT_RATIOS


def test_errors_are_one_message(hivtp, stock, tmp_path):
    data_folder(tmp_path / "data", [*ROWS, ("wide.png", "What?", "", "colour")])
    status, out, err = hivtp("evaluate", *arguments_of(stock, tmp_path))
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("hivtp: row 5: the answer is ''")
    assert "Traceback" not in err
