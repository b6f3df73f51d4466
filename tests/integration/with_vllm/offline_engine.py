"""Answers of vLLM's offline engine, in a process without this project: python offline_engine.py TASK.json ANSWERS.json

TASK holds `engine` (arguments of `LLM`), `prompts`, `images` (a list of paths for each prompt), `processor` (arguments of the
processor for each prompt) and `max_tokens`.
"""

import json
import sys
from pathlib import Path

# None makes an import fail, also where the package is installed: the checkpoint must run by the code that lies in it.
sys.modules["hivtp_hf"] = None


def main(task: str, answers: str) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    given = json.loads(Path(task).read_text(encoding="utf-8"))
    engine = LLM(**given["engine"])
    requests = [
        {
            "prompt": prompt,
            "multi_modal_data": {"image": [Image.open(path).convert("RGB") for path in paths]},
            "mm_processor_kwargs": of_processor,
        }
        for prompt, paths, of_processor in zip(given["prompts"], given["images"], given["processor"], strict=True)
    ]
    outputs = engine.generate(requests, SamplingParams(temperature=0.0, max_tokens=given["max_tokens"]), use_tqdm=False)
    result = [
        {"prompt_tokens": len(output.prompt_token_ids), "token_ids": list(output.outputs[0].token_ids)} for output in outputs
    ]
    Path(answers).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
