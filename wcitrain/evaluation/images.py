"""Adversarial images as files, to look at, to check, and to attack another model with (transfer).

A file is in the safetensors format: images [N, C, H, W] in float32, as 8 bits would move them; labels, index
(places in the split) and is_robust [N]; as metadata threat, attack, who was attacked, and the digest of the
clean images. ``images[k]`` belongs to the k-th image of the evaluation, see ``AttackState`` for which it is.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wcitrain.attacks import ThreatModel
from wcitrain.digest import digest
from wcitrain.evaluation.attacking import Stage, Victim, is_right
from wcitrain.evaluation.results import AttackResult, Evaluation, Finding
from wcitrain.params import logits_of

KIND = "wcitrain adversarial images"
TRANSFER = "transfer "  # how names of such attacks begin


def save_images(path: Path, evaluation: Evaluation, result: AttackResult, source: str) -> str:
    """Write the images of one attack on the model called ``source``; return the file's SHA-256."""
    if result.images is None:
        raise ValueError(f"{result.attack}: got no images; expected them. Evaluate with keep_images=True.")
    index = torch.arange(evaluation.num_examples) if evaluation.index is None else evaluation.index
    tensors = {"images": result.images.contiguous(), "labels": evaluation.labels, "index": index.contiguous()}
    about = {"kind": KIND, "threat": json.dumps(asdict(result.threat)), "attack": result.attack}
    partial = path.with_name(f".{path.name}.partial")
    about |= {"source": source, "digest": evaluation.digest, "model": evaluation.settings.get("model", "")}
    metadata = {"about": json.dumps(about, sort_keys=True)}  # one key: the order of several is random
    save_file(tensors | {"is_robust": result.is_robust}, partial, metadata)
    partial.replace(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class Transfer:
    """Adversarial images of another model as an attack: one forward pass, no gradient of this model."""

    name: str
    threat: ThreatModel
    images: Tensor  # [N, *dims]
    digest: str  # of the clean images and labels they were made of
    model: str = ""  # digest of the model they were made on, see ``Victim.digest``

    @classmethod
    def load(cls, path: str | Path) -> "Transfer":
        """Return what ``save_images`` wrote; ValueError for other files."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                images = file.get_tensor("images")
            if about.get("kind") != KIND:
                raise ValueError("no such metadata")
            name = f"{TRANSFER}{about['attack'].removeprefix(TRANSFER)} of {about['source']}"
            threat = ThreatModel(**json.loads(about["threat"]))
            return cls(name, threat, images, about["digest"], about.get("model", ""))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            rule = "adversarial images that --save-images wrote. Check the path."
            raise ValueError(f"--transfer-images: got {path} ({error}); expected {rule}") from error

    def stages(self, victim: Victim, threat: ThreatModel) -> list[Stage]:
        """Return the one stage; ValueError where the images were made of others than the victim's."""
        if digest([victim.x, victim.y]) != self.digest:
            rule = f"the {len(victim.x)} that this model is evaluated on, in their order"
            advice = "Evaluate both models with the same data, --split and --examples."
            got = f"{len(self.images)} images made of other ones"
            raise ValueError(f"{self.name}: got {got}; expected those of {rule}. {advice}")
        return [Stage(self.name, lambda x, y, places: self.images[places].to(x.device))]


@torch.no_grad()
def check_images(victim: Victim, results: list[AttackResult]) -> Iterator[Finding]:
    """Predict the images that are kept anew, in the order of the data: the flags must come out again."""
    for result in results:
        if result.images is None:
            continue
        flags = []
        for places in torch.arange(len(victim.y)).split(victim.batch_size):
            logits = logits_of(victim.model(result.images[places].to(victim.device)))
            flags.append(is_right(logits, victim.y[places].to(victim.device)).cpu())
        if num := int((torch.cat(flags) != result.is_robust).sum()):
            who = f"{result.attack} ({result.threat})"
            text = f"{who}: the model answers otherwise on {num} images that are kept. It is random, or they "
            yield Finding("images_differ", "warning", f"{text}lie on the border; the accuracy is the run's.")
