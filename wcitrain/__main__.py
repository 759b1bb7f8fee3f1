"""``wcitrain`` = ``python -m wcitrain`` = ``accelerate launch -m wcitrain``: train, sweep, evaluate, measure, landscape, report."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from wcitrain.checkpoint import CheckpointError
from wcitrain.commands import COMMANDS
from wcitrain.train import Interrupted, NonFiniteLossError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 stopped by an error, 2 wrong input, 130 interrupted."""
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
        print(f"wcitrain {options.command}: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, NonFiniteLossError) as error:
        print(f"wcitrain {options.command}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"wcitrain {options.command}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"wcitrain {options.command}: stopped at once; what was saved before stays.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
