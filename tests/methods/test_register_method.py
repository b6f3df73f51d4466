"""Methods of other packages: known by their names once they are registered, in one process."""

import pytest
import torch

from families import FAMILIES
from hivtp_hf import PruningMethod, VisualTokenPruningConfig, register_method
from hivtp_hf.methods.hivtp import HIVTP
from hivtp_hf.pruning.registry import METHODS
from tiny_models import greedy, photo, twins

pytestmark = pytest.mark.once


class TopRows(PruningMethod):
    """As somebody else may write one: the first cells in raster order."""

    name = "top_rows"
    rule = "the first cells in raster order"

    def select(self, evidence, pruning):
        cells = evidence.valid.flatten(1)
        kept = cells.cumsum(1) <= torch.tensor(evidence.totals)[:, None]
        return (cells & kept).view_as(evidence.valid)


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield register_method(TopRows)
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_registered_method_prunes_saves_and_loads(family, tmp_path, caplog):
    pruning = {"method": "top_rows", "retention_ratio": 0.25}
    pair = twins(pruning, family=family)
    inputs = pair.processor(images=photo(60, 100), text="USER: <image>", return_tensors="pt")
    kept = pair.pruned.get_image_features(**{name: inputs[name] for name in inputs if name in ("pixel_values", "image_sizes")})
    cells = pair.processor.token_layout(60, 100).cells(kept.kept_indices[0])
    assert cells[cells[:, 0] == 0][:, 1].max() == 1  # two of eight rows
    pair.pruned.save_pretrained(tmp_path)
    assert "does not travel with the checkpoint" in caplog.text
    again = FAMILIES[family].model.from_pretrained(tmp_path)
    assert greedy(again, inputs).tolist() == greedy(pair.pruned, inputs).tolist()


def test_what_cannot_be_registered():
    class Unfinished(PruningMethod):
        name = "unfinished"

    class Nameless(TopRows):
        name = "two words"

    class Taken(TopRows):
        name = "hivtp"

    for wrong, message in [
        (Unfinished, "which lacks select"),
        (TopRows(), "is no complete method"),
        (dict, "is no complete method"),
        (Nameless, "it must be a name such as"),
        (Taken, "is registered already, by hivtp_hf.methods.hivtp.HIVTP"),
    ]:
        with pytest.raises(ValueError, match=message):
            register_method(wrong)
    assert type(METHODS["hivtp"]) is HIVTP
    with pytest.raises(ValueError, match="`method` is 'top_rows'"):
        VisualTokenPruningConfig("top_rows")
