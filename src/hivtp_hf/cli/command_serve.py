"""`hivtp serve`."""

import inspect

import typer

# Its options are the server's: taken as they come, and read by the server's own command.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def serve(context: typer.Context) -> None:
    """Serve pruned checkpoints over HTTP, as OpenAI's API: transformers' own server, with all of its options.

    Without a checkpoint, they are loaded when a request names them.
    """
    from ..serving import Server  # an import that only this command needs

    # Plain, as transformers has it: markup would take what its text has in brackets away.
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(help=f"{inspect.getdoc(serve)}\n\n{inspect.getdoc(Server.__base__)}")(Server)
    command = typer.main.get_command(app)
    status = command.main(args=context.args, prog_name=context.command_path, standalone_mode=False)
    raise typer.Exit(status if isinstance(status, int) else 0)
