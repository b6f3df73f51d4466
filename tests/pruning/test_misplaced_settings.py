"""Settings given where they would be ignored, and other slips that transformers lets pass in silence: errors, all of them."""

import re

import pytest

from families import FAMILIES
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import LOW_RATIO, image_inputs, photo, twins

GEOMETRY = {"tile_size": 56, "patch_size": 7, "vision_layers": 9}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: build_stock_checkpoint(folder / family, family=family, **GEOMETRY) for family in FAMILIES}


MISPLACED = [
    ({"retention_ratio": 0.1}, "`retention_ratio` is a pruning setting; give it as `pruning_config={'retention_ratio': ...}`"),
    ({"method": "gprune"}, "`method` is a pruning setting"),
    ({"pruning": {}}, "Did you mean `pruning_config`?"),
    ({"retention_ration": 0.1}, "Did you mean `pruning_config={'retention_ratio': ...}`?"),
]


@pytest.mark.parametrize(("keyword", "message"), MISPLACED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained(family, keyword, message, folders):
    # A processor takes a budget for all of its calls.
    for part in ("base", "model") if "retention_ratio" in keyword else ("base", "model", "processor"):
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(FAMILIES[family], part).from_pretrained(folders[family], **keyword)


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration(family, folders):
    config_class = FAMILIES[family].config
    message = "`retention_ratio` is a pruning setting"
    with pytest.raises(ValueError, match=message):
        config_class(retention_ratio=0.1)
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(folders[family], retention_ratio=0.1)
    config = config_class.from_pretrained(folders[family])
    with pytest.raises(ValueError, match=message):
        config.retention_ratio = 0.1
    assert "retention_ratio" not in config.to_dict()


def test_processor_constructor(pair):
    with pytest.raises(ValueError, match="`retention_ratio` is a pruning setting"):
        pair.family.processor(pair.processor.image_processor, pair.processor.tokenizer, retention_ratio=0.1)


IN_A_CALL = [
    ({"method": "random"}, "`method` is a setting of model and processor, and cannot be given to a call"),
    ({"pruning_config": {}}, "`pruning_config` was given to a call, which takes `retention_ratio` or `token_budget`"),
    ({"tokens_budget": 5}, "Did you mean `token_budget`?"),
    ({"token_budget": [None]}, "`token_budget` is [None] (list); give a value for each image"),
    ({"retention_ratio": 0.5, "token_budget": 64}, "`retention_ratio` is 0.5 (float) and `token_budget` 64 (int); give one"),
    *(
        ({nested: {"token_budget": 5}}, f"`token_budget` was given inside `{nested}`; give it at the top level: processor(...")
        for nested in ("images_kwargs", "text_kwargs", "common_kwargs")
    ),
]


@pytest.mark.parametrize(("keyword", "message"), IN_A_CALL, ids=str)
def test_processor_call(pair, keyword, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt", **keyword)


def test_model_call(pair):
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    for keyword in ({"token_budget": 20}, {"retention_ration": 0.2}):
        message = f"`{next(iter(keyword))}` is no argument of a model. Give `retention_ratio` or `token_budget` to the proc"
        with pytest.raises(ValueError, match=message):
            pair.pruned.get_image_features(**image_inputs(inputs), **keyword)
        with pytest.raises(ValueError, match=message):
            pair.pruned(**inputs, **keyword)


def test_settings_assigned_to_a_model_take_effect(pair):
    before = pair.pruned.config.pruning_config
    try:
        for model in (pair.pruned, pair.pruned.model):
            model.pruning_config = {"method": "uniform", "retention_ratio": 0.5}
            assert pair.pruned.config.pruning_config.method == pair.pruned.pruning_config.method == "uniform"
            model.pruning_config = before
    finally:
        pair.pruned.config.pruning_config = before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_family(family, folders):
    other = next(name for name in FAMILIES if name != family)
    for part in ("config", "base", "model"):
        with pytest.raises(ValueError, match=f"a checkpoint of the type '{other}'.*Use the classes of its own family"):
            getattr(FAMILIES[family], part).from_pretrained(folders[other])
