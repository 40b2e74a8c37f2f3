"""The `knnmoe` command. All but `main` is imported when a command runs, so that Ctrl-C is handled from the start."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv: its words; those of the process by default.

    Returns:
        0 if it went well, 1 for an error (one line on stderr; a traceback with `--debug`), 130 if it was interrupted,
        141 if nobody reads what it prints. Wrong usage exits with 2.
    """
    from knnmoe_hf.cli.interrupts import Interrupts

    command = None
    with Interrupts(ignore_later=argv is None) as interrupts:
        try:
            from knnmoe_hf.cli.command import Command

            command = Command()
            command.run(argv)
            code = 0
        except BaseException as error:
            interrupts.end()
            if interrupts.seen or isinstance(error, KeyboardInterrupt):
                return interrupts.said()
            if command is None:
                raise
            code = command.failed(error)
        interrupts.end()
        return interrupts.said() if interrupts.seen else code
