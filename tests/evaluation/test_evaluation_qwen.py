"""`hivtp evaluate` on Qwen-VL, held against the model's own `generate` and against stock's."""

import pytest
import torch

from evaluations import ROWS, SIZES, data_folder, evaluated, plain_answer, table_of
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.checkpoints import CheckpointSource, open_source
from hivtp_hf.evaluation.smaller_images import smaller_images_tokens
from hivtp_hf.families.qwen2_5_vl import Qwen2_5_VLFamily
from hivtp_hf.pruning.evidence import methods_of
from nightly import mostly_nightly
from tiny_models import photo
from tiny_qwen import STOCK, qwen_processor, qwen_twins, save_stock_qwen_checkpoint

METHODS_THAT_CAN = methods_of(Qwen2_5_VLFamily.provides)
PHOTOS = {name: photo(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}


@pytest.fixture(scope="module", params=mostly_nightly(tuple(STOCK), lambda family: family != "qwen2_vl"))
def stock(request, tmp_path_factory):
    """A stock checkpoint of a family, and the family."""
    folder = tmp_path_factory.mktemp(request.param) / "stock"
    folder.mkdir()
    return save_stock_qwen_checkpoint(folder, request.param, sharp=True), request.param


def stock_answer(model, processor, image, question):
    """What stock's own class answers; its processor needs torchvision, and ours prunes nothing here."""
    processor.pruning_config = {"method": "none"}
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    inputs = processor(images=image, text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_generate(stock, tmp_path):
    """Every method that runs there, by one pass of the tower; unpruned they are also those of stock's class."""
    folder, family = stock
    options = {"methods": ",".join(METHODS_THAT_CAN), "ratios": "1,1/2,0.2", "batch_size": 3}
    run = evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", **options)
    source = open_source(str(folder))
    pruned, processor = source.load_model(VisualTokenPruningConfig(), dtype="auto"), source.load_processor(None)
    stock_model = STOCK[family][1].from_pretrained(folder)
    predictions, answers = table_of(run.folder / "predictions.csv"), set()
    assert len(predictions) == len(ROWS) * (1 + 2 * (len(METHODS_THAT_CAN) - 2) + 2 * 3)
    for line in predictions:
        image, question, _, _ = ROWS[int(line["row"]) - 1]
        pruning = {"method": line["method"]}
        if line["method"] != "none":
            pruning["retention_ratio"] = float(line["ratio"])
        else:
            assert line["prediction"] == stock_answer(stock_model, processor, PHOTOS[image], question)
        if line["seed"]:
            pruning["seed"] = int(line["seed"])
        answer, tokens = plain_answer(pruned, processor, PHOTOS[image], question, pruning)
        assert (line["prediction"], int(line["patch_tokens"])) == (answer, tokens)
        answers.add(answer)
    assert len(answers) > len(ROWS)  # or equal answers would prove nothing


def test_answers_are_told_of_weights(stock, tmp_path):
    folder, _ = stock
    options = {"methods": "hivtp,uniform", "ratios": "1/4", "weights_and_positions": "published,weights", "batch_size": 3}
    run = evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", **options)
    source = open_source(str(folder))
    pruned, processor = source.load_model(VisualTokenPruningConfig(), dtype="auto"), source.load_processor(None)
    found = {"published": [], "weights": []}
    for line in table_of(run.folder / "predictions.csv"):
        if line["method"] != "none":
            image, question, _, _ = ROWS[int(line["row"]) - 1]
            told = {"token_weights": "cluster_size"} if line["weights_and_positions"] == "weights" else {}
            pruning = {"method": line["method"], "retention_ratio": 0.25, **told}
            assert line["prediction"] == plain_answer(pruned, processor, PHOTOS[image], question, pruning)[0]
            found[line["weights_and_positions"]].append(line["prediction"])
    assert found["published"] != found["weights"]  # or equal answers would prove nothing


def test_an_image_is_encoded_once(stock, tmp_path, monkeypatch):
    folder, _ = stock
    passes, original = [], CheckpointSource.load_model

    def watched(*arguments, **options):
        model = original(*arguments, **options)
        model.model.visual.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
        return model

    monkeypatch.setattr(CheckpointSource, "load_model", watched)
    methods = ",".join(METHODS_THAT_CAN)
    evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", methods=methods, ratios="1,1/2,1/4", batch_size=3)
    assert len(passes) == 1  # of three images at once


def test_what_means_nothing_here_is_left_out_or_refused(stock, tmp_path):
    folder, _ = stock
    said = []
    run = evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", questions=1, ratios="1/2", say=said.append)
    assert [text.partition(" is left out")[0] for text in said[:2]] == ["base-only", "cls_attention"]
    asked = {row.method for row in run.metrics}
    assert asked == {*METHODS_THAT_CAN, "downsample"}
    with pytest.raises(ValueError, match="no class token"):
        evaluated(folder, data_folder(tmp_path / "more"), tmp_path / "runs", methods="cls_attention", ratios="1/2")
    options = {"methods": "hivtp", "ratios": "1/2", "weights_and_positions": "positions"}
    with pytest.raises(ValueError, match="stand at their original places already"):
        evaluated(folder, data_folder(tmp_path / "other"), tmp_path / "runs", **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_smaller_images_have_at_most_the_tokens_of_their_ratio(family):
    """They are what the model makes of them where the processor's budget of pixels is lowered."""
    twins, processor = qwen_twins(family, {"method": "none"}), qwen_processor(family, {"method": "none"})
    none = VisualTokenPruningConfig(method="none")
    images = [photo(300, 500), photo(448, 448, seed=1), photo(60, 60, seed=2)]
    stock = [processor.family.processor_layout(processor, image.height, image.width, none) for image in images]
    for ratio in (0.5, 0.25, 0.01):
        for image, tokens, layout in zip(
            images, smaller_images_tokens(twins.pruned, processor, images, stock, ratio), stock, strict=True
        ):
            most = max(1, int(ratio * layout.num_stock))
            assert max(1, most // 2) <= tokens.patches <= most
            side = processor.image_processor.patch_size * processor.image_processor.merge_size
            size = {"shortest_edge": side**2, "longest_edge": most * side**2}
            inputs = processor.image_processor([image], size=size, return_tensors="pt")
            with torch.no_grad():
                expected = twins.stock.model.get_image_features(**inputs, return_dict=True)
            assert torch.equal(tokens.features, expected.pooler_output[0])
            if family == "qwen3_vl":
                assert torch.equal(tokens.encoded.deepstack_features[1][0], expected.deepstack_features[1][0])
