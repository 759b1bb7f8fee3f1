"""The commands of ``wcitrain``, one a file: ``add(commands)`` declares its options, ``run(options)`` returns the exit status.

Their heavy imports are inside ``run``: ``--help`` needs no torch.
"""

from wcitrain.commands import measure, report, sweep, train

COMMANDS = {"train": train, "sweep": sweep, "measure": measure, "report": report}

__all__ = ["COMMANDS"]
