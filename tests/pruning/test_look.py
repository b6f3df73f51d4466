"""`look`: one pass says what every method would keep, and by which scores."""

import pytest
import torch

from families import FAMILIES
from hivtp_hf import Evidence
from hivtp_hf.pruning.registry import METHODS
from tested_methods import TESTED
from tiny_models import TOWERS, image_inputs, photo, settings, twins


@pytest.mark.parametrize("tower", TOWERS)
def test_it_keeps_what_the_model_keeps(tower):
    pair = twins({"retention_ratio": 0.5}, **TOWERS[tower])
    has_class_token = Evidence.CLASS_ATTENTION in pair.pruned.model.provided_evidence
    asked = [
        {"method": name, **TESTED[name].small, **({} if method.keeps_everything else {"retention_ratio": 0.25})}
        for name, method in METHODS.items()
        if has_class_token or name != "cls_attention"
    ]
    inputs = pair.processor(images=[photo(60, 100), photo(90, 40)], text="<image><image>", return_tensors="pt")
    look = pair.pruned.look(inputs, prunings=asked)
    for pruning in asked:
        with settings(pair, pruning):
            own = pair.pruned.get_image_features(**image_inputs(inputs))
            kept = look.kept()
        assert all(map(torch.equal, kept[1], own.kept_indices))
        assert all(map(torch.equal, kept[0], own.pooler_output))
        importance = look.importance(pruning)
        assert (importance is not None) == METHODS[pruning["method"]].ranks
        assert importance is None or len(importance) == sum(layout.num_cells for layout in look.layouts(pruning))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_both_kinds(family):
    pair = twins(family=family)
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    look = pair.pruned.look(inputs, layers=[9, 0])
    assert sorted(look.received) == sorted(look.class_attention) == [0, 9]
    assert not torch.equal(look.received[0], look.class_attention[0])
    assert look.evidence({"method": "cls_attention", "layer": 9}).class_attention.keys() == {9}
    with pytest.raises(ValueError, match=r"'hivtp' reads the encoder layers \[6, 7, 8\], and \[6, 7, 8\] were not looked at"):
        look.kept({"method": "hivtp"})
    with pytest.raises(ValueError, match=r"`layers` has \[10\]; the vision tower has 10 layers, 0 to 9"):
        pair.pruned.look(inputs, layers=[10])


def test_settings_of_the_model_play_no_part():
    """Such as a budget that is too small for the image."""
    pair = twins({"token_budget": 1})
    with settings(pair, {"retention_ratio": 0.5}):
        inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    look = pair.pruned.look(inputs, prunings=[{"method": "uniform"}])
    assert len(look.kept({"method": "uniform", "retention_ratio": 1})[1][0]) == look.layouts({"method": "none"})[0].num_stock
