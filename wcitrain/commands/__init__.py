"""The commands of ``wcitrain``, one a file: ``add`` declares the options, ``run`` returns the exit status.

Their heavy imports are inside ``run``, so that declaring options costs nothing.
"""

from wcitrain.commands import evaluate, landscape, measure, report, sweep, train

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "measure": measure,
    "landscape": landscape,
    "report": report,
}
