"""What `hivtp evaluate` takes for data, and how it says what is wrong with it."""

import gc
import io
import json
import sys

import datasets
import pytest
from PIL import Image

from evaluations import HEADINGS, ROWS, SIZES, data_folder
from hivtp_hf.evaluation.data import load_data
from hub_commands import finished
from hub_server import HubServer, program
from tiny_models import photo

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    return data_folder(tmp_path / "pictures of cats")


def write_lines(folder, records):
    (folder / "questions.csv").unlink()
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")


def test_a_table_and_lines_of_json_are_the_same(folder):
    table = load_data(folder, None)
    write_lines(folder, [dict(zip(HEADINGS, row, strict=True)) for row in ROWS])
    lines = load_data(folder, None)
    assert [row[1:] for row in table.rows] == [row[1:] for row in lines.rows] == list(ROWS)
    assert table.sha256 == lines.sha256
    assert table.image_sizes == lines.image_sizes == SIZES
    assert table.name == "pictures of cats"
    assert table.question_types == ["colour", "count"]
    assert table.rows[0].open_image().size == (100, 60)


def test_other_rows_or_pixels_are_other_data(folder):
    sums = {load_data(folder, None).sha256, load_data(folder, 3).sha256}
    photo(60, 60, seed=9).save(folder / "square.png")
    sums.add(load_data(folder, None).sha256)
    assert len(sums) == 3
    assert [row[1:] for row in load_data(folder, 2).rows] == list(ROWS[:2])


def test_types_may_be_missing_or_called_type(tmp_path):
    untyped = data_folder(tmp_path / "untyped", [row[:3] for row in ROWS], HEADINGS[:3])
    assert load_data(untyped, None).question_types == []
    typed = data_folder(tmp_path / "typed", ROWS, (*HEADINGS[:3], "type"))
    assert load_data(typed, None).question_types == ["colour", "count"]


def test_images_are_turned_as_their_metadata_say(tmp_path):
    folder = data_folder(tmp_path / "data", [("turned.jpg", "What?", "cat")], HEADINGS[:3])
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(40, 90).save(folder / "turned.jpg", exif=turned)
    data = load_data(folder, None)
    assert data.image_sizes == {"turned.jpg": (90, 40)}
    assert data.rows[0].open_image().size == (40, 90)


