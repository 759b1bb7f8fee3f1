"""The command ``wcitrain``, which is ``python -m wcitrain`` and ``accelerate launch -m wcitrain`` too."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from wcitrain.checkpoint import CheckpointError
from wcitrain.commands import COMMANDS
from wcitrain.monitoring import NonFiniteLossError
from wcitrain.train import Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return 0 (done), 1 (stopped by an error), 2 (wrong input) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(
        prog="wcitrain", description="Robust training with the Weight-Curvature Index as a training knob."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add(commands)
    parser.add_argument("--version", action="version", version=f"wcitrain {version('wcitrain')}")
    options = parser.parse_args(arguments)

    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        status, text = 2, str(error)
    except (CheckpointError, NonFiniteLossError) as error:
        status, text = 1, str(error)
    except Interrupted as stop:
        status, text = 130, str(stop)
    except KeyboardInterrupt:
        status, text = 130, "stopped at once; what was saved before stays."
    print(f"wcitrain {options.command}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
