"""``wcitrain export``: a model of a run as a folder that timm loads, with a card, and on a hub."""

import argparse
import json
from pathlib import Path

from wcitrain import files
from wcitrain.commands.common import writable
from wcitrain.export import check_hub, export_model, push
from wcitrain.export.folder import refuse_taken
from wcitrain.finding import find
from wcitrain.targets import open_run


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    path, home, at, weights, _ = find(options.run, options.at)
    if home is None:
        rule = "a run folder, of training here. Others have a model already."
        raise ValueError(f"{path}: got a model without its run; expected {rule}")
    if weights is None:
        advice = f"Let it finish: wcitrain train --resume {home}"
        raise ValueError(f"{home}: got a run without a model ({at}); expected a finished one. {advice}")
    if options.private and not options.push:
        raise ValueError("--private: got it without --push; expected both. It has no effect here.")
    out = Path(options.folder)
    refuse_taken(out, replace=options.force)
    writable(out)
    if options.push:
        check_hub(options.push, replace=options.force)
    target = open_run(options.run, options.at)
    size = files.read_json(weights / "metadata.json").get("input_size")  # absent in runs of before
    channels, height, width = json.loads(size) if size else target.splits.shape
    names = ("onnx", "torch_export", "license")
    settings = {name: getattr(options, name) for name in names}
    shape = (channels, height, width)
    written = export_model(home, weights, target.recipe, at, shape, out, replace=options.force, **settings)
    print(f"{target.title}: written: {', '.join(map(str, written))}")
    if options.push:
        address = push(out, options.push, private=options.private, replace=options.force)
        print(f"{target.title}: on the hub: {address}")
    return 0