GOOD = ("wide.png", "What?", "cat", "animal")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("gone.png", *GOOD[1:]), "row 2: the image 'gone.png' cannot be read"),
        (("cut.png", *GOOD[1:]), "row 2: the image 'cut.png' cannot be read"),
        (("../secret.png", *GOOD[1:]), "row 2: the image is '../secret.png'; it must be a path inside"),
        (("/etc/secret.png", *GOOD[1:]), "row 2: the image is '/etc/secret.png'; it must be a path inside"),
        (("wide.png", " ", "cat", "animal"), "row 2: the question is empty"),
        (("wide.png", "What?", "?!", "animal"), "row 2: the answer is '\\?!'"),
        (("wide.png", "What?", "cat", ""), "row 2: 'question_type' is empty"),
        (("wide.png", "What?", "cat", "all"), "row 2: the type 'all'"),
        (("wide.png", "What?", "cat"), "row 2: the first row has a type and this one none"),
        (("wide.png", "What?"), "row 2: 'answer' is None"),
        ((*GOOD, "more"), "row 2 of .*more fields than there are headings.*double quotes"),
        (("wide.png", "O\udcf9?", "cat", "animal"), "cannot be read.*Write it in UTF-8"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    folder = data_folder(tmp_path / "data", [GOOD, row])
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:-400])
    with pytest.raises(ValueError, match=message):
        load_data(folder, None)


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_row_that_is_not_asked_for_does_no_harm(tmp_path):
    """And the table is closed all the same."""
    assert len(load_data(data_folder(tmp_path / "data", [GOOD, ("gone.png", *GOOD[1:])]), 1).rows) == 1
    gc.collect()


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    answers = ("01", "none", "NA", "2020-01-01")
    folder = data_folder(tmp_path / "data", [("wide.png", "What?", answer, "count") for answer in answers])
    assert tuple(row.answer for row in load_data(folder, None).rows) == answers
    write_lines(folder, [{"image": "wide.png", "question": "What?", "answer": answer} for answer in answers])
    assert tuple(row.answer for row in load_data(folder, None).rows) == answers


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2 of .* cannot be read"),
        ("[1]", "row 2 of .* is no JSON object"),
        ('{"image": "wide.png", "question": "What?"}', "row 2: there is no column 'answer'"),
        ('{"image": "wide.png", "question": "What?", "answer": 3}', r"row 2: 'answer' is 3 \(int\); it must be text"),
        ('{"image": "wide.png", "question": "What?", "answer": "3", "type": "count"}', "row 2: the first row has no type"),
    ],
)
def test_broken_lines_of_json_are_named(folder, line, message):
    write_lines(folder, [dict(zip(HEADINGS[:3], GOOD[:3], strict=True))])
    with open(folder / "questions.jsonl", "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_data(folder, None)


def test_quotes_that_do_not_end_are_an_error(folder):
    with open(folder / "questions.csv", "a") as file:
        file.write('wide.png,"What?,cat,animal\n')
    with pytest.raises(ValueError, match=r"row 5 of .* cannot be read"):
        load_data(folder, None)


def test_folders_that_hold_no_data_are_refused(folder, tmp_path):
    other = data_folder(tmp_path / "columns", [row[:2] for row in ROWS], ("image", "prompt"))
    for source, number, message in (
        (tmp_path / "nowhere", None, "which is no folder"),
        (folder / "deep", None, "which has none of them"),
        (other, None, r"no column 'question' \(there are: 'image', 'prompt'"),
        (data_folder(tmp_path / "empty", []), None, "has 0 rows"),
        (folder, 0, "whole number from 1"),
        (folder, 5, "has 4 rows; `--questions` asks for 5"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(source, number)
    (folder / "questions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"which has questions\.csv, questions\.jsonl"):
        load_data(folder, None)


def png(seed):
    file = io.BytesIO()
    photo(60, 60, seed=seed).save(file, "png")
    return file.getvalue()


RECORDS = (
    {"image": {"bytes": png(0), "path": "a.png"}, "question": "What?", "answer": "cat", "type": "animal", "id": 3},
    {"image": {"bytes": png(1), "path": None}, "question": "How many?", "answer": "two", "type": "count", "id": 4},
    {"image": {"bytes": png(0), "path": "a.png"}, "question": "Where?", "answer": "left", "type": "place", "id": 5},
)


def dataset_of(records=RECORDS):
    return datasets.Dataset.from_list(list(records)).cast_column("image", datasets.Image())


def test_saved_datasets_are_read(tmp_path):
    dataset_of().save_to_disk(tmp_path / "split")
    data = load_data(tmp_path / "split", None)
    assert [row[2:] for row in data.rows] == [
        ("What?", "cat", "animal"),
        ("How many?", "two", "count"),
        ("Where?", "left", "place"),
    ]
    names = [row.image_name for row in data.rows]
    assert names[0] == names[2] != names[1]  # told apart by what they show
    assert data.rows[0].open_image().tobytes() == photo(60, 60, seed=0).tobytes()
    assert data.rows[1].open_image().tobytes() == photo(60, 60, seed=1).tobytes()
    # Of several splits one is named.
    datasets.DatasetDict({"train": dataset_of(RECORDS[:1]), "test": dataset_of()}).save_to_disk(tmp_path / "splits")
    assert load_data(tmp_path / "splits", None, "test").sha256 == data.sha256
    for split in (None, "dev"):
        with pytest.raises(ValueError, match=f"`--split` is {split!r}; give one of train, test"):
            load_data(tmp_path / "splits", None, split)
    for source in (tmp_path / "split", data_folder(tmp_path / "table")):
        with pytest.raises(ValueError, match="has no splits"):
            load_data(source, None, "test")
    with pytest.raises(ValueError, match="no `--data` was given"):
        load_data(None, None, "test")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/home/somebody/b.png", "the image is '/home/somebody/b.png'; it must be a path inside"),
        ("gone.png", "the image 'gone.png' cannot be read.*Save the images in the data"),
        ({"bytes": b"no picture", "path": None}, "the image .* cannot be read"),
    ],
)
def test_broken_images_of_saved_datasets_are_named(tmp_path, image, message):
    """Images may be files of the library, or paths in the folder."""
    good = "wide.png" if isinstance(image, str) else RECORDS[0]["image"]
    records = [{**record, "image": value} for record, value in zip(RECORDS, (good, image), strict=False)]
    saved = datasets.Dataset.from_list(records) if isinstance(image, str) else dataset_of(records)
    saved.save_to_disk(tmp_path / "split")
    photo(60, 60).save(tmp_path / "split" / "wide.png")
    with pytest.raises(ValueError, match=f"row 2: {message}"):
        load_data(tmp_path / "split", None)


def downloaded(cases):
    """Runs in a process of its own: the questions and the images' sizes of data sets on the Hub, or what is wrong."""
    from hivtp_hf.evaluation.data import load_data

    found = []
    for source, split in cases:
        try:
            data = load_data(source, None, split)
            sizes = [row.open_image().size for row in data.rows]
            found.append([data.name, [row.question for row in data.rows], sizes])
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def test_datasets_on_the_hub_are_downloaded(tmp_path):
    files = {}
    for split, records in (("train", RECORDS[:1]), ("test", RECORDS)):
        dataset_of(records).to_parquet(tmp_path / split)
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / split).read_bytes()
    with HubServer() as hub:
        first = hub.add_repository("datasets/owner/questions", files)
        hub.commit("datasets/owner/questions", dict.fromkeys(list(files)[:1]))  # leaves one split
        cases = [("owner/questions", None), (f"owner/questions@{first}", "train"), (f"owner/questions@{first}", None)]
        cases += [("owner/questions", "dev"), ("owner/nothing", None)]
        done = finished(hub, tmp_path / "home", program(downloaded, cases=cases))
    assert done.returncode == 0, done.stderr
    newest, older, several, unknown, nothing = json.loads(done.stdout)
    assert newest == ["questions", ["What?", "How many?", "Where?"], [[60, 60]] * 3]
    assert older == ["questions", ["What?"], [[60, 60]]]
    assert several == f"owner/questions@{first} has several splits, and `--split` is None; give one of train, test."
    assert "dev" in unknown
    assert "owner/nothing" in nothing


def test_what_reads_datasets_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_data(folder, None).rows) == 4  # which tables do without
    with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[data\]"'):
        load_data("owner/questions", None)


