"""transformers' own server, with our classes known to it."""

import inspect
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..families import FAMILIES
from .admission import ADMINISTRATION, Admission
from .answering import watch_generation
from .media import Media, MediaLimits
from .preparation import Preparation
from .request_errors import answer_errors_of_requests
from .servable_checkpoint import check_servable

_LIMITS = MediaLimits()


class Server(Serve):
    """transformers' server: its keyword arguments, its end points. It runs until it is stopped.

    Beyond that it knows our classes, refuses a stock checkpoint, answers requests that cannot be served with 400, and goes on
    serving others whatever a request asks for.

    Raises:
        ValueError: for a checkpoint that would run unpruned, a limit that is none, and where the packages of the extra
            "serving" are missing.
        OSError, huggingface_hub.errors.HfHubHTTPError: where a checkpoint cannot be downloaded.
    """

    def __init__(
        self,
        *,
        force_model: str | None = None,
        non_blocking: bool = False,
        allowed_media_domains: Annotated[
            list[str] | None,
            typer.Option(
                help="Host that images may be fetched from (once for each): a name, an address, a network, or * for all that "
                "are public. Private addresses must be named themselves.",
                show_default="none",
            ),
        ] = None,
        allowed_local_media_path: Annotated[
            str | None,
            typer.Option(help="Folder whose files requests may name, as file: addresses.", show_default="none"),
        ] = None,
        media_timeout: Annotated[float, typer.Option(help="Seconds to fetch the images of a request.")] = _LIMITS.seconds,
        max_media_mib: Annotated[float, typer.Option(help="MiB that the images of a request may have.")] = _LIMITS.megabytes,
        max_media_pixels: Annotated[int, typer.Option(help="Pixels that the images of a request may have.")] = _LIMITS.pixels,
        max_waiting_requests: Annotated[
            int, typer.Option(help="Requests that may wait for the one that is answered. Others get the status 503.")
        ] = 32,
        shutdown_timeout: Annotated[int, typer.Option(help="Seconds for answers to end in, once the server is to stop.")] = 30,
        trust_clients: Annotated[
            bool,
            typer.Option(
                "--trust-clients",
                help="Let clients load checkpoints and unload all (/load_model, /reset), and send a generation_config "
                "(`transformers chat` does).",
            ),
        ] = False,
        **options: Any,
    ) -> None:
        if not is_serve_available():
            raise ValueError("the packages of the server are missing. Install them: pip install 'hivtp-hf[serving]'.")
        if max_waiting_requests < 0 or shutdown_timeout < 0:
            raise ValueError(
                f"{max_waiting_requests} waiting requests (--max-waiting-requests) and {shutdown_timeout} seconds to stop in "
                "(--shutdown-timeout) were given; both must be 0 or more."
            )
        limits = MediaLimits(media_timeout, max_media_mib, max_media_pixels)
        self._media = Media(limits, allowed_media_domains or (), allowed_local_media_path)
        if force_model is not None:
            check_servable(force_model)
        make_classes_known()
        self._in_background = non_blocking
        self._most_waiting, self._shutdown_timeout = max_waiting_requests, shutdown_timeout
        self._trust_clients = trust_clients
        # Else the server runs before this constructor can reach what it is made of; so it calls `start_server`.
        super().__init__(force_model=force_model, non_blocking=True, **options)

    def start_server(self) -> None:
        """What the constructor calls last: the app is complete and not running yet."""
        config = self.server.config
        config.timeout_graceful_shutdown = self._shutdown_timeout
        answer_errors_of_requests(config.app)
        watch_generation(self._generation_state)
        preparation = Preparation(self._media, self._trust_clients)
        for handler in (self._chat_handler, self._response_handler, self._completion_handler):
            preparation.take_over(handler)
        preparation.take_over_decisions(getattr(self, "_systemone_handler", None))  # not in 5.19
        refused = () if self._trust_clients else ADMINISTRATION
        config.app.add_middleware(
            Admission, waiting=self._most_waiting, image_bytes=self._media.limits.bytes, refused_paths=refused
        )
        if self._in_background:
            super().start_server()
        else:
            self.server.run()


def _with_all_options(ours: inspect.Signature, theirs: inspect.Signature) -> inspect.Signature:
    added = [
        value for name, value in ours.parameters.items() if name not in theirs.parameters and name not in ("self", "options")
    ]
    return theirs.replace(parameters=[*theirs.parameters.values(), *added])


# The command line reads its options off this: all of the server's, then ours.
Server.__signature__ = _with_all_options(inspect.signature(Server.__init__), inspect.signature(Serve))


def make_classes_known() -> None:
    """Lets transformers' server load our model types and see that they take images.

    Its `ModelManager` (transformers/cli/serving/model_manager.py, in this the same in 5.19.0 and 5.24.0) asks this dictionary,
    and not the Auto classes, where ours are registered. `_load_model` looks for the model type among its keys, and else for the
    class in transformers itself; `get_model_modality` looks for the class's name among its values. This can go once both ask
    the Auto classes in every release that the package allows: `test_the_server_does_not_know_our_classes_by_itself` notices.
    """
    for family in FAMILIES:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[family.classes.config.model_type] = family.classes.model.__name__
