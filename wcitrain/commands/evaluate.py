"""``wcitrain evaluate``: clean, robust and corrupted accuracy of a trained model."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the robust accuracy of a trained model, or compare two",
        description=(
            "Measure accuracy in eval mode and float32, clean and under attacks, with 95 % intervals, after checks of the model "
            "under attack. Writes <at>-<split>.npz (who survived what), .json, and with several radii .png (the curve); what "
            "differs from the default is appended to the name. Files of the same name are replaced. A killed command goes on "
            "where it was when it is given again. With --compare: McNemar's test of two such files. One process only."
        ),
    )
    evaluate.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="a run folder; an exported model folder (runs/NAME-s0/model/last); or a file .pt, .pth or .safetensors with a state "
        "dict of the model or of its timm backbone, with --recipe",
    )
    evaluate.add_argument(
        "--attacks",
        nargs="*",
        default=["pgd-20", "margin-20"],
        metavar="ATTACK",
        help="fgsm, pgd-STEPS, margin-STEPS (cw-STEPS), dlr-STEPS, each with xRESTARTS such as pgd-50x10; autoattack, "
        "autoattack-plus, autoattack-rand, autoattack:apgd-ce+square; nothing for none (default: pgd-20 margin-20)",
    )
    evaluate.add_argument("--norm", choices=("linf", "l2", "l1"), help="of the threat (default: the recipe's)")
    evaluate.add_argument(
        "--eps", nargs="+", default=[], help="radii such as 4/255 8/255; several are a curve (default: the recipe's)"
    )
    evaluate.add_argument("--at", metavar="EPOCH", help="last (default), best, or a number of an epoch that a run kept")
    evaluate.add_argument(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="images, in the split's own order and without augmentation (default: test)",
    )
    evaluate.add_argument("--examples", type=int, metavar="N", help="the first N images (default: all)")
    evaluate.add_argument(
        "--corruptions",
        nargs="+",
        default=[],
        metavar="NAME",
        help="all, or some of the common corruptions such as fog jpeg; five severities each (default: none)",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of random starts and noise (default: 0)")
    evaluate.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="recipe that says data, model and threat (default: the run's own), and settings that override it",
    )
    evaluate.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: evaluations/ of the run, or beside the file or export)",
    )
    evaluate.add_argument("--batch-size", type=int, default=200, help="images a pass (default: 200)")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    evaluate.add_argument(
        "--preflight",
        choices=("raise", "warn", "off"),
        default="raise",
        help="checks of the model: stop at what makes the numbers meaningless, only say so, or none (default: raise)",
    )
    evaluate.add_argument(
        "--compare", nargs=2, metavar=("A.npz", "B.npz"), help="compare two evaluations on the same images; no TARGET"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.evaluating_runs import compare_files, evaluate_run

    if (options.target is None) == (options.compare is None):
        got = "neither" if options.target is None else "both"
        raise ValueError(f"got {got} of TARGET and --compare; expected one. Give a model, or two .npz files.")
    if options.compare:
        print(compare_files(*options.compare))
        return 0
    recipe = [text for text in options.recipe if "=" not in text]
    if len(recipe) > 1:
        raise ValueError(
            f"--recipe: got {len(recipe)} files ({', '.join(recipe)}); expected one. Settings are key=value."
        )
    result = evaluate_run(
        options.target,
        attacks=options.attacks,
        norm=options.norm,
        eps=options.eps,
        at=options.at,
        split=options.split,
        num_examples=options.examples,
        corruptions=options.corruptions,
        seed=options.seed,
        recipe=recipe[0] if recipe else None,
        settings=[text for text in options.recipe if "=" in text],
        out=options.out,
        batch_size=options.batch_size,
        device=options.device,
        preflight=options.preflight,
    )
    print(result.text())
    return 0
