"""A stock model beside the same weights with pruned visual tokens: token counts, prefill time, KV cache, and what each
method keeps of a photograph.

python -m examples.demo                          a small trained model on drawn scenes, and a tiny one on photographs, offline
python -m examples.demo MODEL IMAGE "QUESTION"   your own checkpoint, stock or pruned, on your own image
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
import typer
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    pipeline,
)
from transformers.image_utils import load_image

from hivtp_hf import (
    HIVTPLlavaForConditionalGeneration,
    HIVTPLlavaNextForConditionalGeneration,
    HIVTPLlavaNextProcessor,
    HIVTPLlavaOnevisionForConditionalGeneration,
    HIVTPLlavaOnevisionProcessor,
    HIVTPLlavaProcessor,
    HIVTPQwen2_5_VLForConditionalGeneration,
    HIVTPQwen2_5_VLProcessor,
)
from hivtp_hf.figures import draw_comparison, draw_kept_cells, draw_kept_frames
from hivtp_hf.pruning.compat import cache_of
from hivtp_hf.pruning.registry import METHODS

from .shapes_vqa.reference import CHECKPOINT, a_question_of_each_type
from .tiny_checkpoint import build_stock_checkpoint
from .tiny_onevision_checkpoint import build_onevision_checkpoint
from .tiny_qwen_checkpoint import build_qwen_checkpoint

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
# Beside LLaVA-NeXT's geometry, which is the default: a language model that takes most of the time, as it does in real ones.
TINY_MODEL = {"vision_width": 32, "text_layers": 4, "text_width": 256}
RATIOS = {"50 %": 1 / 2, "22 %": 2 / 9, "11 %": 1 / 9}
# Its tiles are larger and more than theirs.
TINY_ONEVISION = {"vision_width": 32}
# Of the patch tokens, where answers are compared.
KEPT_SHARE = 2 / 9
# By the model type of a stock checkpoint, stock's classes and ours.
FAMILIES = {
    "llava_next": (
        (LlavaNextForConditionalGeneration, LlavaNextProcessor),
        (HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor),
    ),
    "llava": (
        (LlavaForConditionalGeneration, LlavaProcessor),
        (HIVTPLlavaForConditionalGeneration, HIVTPLlavaProcessor),
    ),
}
QWEN = (HIVTPQwen2_5_VLForConditionalGeneration, HIVTPQwen2_5_VLProcessor)
ONEVISION = (HIVTPLlavaOnevisionForConditionalGeneration, HIVTPLlavaOnevisionProcessor)
NUM_FRAMES = 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Prefill(NamedTuple):
    """What one forward pass over the prompt took."""

    image_tokens: int
    seconds: float
    cache_bytes: int


def build_checkpoints(folder: Path) -> tuple[str, str]:
    """Saves a tiny stock checkpoint, and the same weights as a pruned one, which carries its own code."""
    stock, pruned = str(folder / "stock_checkpoint"), str(folder / "pruned_checkpoint")
    build_stock_checkpoint(stock, **TINY_MODEL)
    HIVTPLlavaNextForConditionalGeneration.from_pretrained(stock).save_pretrained(pruned)
    HIVTPLlavaNextProcessor.from_pretrained(stock).save_pretrained(pruned)
    return stock, pruned


def load(name: str, model_class, processor_class):
    model = model_class.from_pretrained(name, dtype="auto")
    return pipeline("image-text-to-text", model=model, processor=processor_class.from_pretrained(name), device=DEVICE)


def load_pair(stock_name: str, pruned_name: str) -> tuple:
    """Pipelines of the stock model and of the pruned one; both names may be those of one checkpoint, stock or pruned."""
    model_type = str(PreTrainedConfig.get_config_dict(pruned_name)[0].get("model_type"))
    family = FAMILIES.get(model_type.removeprefix("hivtp_"))
    if family is None:
        known = " or ".join(map(repr, FAMILIES))
        raise ValueError(
            f"it has the model type {model_type!r}; give a checkpoint of type {known}, stock or pruned by hivtp_hf."
        )
    if model_type.startswith("hivtp_"):
        # Where hivtp_hf is not imported, this line runs the code that lies in the checkpoint; here it runs the package.
        pruned = pipeline("image-text-to-text", model=pruned_name, trust_remote_code=True, device=DEVICE)
    else:
        pruned = load(pruned_name, *family[1])
    # Warnings about the weights have been shown by now; those to come repeat them or concern the pipeline's own defaults.
    transformers.logging.set_verbosity_error()
    return load(stock_name, *family[0]), pruned


def load_whole_and_pruned(name: str, classes: tuple) -> tuple:
    """Pipelines of a checkpoint at a ratio of 1, which is stock's result bit for bit, and of the same weights pruned."""
    unpruned = load(name, *classes)
    unpruned.model.config.pruning_config = unpruned.processor.pruning_config = {"method": "none"}
    return unpruned, load(name, *classes)


