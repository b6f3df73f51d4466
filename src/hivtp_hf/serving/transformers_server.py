"""transformers' own server, with our classes known to it."""

import inspect
from typing import Any

from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..families import FAMILIES
from .context_limit import limit_prompts
from .request_errors import answer_errors_of_requests
from .servable_checkpoint import check_servable


class Server(Serve):
    """transformers' server: its keyword arguments, its end points. It runs until it is stopped.

    Beyond that it knows our classes, refuses a stock checkpoint, and answers requests that cannot be served with 400.

    Raises:
        ValueError: for a checkpoint that would run unpruned, and where the packages of the extra "serving" are missing.
        OSError, huggingface_hub.errors.HfHubHTTPError: where a checkpoint cannot be downloaded.
    """

    # The command line reads its options off this: they are all the server's.
    __signature__ = inspect.signature(Serve)

    def __init__(self, *, force_model: str | None = None, non_blocking: bool = False, **options: Any) -> None:
        if not is_serve_available():
            raise ValueError("the packages of the server are missing. Install them: pip install 'hivtp-hf[serving]'.")
        if force_model is not None:
            check_servable(force_model)
        make_classes_known()
        self._in_background = non_blocking
        # Else the server runs before this constructor can reach what it is made of; so it calls `start_server`.
        super().__init__(force_model=force_model, non_blocking=True, **options)

    def start_server(self) -> None:
        """What the constructor calls last: the app is complete and not running yet."""
        answer_errors_of_requests(self.server.config.app)
        limit_prompts(self._generation_state)
        if self._in_background:
            super().start_server()
        else:
            self.server.run()


def make_classes_known() -> None:
    """Lets transformers' server load our model types and see that they take images.

    Its `ModelManager` (transformers/cli/serving/model_manager.py, in this the same in 5.19.0 and 5.24.0) asks this dictionary,
    and not the Auto classes, where ours are registered. `_load_model` looks for the model type among its keys, and else for the
    class in transformers itself; `get_model_modality` looks for the class's name among its values. This can go once both ask
    the Auto classes in every release that the package allows: `test_the_server_does_not_know_our_classes_by_itself` notices.
    """
    for family in FAMILIES:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[family.classes.config.model_type] = family.classes.model.__name__
