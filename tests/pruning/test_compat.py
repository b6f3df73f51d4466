"""What is asked of the installed transformers release, and what becomes of our classes where it answers otherwise."""

import dataclasses
import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from families import FAMILIES
from hivtp_hf.pruning import compat
from tiny_models import CACHE, CACHE_NAMES, image_features_of, photo, pruned_processor, twins
from tiny_onevision import FAMILY as ONEVISION

pytestmark = pytest.mark.releases


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins({"retention_ratio": 0.25}, family=request.param)


@pytest.fixture
def inputs(pair):
    return pair.processor(images=photo(60, 100), text="USER: <image>\nWhat is shown? ASSISTANT:", return_tensors="pt")


def test_older_releases_are_refused():
    for version in ("5.19.0", "5.24.0.dev0"):
        compat.check_transformers_version(version)
    for version in ("5.18.9", "4.99"):
        with pytest.raises(ImportError, match=rf"need transformers 5\.19 or later; {version} is installed.*pip install"):
            compat.check_transformers_version(version)


@pytest.mark.parametrize(("stock", "name"), [(stock, name) for stock, names in compat.OVERRIDDEN.items() for name in names])
def test_what_our_classes_override_is_there_and_stocks(stock, name):
    stock_class = getattr(transformers, stock)
    assert callable(getattr(stock_class, name))
    classes = [
        getattr(family, part) for family in (*FAMILIES.values(), ONEVISION) for part in ("config", "base", "model", "processor")
    ]
    overriding = [ours for ours in classes if issubclass(ours, stock_class)]
    assert overriding
    assert all(getattr(ours, name) is not getattr(stock_class, name) for ours in overriding)


def test_every_private_override_is_listed():
    """Private names that our classes and their stock classes both define: transformers calls them, and may rename them."""
    listed = {name for names in compat.OVERRIDDEN.values() for name in names}
    found = set()
    for family in (*FAMILIES.values(), ONEVISION):
        for part in ("config", "base", "model", "processor"):
            classes = getattr(family, part).__mro__
            ours, stocks = (
                {
                    name
                    for cls in classes
                    if cls.__module__.startswith(package)
                    for name, value in vars(cls).items()
                    if is_code(value)
                }
                for package in ("hivtp_hf", "transformers")
            )
            found |= {name for name in ours & stocks if name.startswith("_") and not name.startswith("__")}
    assert found <= listed
    assert found == {name for name in listed if name.startswith("_")}


def is_code(value):
    return inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("part", ["head", "base"])
def test_a_cache_is_taken_under_every_name(pair, inputs, part, name):
    model = pair.pruned if part == "head" else pair.pruned.model
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{name: cache})
        assert cache.get_seq_length() == inputs.input_ids.shape[1]
        model(input_ids=torch.tensor([[5]]), **{name: cache})
    assert cache.get_seq_length() == inputs.input_ids.shape[1] + 1


def test_an_output_says_its_cache(pair, inputs):
    with torch.no_grad():
        output = pair.pruned(**inputs)
    assert compat.cache_of(output).get_seq_length() == inputs.input_ids.shape[1]
    assert compat.cache_of(pair.pruned.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)) is not None
    with torch.no_grad():
        assert compat.cache_of(pair.pruned(**inputs, use_cache=False)) is None


def test_what_continuous_batching_calls_cache_is_left_to_it():
    """Before 5.24 it reaches attention through a model's keywords, and is no `Cache`; any other is taken under the old name."""
    paged, plain = object(), DynamicCache()
    two = dict.fromkeys(CACHE_NAMES, plain)
    assert compat.with_cache_named(CACHE, two) == two  # for stock to refuse
    assert compat.with_cache_named("past_key_values", {"cache": paged}) == {"cache": paged}
    assert compat.with_cache_named("past_key_values", {"cache": plain}) == {"past_key_values": plain}
    assert compat.with_cache_named("past_key_values", {"cache": None}) == {"past_key_values": None}
    assert compat.with_cache_named("cache", {"past_key_values": plain}) == {"cache": plain}


def test_the_next_name_of_a_cache_is_an_error_and_no_lost_cache():
    """What a further renaming would bring: to go on without a cache answers wrongly, without a word."""

    def forward(self, input_ids=None, memory=None):
        pass

    with pytest.raises(RuntimeError, match=r"forward` takes no 'cache' or 'past_key_values', only self, input_ids, memory"):
        compat.cache_argument(forward)

    @dataclasses.dataclass
    class Output:
        logits: int = 0
        memory: int = 0

    with pytest.raises(RuntimeError, match="Output` has no 'cache' or 'past_key_values', only logits, memory"):
        compat.cache_of(Output())


def test_argument_and_field_of_the_cache_have_one_name():
    assert CACHE in inspect.signature(LlamaForCausalLM.forward).parameters
    assert CACHE in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}


@pytest.mark.parametrize("pruning", [{"exact_count": False}, {}], ids=["published", "exact"])
def test_a_call_uses_nothing_that_is_deprecated(pair, pruning, deprecations):
    """With a ratio of its own and without: no log, and no warning."""
    model = pair.family.model(type(pair.pruned.config).from_dict({**pair.pruned.config.to_dict(), "pruning_config": pruning}))
    processor = pruned_processor(pair.stock_processor, pruning)
    for ratio in ({}, {"retention_ratio": 0.5}):
        inputs = processor(images=photo(60, 100), text="USER: <image> ASSISTANT:", return_tensors="pt", **ratio)
        with torch.no_grad():
            output = model(**inputs)
            model(input_ids=torch.tensor([[5]]), **{CACHE: compat.cache_of(output)})
        assert len(torch.cat(image_features_of(output))) > 0
        model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert deprecations.found == []


@pytest.mark.skipif(CACHE == "past_key_values", reason="this release has no older name for it")
@pytest.mark.parametrize(
    "code", ["output.past_key_values", "stock(input_ids=ids, past_key_values=None)"], ids=["log", "warning"]
)
@pytest.mark.parametrize("filename", [compat.__file__, "modules/transformers_modules/folder/compat.py", __file__])
def test_the_watch_sees_old_names_in_our_code_alone(pair, inputs, deprecations, code, filename):
    """In the package and beside a checkpoint; what a test itself does is none of ours."""
    with torch.no_grad():
        output = pair.pruned(**inputs)
        exec(compile(code, filename, "exec"), {"output": output, "stock": pair.stock, "ids": torch.tensor([[5]])})
    assert [found.split(":")[0] for found in deprecations.found] == ([] if filename == __file__ else [filename])
    deprecations.found.clear()
