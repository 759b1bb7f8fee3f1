"""The command ``wcitrain``, which is ``python -m wcitrain`` and ``accelerate launch -m wcitrain`` too."""

import importlib
import os
import sys
from collections.abc import Sequence

from wcitrain.commands.options import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return 0 (done), 1 (stopped by an error), 2 (wrong input) or 130 (interrupted)."""
    declared = parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks how a line may go on
        import argcomplete

        argcomplete.autocomplete(declared)
    options, rest = declared.parse_known_args(arguments)
    place = {"train": "recipe", "sweep": "settings"}.get(options.command, "")
    if rest and (not place or any(text.startswith("-") for text in rest)):
        declared.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings after an option, which argparse does not give to what stood before it
        setattr(options, place, getattr(options, place) + rest)
    try:
        return importlib.import_module(f"wcitrain.commands.{options.command}").run(options)
    except BrokenPipeError:  # `wcitrain list measures | head`: who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        status, text = 130, "stopped at once; what was saved before stays."
    except (ValueError, OSError, ModuleNotFoundError) as error:
        status, text = 2, str(error)
    except Exception as error:
        if not hasattr(error, "exit_status"):
            raise
        status, text = error.exit_status, str(error)
    print(f"wcitrain {options.command}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
