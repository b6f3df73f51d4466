"""The one Python file of ours in a checkpoint: written wherever a configuration or a processor is saved or pushed.

A class of the package writes the bundle of its family (hivtp_hf/remote_code.py). A class that came from such a file writes
that file again.
"""

import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.utils import logging

from .registry import pruning_method

# A mixin's calls to super() reach the stock class that comes behind it.
if TYPE_CHECKING:
    from transformers.utils import PushToHubMixin as _StockSaving
else:
    _StockSaving = object


class RemoteCodeMixin(_StockSaving):
    """What is saved brings the code along by which `trust_remote_code=True` loads it. Comes before the stock class."""

    family: ClassVar[Any]
    pruning_config: Any

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As stock, and the Python file by which the checkpoint loads where this package is not installed."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        self._write_remote_code(save_directory)
        return saved

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # Saving with `push_to_hub=True` uploads before it returns.
        self._write_remote_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_remote_code(self, folder: Any) -> None:
        name, text = remote_code_of(type(self))
        Path(folder, name).write_text(text, encoding="utf-8")
        method = type(pruning_method(self.pruning_config.method))
        if method.__module__.partition(".")[0] != __name__.partition(".")[0]:
            logging.get_logger(__name__).warning(
                f"The method {method.name!r} is from {method.__module__}, and does not travel with the checkpoint: that loads "
                "only where the package has registered its method."
            )

    def _auto_map(self) -> dict[str, str]:
        """By this map a checkpoint that is loaded without the package finds its classes in the file."""
        config, base_model, model, processor = self.family.classes
        if isinstance(self, processor):
            named = {"AutoProcessor": processor}
        else:
            named = {
                "AutoConfig": config,
                "AutoModel": base_model,
                "AutoModelForImageTextToText": model,
                "AutoModelForMultimodalLM": model,
            }
        return {auto: f"{config.model_type}.{found.__name__}" for auto, found in named.items()}


def remote_code_of(part: type) -> tuple[str, str]:
    """Name and text of the file that a checkpoint of this class carries; `part` is a configuration or a processor class."""
    family = part.family  # type: ignore[attr-defined]
    name = f"{family.classes.config.model_type}.py"
    # The class of the family, as somebody may have subclassed it in a file of theirs.
    module = type(family).__module__
    package, found, _ = module.partition(".families.")
    if found:
        return name, importlib.import_module(f"{package}.remote_code").bundle(family.name)
    return name, Path(inspect.getfile(sys.modules[module])).read_text(encoding="utf-8")
