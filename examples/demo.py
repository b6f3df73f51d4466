"""Stock LLaVA-NeXT beside the same weights with pruned visual tokens: token counts, prefill time, KV cache, kept cells.

python examples/demo.py                          a tiny model with random weights on real photographs, offline
python examples/demo.py MODEL IMAGE "QUESTION"   your own checkpoint, stock or pruned, on your own image
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedConfig, pipeline
from transformers.image_utils import load_image

from hivtp_hf import HIVTPLlavaNextConfig, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor
from hivtp_hf.visualization import draw_kept_cells
from tiny_checkpoint import build_stock_checkpoint

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
# LLaVA-NeXT's geometry is the default. Only this wide and deep does the language model weigh as much as the tiny tower.
TINY_MODEL = {"text_layers": 4, "text_width": 256}


class Prefill(NamedTuple):
    """What one forward pass over the prompt took."""

    image_tokens: int
    seconds: float
    cache_bytes: int


def convert(stock_folder: str | Path, pruned_folder: str | Path) -> None:
    """Saves a stock checkpoint as a pruned one, which carries its own code."""
    HIVTPLlavaNextForConditionalGeneration.from_pretrained(stock_folder).save_pretrained(pruned_folder)
    HIVTPLlavaNextProcessor.from_pretrained(stock_folder).save_pretrained(pruned_folder)


def load_pruned(model_name: str):
    """A pipeline around the pruned model. A ValueError for checkpoints of another family, an OSError for none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_type = PreTrainedConfig.get_config_dict(model_name)[0].get("model_type")
    if model_type == HIVTPLlavaNextConfig.model_type:
        # Without the import of hivtp_hf above, this runs the code that lies in the checkpoint; with it, the package's.
        return pipeline("image-text-to-text", model=model_name, trust_remote_code=True, device=device)
    if model_type != "llava_next":
        raise ValueError(f"it has the model type {model_type!r}; give a LLaVA-NeXT checkpoint, stock or pruned by hivtp_hf.")
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(model_name, dtype="auto")
    processor = HIVTPLlavaNextProcessor.from_pretrained(model_name)
    return pipeline("image-text-to-text", model=model, processor=processor, device=device)


def load_stock(model_name: str, device: torch.device):
    """A pipeline around transformers' own classes on the same weights."""
    model = LlavaNextForConditionalGeneration.from_pretrained(model_name, dtype="auto").eval()
    processor = LlavaNextProcessor.from_pretrained(model_name)
    return pipeline("image-text-to-text", model=model, processor=processor, device=device)


def load_photographs(image_path: str | None) -> dict[str, Image.Image]:
    """The user's image, or those of scikit-image's photographs that its wheel carries, by name."""
    if image_path is not None:
        return {Path(image_path).stem: load_image(image_path)}
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: load_image(str(path)) for name in PHOTOGRAPHS for path in sorted(folder.glob(f"{name}.*"))}


def chat(image: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def prepare(pipe, messages: list[dict]):
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return pipe.processor.apply_chat_template(messages, **settings).to(pipe.device, dtype=pipe.model.dtype)


@torch.inference_mode()
def run_prefill(pipe, inputs) -> Prefill:
    """Times one pass over the prompt, from pixels to the logits of the first new token, and weighs its KV cache."""
    synchronize = torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    cache = pipe.model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    synchronize()
    seconds = time.perf_counter() - start
    image_tokens = int((inputs["input_ids"] == pipe.model.config.image_token_id).sum())
    return Prefill(image_tokens, seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))


def measure(pipes: list, messages: list[dict], repeats: int) -> list[Prefill]:
    """One warm-up each, then in turn, so that whatever else the machine does meets all of them; median seconds."""
    inputs = [prepare(pipe, messages) for pipe in pipes]
    rounds = [[run_prefill(pipe, given) for pipe, given in zip(pipes, inputs, strict=True)] for _ in range(repeats + 1)]
    runs_of_pipe = zip(*rounds[1:], strict=True)
    return [runs[0]._replace(seconds=statistics.median(run.seconds for run in runs)) for runs in runs_of_pipe]


@torch.inference_mode()
def draw(pipe, image: Image.Image, messages: list[dict]) -> Image.Image:
    inputs = prepare(pipe, messages)
    kept_indices = pipe.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).kept_indices[0]
    return draw_kept_cells(image, pipe.processor.token_layout(image.height, image.width), kept_indices)


def answer(pipe, messages: list[dict]) -> str:
    return pipe(text=messages, max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"]


def report(stock, pruned, photographs: dict[str, Image.Image], question: str, folder: Path, repeats: int) -> None:
    print(f"""
Image tokens, prefill (one forward pass over image and question: vision tower, projector, language model; median of
{repeats} after a warm-up, stock and pruned in turn) and KV cache (bytes of its tensors after that pass).

{"":12}{"":>11}{"image tokens":>19}{"prefill":>21}{"KV cache":>21}
{"":12}{"size":>11}{"stock":>10}{"kept":>9}{"stock":>11}{"pruned":>10}{"stock":>11}{"pruned":>10}""")
    answers = []
    for name, image in photographs.items():
        messages = chat(image, question)
        before, after = measure([stock, pruned], messages, repeats)
        print(
            f"{name[:12]:12}{f'{image.width}x{image.height}':>11}{before.image_tokens:10}{after.image_tokens:9}"
            f"{before.seconds * 1e3:8.0f} ms{after.seconds * 1e3:7.0f} ms"
            f"{before.cache_bytes / 2**20:7.2f} MiB{after.cache_bytes / 2**20:6.2f} MiB",
            flush=True,
        )
        draw(pruned, image, messages).save(folder / f"{name}_kept.png")
        answers.append(f"{name}: stock {answer(stock, messages)!r}, pruned {answer(pruned, messages)!r}")
    print(f"\n{question}", *answers, f"\nKept cells are drawn in {folder / '*_kept.png'}", sep="\n")


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="name or path of a LLaVA-NeXT checkpoint (loaded twice: stock and pruned)")
    parser.add_argument("image", nargs="?", help="an image file; scikit-image's photographs by default")
    parser.add_argument("question", nargs="?", default="What is shown in this image?", help='"%(default)s" by default')
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for pictures (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes per model and image (%(default)s)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be 1 or more.")
    return parser, options


def main(arguments: list[str] | None = None, tiny_model: dict = TINY_MODEL) -> None:
    started = time.perf_counter()
    parser, options = parse_arguments(arguments)
    try:
        photographs = load_photographs(options.image)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read the image {options.image!r}: {error}")
    if not photographs:
        parser.error("this scikit-image carries no photographs; give MODEL and IMAGE.")
    options.output.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()

    stock_name = pruned_name = options.model
    if options.model is None:
        print("A tiny LLaVA-NeXT with random weights: its answers are nonsense. Counts, times and bytes are real, for it only.")
        stock_name, pruned_name = str(options.output / "stock_checkpoint"), str(options.output / "pruned_checkpoint")
        build_stock_checkpoint(stock_name, **tiny_model)
        convert(stock_name, pruned_name)
    try:
        pruned = load_pruned(pruned_name)
    except (OSError, ValueError) as error:
        parser.error(f"cannot load the model {pruned_name!r}: {error}")
    # Warnings about the weights have been shown by now; those to come repeat them or concern the pipeline's own defaults.
    transformers.logging.set_verbosity_error()
    stock = load_stock(stock_name, pruned.device)
    for pipe in (stock, pruned):
        print(f"{type(pipe.model).__name__} from {type(pipe.model).__module__}")
    report(stock, pruned, photographs, options.question, options.output, options.repeats)
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
