"""transformers' own server, with our classes known to it."""

import functools
from typing import Any

from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from .. import FAMILIES
from .context_limit import limit_prompts
from .request_errors import answer_errors_of_requests
from .servable_checkpoint import check_servable


class Server(Serve):
    """transformers' server: its arguments, its end points. It runs until it is stopped.

    Beyond that it knows our classes, refuses a stock checkpoint, and answers requests that cannot be served with 400.

    Raises:
        ValueError: for a checkpoint that would run unpruned, and where the packages of the extra "serving" are missing.
    """

    # The command line reads its options off this signature: they are all the server's.
    @functools.wraps(Serve.__init__)
    def __init__(self, *args: Any, non_blocking: bool = False, force_model: str | None = None, **options: Any) -> None:
        if not is_serve_available():
            raise ValueError("the packages of the server are missing. Install them: pip install 'hivtp-hf[serving]'.")
        if force_model is not None:
            check_servable(force_model)
        make_classes_known()
        self._in_background = non_blocking
        # Not to run in the background, but because the app can be reached only once this has been prepared, and before it runs.
        super().__init__(*args, force_model=force_model, non_blocking=True, **options)

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

    Its `ModelManager` (transformers/cli/serving/model_manager.py, in this the same in 5.6.0 and 5.23.0) asks this dictionary, and
    not the Auto classes, where ours are registered. `_load_model` looks for the model type among its keys, and else for the class
    in transformers itself; `get_model_modality` looks for the class's name among its values. Once both ask the Auto classes in
    all releases that the package allows, this can be deleted: `test_the_server_does_not_know_our_classes_by_itself` notices.
    """
    for family in FAMILIES:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[family.config.model_type] = family.model.__name__
