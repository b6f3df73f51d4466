"""The held-out questions as a local task of lmms-eval: python -m examples.shapes_vqa.lmms_eval_task FOLDER

The folder holds the data, as the library `datasets` saves it, and the two files that say what the task is. Then:

lmms-eval --include_path FOLDER --tasks shapes_vqa --model hivtp_llava_next --batch_size 4 \\
    --model_args pretrained=examples/shapes_vqa/shapes-llava-next,retention_ratio=2/9 --output_path results --log_samples
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hivtp_hf.files import staged_folder

from .held_out import held_out_questions
from .scenes import draw

TASK = "shapes_vqa"

_YAML = """task: {task}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
process_results: !function utils.scores
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""

_UTILS = '''"""What lmms-eval asks of a row: its images, and the score of an answer."""

from hivtp_hf.evaluation.data import normalised


def images(doc):
    return [doc["image"].convert("RGB")]


def scores(doc, answers):
    return {"accuracy": float(normalised(answers[0]) == normalised(doc["answer"]))}
'''


def write_task(folder: Path, number: int) -> None:
    """Writes so many questions as a task.

    Raises:
        ValueError: for a folder that exists.
        ImportError: without the library `datasets`, which comes with lmms-eval.
    """
    from datasets import Dataset, DatasetDict, Features, Image, Value

    rows = [
        {"image": draw(scene), "question": question.text, "answer": question.answer, "question_type": question.type}
        for _, scene, question in held_out_questions(number)
    ]
    features = Features(image=Image(), **{name: Value("string") for name in ("question", "answer", "question_type")})
    with staged_folder(folder) as stage:
        DatasetDict(test=Dataset.from_list(rows, features=features)).save_to_disk(str(stage / "data"))
        data = json.dumps(str(folder.resolve() / "data"))
        (stage / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, data=data), encoding="utf-8")
        (stage / "utils.py").write_text(_UTILS, encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    questions: Annotated[int, typer.Option(min=1)] = 2000,
) -> None:
    """The held-out questions as a local task of lmms-eval."""
    try:
        write_task(folder, questions)
    except ValueError as error:
        sys.exit(f"lmms_eval_task: {error}")


if __name__ == "__main__":
    typer.run(main)
