"""The figure of a training, from its log: python -m research.shapes_vqa.training_plot LOG FIGURE"""

import sys
from pathlib import Path

from examples.shapes_vqa.vocabulary import QUESTION_TYPES, READING
from hivtp_hf.figures.plotting import check_matplotlib
from hivtp_hf.files import atomic_write

from .training_log import TrainingLog

# What is drawn of each model's stages, and as what: shares of trained cells, and of pairs in tiles, that are told right; and
# of unseen questions.
_OF_TOWER = {
    "kind": "shape",
    "colour": "colour",
    "digit": "digit",
    "characters": "characters",
    "tile": "presence, by the class token",
}
_OF_LANGUAGE_MODEL = {name: name for name in (*QUESTION_TYPES, READING)}


def plot_training(log: TrainingLog, path: Path) -> None:
    """Writes a figure with a column a stage: the loss above, and below what is right, against minutes of training.

    Raises:
        ValueError: for a log without rows, and where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(stage for stage, _, _, name, _ in log.rows if name == "loss"))
    if not stages:
        raise ValueError("the log has no rows yet; there is nothing to draw. Train for some steps first.")
    figure = Figure(figsize=(3.2 * len(stages), 5), layout="constrained")
    panels = figure.subplots(2, len(stages), sharex="col", squeeze=False)
    for (above, below), stage in zip(panels.T, stages, strict=True):
        series: dict[str, tuple[list[float], list[float]]] = {}
        for of_stage, _, minutes, name, value in log.rows:
            if of_stage == stage:
                at, values = series.setdefault(name, ([], []))
                at.append(minutes)
                values.append(value)
        above.plot(*series["loss"], color="#444444", linewidth=1)
        above.set_title(stage, fontsize=10)
        for name, label in (_OF_TOWER if "kind" in series else _OF_LANGUAGE_MODEL).items():
            if name in series:
                below.plot(*series[name], linewidth=1, label=label)
        below.set_ylim(0, 1)
        below.set_xlabel("minutes")
        below.legend(frameon=False, fontsize=7)
    panels[0][0].set_ylabel("loss")
    panels[1][0].set_ylabel("share that is right")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    atomic_write(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    plot_training(TrainingLog(Path(sys.argv[1])), Path(sys.argv[2]))