HELD_OUT = """
from PIL import Image
from hivtp_hf.evaluation import Row

def held_out_rows(number):
    for index in range(number):
        yield Row(lambda: Image.new("RGB", (60, 50)), f"scene {index // 2}", f"What is {index}?", "cat", "animal")
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A current directory with a generator of questions, which no other test sees."""
    folder = tmp_path / "examples" / "shapes_vqa"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "held_out.py").write_text(HELD_OUT)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]


@pytest.mark.usefixtures("clone")
def test_without_data_the_projects_own_questions_are_asked():
    data = load_data(None, 6)
    assert data.name == "shapes-vqa"
    assert [row.question for row in data.rows] == [f"What is {index}?" for index in range(6)]
    assert data.image_sizes == {f"scene {index}": (50, 60) for index in range(3)}


def test_outside_a_clone_data_must_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Give `--data FOLDER`"):
        load_data(None, None)


def test_what_the_projects_own_questions_need_is_named(clone):
    (clone / "held_out.py").write_text("import a_library_that_is_not_here")
    with pytest.raises(ValueError, match=r"a_library_that_is_not_here.*pip install"):
        load_data(None, 1)


def test_another_package_of_that_name_is_not_asked(clone):
    (clone / "__init__.py").unlink()  # then the tests' own examples, which are a package, come first
    with pytest.raises(ValueError, match=r"the name examples\.shapes_vqa\.held_out means .* and not "):
        load_data(None, 1)
