"""The command line `hivtp`."""

import signal
import sys

import typer
from huggingface_hub.errors import HfHubHTTPError

from .command_analyze import analyze
from .command_bundle import bundle
from .command_compare import compare
from .command_convert import convert
from .command_evaluate import evaluate
from .command_inspect import inspect
from .command_methods import methods
from .command_push import push
from .command_serve import PASSED_ON, serve
from .command_tune import tune
from .command_visualize import visualize

app = typer.Typer(
    name="hivtp",
    help="Visual token pruning for LLaVA checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(analyze)
app.command()(bundle)
app.command()(compare)
app.command()(convert)
app.command()(evaluate)
app.command()(inspect)
app.command()(methods)
app.command()(push)
app.command(add_help_option=False, context_settings=PASSED_ON)(serve)
app.command()(tune)
app.command()(visualize)


def main() -> None:
    """Runs the command line; what a user can mend is one message and the exit status 1, without a traceback."""
    # Ended from outside, it takes unfinished folders away as well.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"hivtp: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
