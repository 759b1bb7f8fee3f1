"""``wcitrain evaluate``: clean, robust and corrupted accuracy of a trained model."""

import argparse
from typing import Any

from wcitrain.commands.options import AT_HELP, TARGET_HELP, add_recipe, source


def add(commands: Any) -> None:
    """Declare the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the robust accuracy of a trained model, or compare two",
        description=(
            "TARGET comes first: options with several values would take it. Measure accuracy in eval mode "
            "and float32, clean and under attacks, with 95 % intervals, after checks of the model under "
            "attack. Writes <at>-<split>.npz (who survived what), .json, and with several radii of a norm "
            ".png (the curve); what differs from the default is appended to the name. Files of the same name "
            "are replaced. A killed command goes on where it was when it is given again. With --compare: "
            "McNemar's test of two such files. One process only."
        ),
    )
    evaluate.add_argument("target", metavar="TARGET", nargs="?", help=TARGET_HELP)
    evaluate.add_argument(
        "--attacks",
        nargs="*",
        default=["pgd-20", "margin-20"],
        metavar="ATTACK",
        help="fgsm, pgd-STEPS, margin-STEPS (cw-STEPS), dlr-STEPS, each with xRESTARTS such as pgd-50x10; "
        "autoattack, autoattack-plus, autoattack-rand, autoattack:apgd-ce+square; nothing for none "
        "(default: pgd-20 margin-20)",
    )
    evaluate.add_argument(
        "--norm", choices=("linf", "l2", "l1"), help="of radii without their own (default: the recipe's)"
    )
    evaluate.add_argument(
        "--eps",
        nargs="+",
        default=[],
        help="radii such as 4/255 8/255, several are a curve; with norms such as linf:8/255 l2:0.5, a union "
        "(default: the recipe's)",
    )
    evaluate.add_argument("--at", metavar="EPOCH", help=AT_HELP)
    evaluate.add_argument(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="images, without augmentation (default: test)",
    )
    evaluate.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="N images at random, the same for every model and seed (default: all, in the split's own order)",
    )
    evaluate.add_argument(
        "--corruptions",
        nargs="+",
        default=[],
        metavar="NAME",
        help="all, or some of the common corruptions such as fog jpeg; five severities each (default: none)",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of random starts and noise (default: 0)")
    add_recipe(evaluate)
    evaluate.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: evaluations/ of the run, or beside the file or export)",
    )
    evaluate.add_argument("--batch-size", type=int, default=200, help="images a pass (default: 200)")
    evaluate.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    evaluate.add_argument(
        "--preflight",
        choices=("raise", "warn", "off"),
        default="raise",
        help="checks of the model: stop at meaningless numbers, only say so, or none (default: raise)",
    )
    evaluate.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.npz", "B.npz"),
        help="compare two evaluations on the same images; no TARGET",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from wcitrain.evaluating_runs import compare_files, evaluate_run

    if (options.target is None) == (options.compare is None):
        got = "neither" if options.target is None else "both"
        raise ValueError(
            f"got {got} of TARGET and --compare; expected one. Give a model as the first word, "
            "before options with several values such as --attacks, or two .npz files."
        )
    if options.compare:
        print(compare_files(*options.compare))
        return 0
    result = evaluate_run(
        options.target,
        attacks=options.attacks,
        norm=options.norm,
        eps=options.eps,
        split=options.split,
        num_examples=options.examples,
        corruptions=options.corruptions,
        seed=options.seed,
        **source(options),
        out=options.out,
        batch_size=options.batch_size,
        device=options.device,
        preflight=options.preflight,
    )
    print(result.text())
    return 0