def load_photographs(image_path: str | None) -> dict[str, Image.Image]:
    """By name the user's image, or those of scikit-image's photographs that its wheel carries."""
    if image_path is not None:
        with open(image_path, "rb"):  # for its error: load_image would take a missing file for base64
            return {Path(image_path).stem: load_image(image_path)}
    import skimage

    files = [path for name in PHOTOGRAPHS for path in Path(skimage.__file__).parent.glob(f"data/{name}.*")]
    return {path.stem: load_image(str(path)) for path in files}


def ask(image: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def prepare(pipe, messages: list[dict]):
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return pipe.processor.apply_chat_template(messages, **settings).to(pipe.device, dtype=pipe.model.dtype)


def image_tokens(pipe, inputs) -> int:
    return int((inputs["input_ids"] == pipe.model.config.image_token_id).sum())


@torch.inference_mode()
def run_prefill(pipe, inputs) -> Prefill:
    """Times one pass over the prompt, from pixels to the logits of the first new token, and weighs its KV cache."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    cache = cache_of(pipe.model(**inputs, use_cache=True, logits_to_keep=1))
    synchronize()
    seconds = time.perf_counter() - start
    return Prefill(image_tokens(pipe, inputs), seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))


def measure(pipes: list, messages: list[dict], repeats: int) -> list[Prefill]:
    """One warm-up each, then in turn, so that whatever else the machine does meets all of them; median seconds."""
    inputs = [prepare(pipe, messages) for pipe in pipes]
    rounds = [[run_prefill(pipe, given) for pipe, given in zip(pipes, inputs, strict=True)] for _ in range(repeats + 1)]
    runs_of_pipe = zip(*rounds[1:], strict=True)
    return [runs[0]._replace(seconds=statistics.median(run.seconds for run in runs)) for runs in runs_of_pipe]


def encode(pipe, image: Image.Image) -> tuple:
    """The layout of an image under the model's settings, and the indices of the tokens that the model keeps."""
    inputs = pipe.processor(images=image, text=pipe.processor.image_token, return_tensors="pt")
    inputs = inputs.to(pipe.device, dtype=pipe.model.dtype)
    images = {name: inputs[name] for name in pipe.processor.family.image_inputs if name in inputs}
    with torch.inference_mode():
        kept_indices = pipe.model.get_image_features(**images).kept_indices[0]
    return pipe.processor.token_layout(image.height, image.width), kept_indices


def compare_methods(pipe, image: Image.Image) -> Image.Image:
    """One photograph under every method: one word of the settings changes from column to column."""
    settings, columns = pipe.model.config.pruning_config, {}
    for method in METHODS:
        columns[method] = []
        for ratio in RATIOS.values():
            # Stock has one panel, since it keeps everything.
            budget = {} if METHODS[method].keeps_everything else {"retention_ratio": ratio}
            pruning = settings.replace(method=method, **budget)
            pipe.model.config.pruning_config = pipe.processor.pruning_config = pruning
            try:
                shown = None if columns[method] and METHODS[method].keeps_everything else encode(pipe, image)
            except ValueError as error:  # such as a method that needs a class token
                print(f"{method} is left out: {error}")
                del columns[method]
                break
            columns[method].append(shown)
    pipe.model.config.pruning_config = pipe.processor.pruning_config = settings
    return draw_comparison(image, list(RATIOS), columns)


def answer(pipe, messages: list[dict]) -> str:
    return pipe(text=messages, max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"]


def report_answers(stock, pruned, folder: Path) -> None:
    """Prints what the trained model answers with all its visual tokens and with few, and saves pictures of what it kept."""
    settings = pruned.model.config.pruning_config.replace(retention_ratio=KEPT_SHARE)
    pruned.model.config.pruning_config = pruned.processor.pruning_config = settings
    print("\nA model of 3.6 million parameters, trained on drawn scenes, and the same weights under HIVTP.\n")
    print(f"{'':12}{'image tokens':>17}{'answer':>24}")
    print(f"{'':12}{'stock':>9}{'kept':>8}{'right':>12}{'stock':>12}{'pruned':>12}   question")
    for row in a_question_of_each_type():
        image = row.open_image()
        messages = ask(image, row.question)
        tokens = [image_tokens(pipe, prepare(pipe, messages)) for pipe in (stock, pruned)]
        answers = [row.answer, *(answer(pipe, messages).strip() for pipe in (stock, pruned))]
        cells = f"{tokens[0]:9}{tokens[1]:8}" + "".join(f"{said:>12}" for said in answers)
        print(f"{row.image_name:12}{cells}   {row.question}", flush=True)
        draw_kept_cells(image, *encode(pruned, image)).save(folder / f"{row.image_name}_kept.png")
    methods = folder / f"{row.image_name}_methods.png"
    compare_methods(pruned, image).save(methods)
    print(f"\nThe kept cells are drawn in {folder / 'test-*_kept.png'}, and what all methods keep of one scene in {methods}.")


def report(
    stock,
    pruned,
    photographs: dict[str, Image.Image],
    question: str,
    folder: Path,
    repeats: int,
    sees: bool,
    prefix: str = "",
    methods: bool = True,
) -> None:
    """Prints the table and, of models that see, the answers of both; saves the pictures, under names with the prefix.

    The last argument says whether all methods are drawn as well.
    """
    print("\nPrefill is one forward pass over image and question (vision tower, projector, language model), the median of")
    print(f"{repeats} after a warm-up, stock and pruned in turn. KV cache is the size of its tensors after that pass.\n")
    print(f"{'':23}{'image tokens':>17}{'prefill':>23}{'KV cache':>24}")
    print(f"{'':12}{'size':>11}{'stock':>9}{'kept':>8}{'stock':>12}{'pruned':>11}{'stock':>12}{'pruned':>12}")
    answers = []
    for name, image in photographs.items():
        messages = ask(image, question)
        before, after = measure([stock, pruned], messages, repeats)
        row = f"{name[:12]:12}{f'{image.width}x{image.height}':>11}{before.image_tokens:9}{after.image_tokens:8}"
        row += "".join(f"{run.seconds * 1e3:{width}.0f} ms" for run, width in ((before, 9), (after, 8)))
        print(row + "".join(f"{run.cache_bytes / 2**20:8.2f} MiB" for run in (before, after)), flush=True)
        draw_kept_cells(image, *encode(pruned, image)).save(folder / f"{prefix}{name}_kept.png")
        if sees:
            answers.append(f"  {name}: stock {answer(stock, messages)!r}, pruned {answer(pruned, messages)!r}")
    if answers:
        print(f"\n{question}", *answers, sep="\n")
    print(f"\nThe kept cells are drawn in {folder / f'{prefix}*_kept.png'}.")
    if methods:
        name, image = next(iter(photographs.items()))
        target = folder / f"{prefix}{name}_methods.png"
        compare_methods(pruned, image).save(target)
        print(f"What every method keeps of {name} at {', '.join(RATIOS)} is drawn in {target}.")


def pan_across(image: Image.Image) -> list[Image.Image]:
    """Frames of a video: a window of two thirds of a photograph that moves across it."""
    width, height = image.width * 2 // 3, image.height * 2 // 3
    steps = [number / (NUM_FRAMES - 1) for number in range(NUM_FRAMES)]
    corners = [(round(step * (image.width - width)), round(step * (image.height - height))) for step in steps]
    return [image.convert("RGB").crop((left, top, left + width, top + height)) for left, top in corners]


def report_frames(pipe, photograph: Image.Image, folder: Path) -> None:
    """Prints how many tokens a video makes, chosen in each frame and among all, and saves pictures of the kept cells."""
    frames, settings = pan_across(photograph), pipe.model.config.pruning_config.replace(retention_ratio=KEPT_SHARE)
    layout = pipe.processor.video_token_layout(len(frames), pruning=settings, image_size=(frames[0].height, frames[0].width))
    for scope, words in (("frame", "in every frame"), ("video", "among all frames")):
        pipe.model.config.pruning_config = pipe.processor.pruning_config = settings.replace(video_scope=scope)
        inputs = pipe.processor(videos=[frames], text=pipe.processor.video_token, return_tensors="pt").to(pipe.device)
        with torch.inference_mode():
            (kept,) = pipe.model.get_video_features(inputs["pixel_values_videos"].to(pipe.model.dtype)).kept_indices
        target = folder / f"onevision_frames_kept_by_{scope}.png"
        draw_kept_frames(frames, layout, kept).save(target)
        print(f"Of {layout.num_stock} tokens of {len(frames)} frames {len(kept)} are kept, chosen {words}: {target}")


def main(
    model: Annotated[
        str | None,
        typer.Argument(help="A LLaVA-NeXT or LLaVA-1.5 checkpoint, stock or pruned: a folder, or owner/name on the Hub."),
    ] = None,
    image: Annotated[str | None, typer.Argument(help="An image file; scikit-image's photographs by default.")] = None,
    question: Annotated[str, typer.Argument(help="What is asked about every image.")] = "What is shown in this image?",
    output: Annotated[Path, typer.Option(help="The folder for pictures.")] = Path("demo_output"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes per model and image.")] = 3,
) -> None:
    """A stock model beside the same weights with pruned visual tokens.

    Without MODEL a small trained model answers questions about drawn scenes, and a tiny one runs on photographs, offline.
    """
    started = time.perf_counter()
    try:
        photographs = load_photographs(image)
    except OSError as error:
        sys.exit(f"demo: cannot read the image: {error}")
    if not photographs:
        sys.exit("demo: this scikit-image carries no photographs; give MODEL and IMAGE.")

    output.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()
    stock_name = pruned_name = model
    if model is None:
        report_answers(*load_pair(str(CHECKPOINT), str(CHECKPOINT)), output)
        print(
            "\nA tiny LLaVA-NeXT of real geometry with random weights: its answers would be nonsense. Counts, times and sizes"
        )
        print("are real, for it only.")
        stock_name, pruned_name = build_checkpoints(output)
    try:
        stock, pruned = load_pair(stock_name, pruned_name)
    except (OSError, ValueError) as error:
        sys.exit(f"demo: cannot load the model {pruned_name!r}: {error}")
    for pipe in (stock, pruned):
        print(f"{type(pipe.model).__name__} from {type(pipe.model).__module__}")
    report(stock, pruned, photographs, question, output, repeats, model is not None)
    if model is None:
        print(
            "\nA tiny Qwen2.5-VL of real geometry, with random weights as well, whole (which is stock bit for bit) and pruned."
        )
        qwen = load_whole_and_pruned(str(build_qwen_checkpoint(output / "qwen_checkpoint")), QWEN)
        some = dict(list(photographs.items())[:3])
        report(*qwen, some, question, output, repeats, sees=False, prefix="qwen_")
        print("\nA tiny LLaVA-OneVision in the same way, and six frames of a video.")
        checkpoint = build_onevision_checkpoint(output / "onevision_checkpoint", **TINY_ONEVISION)
        onevision = load_whole_and_pruned(str(checkpoint), ONEVISION)
        name, photograph = next(iter(photographs.items()))
        report(*onevision, {name: photograph}, question, output, repeats, sees=False, prefix="onevision_", methods=False)
        report_frames(onevision[1], photograph, output)
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    typer.run(main)
