"""A detector for your own model, from Python: fit, save, load, score, evaluate.

python examples/own_model.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import digits
import torch

import opnp
from opnp.backbones.backbone import from_spec
from opnp.data import images
from opnp.deployment.fit import fit
from opnp.deployment.score import evaluate
from opnp.deployment.settings import FitSettings

MODEL = "digits:Network"  # module:factory, a function or class that gives the untrained model


def main(folder: Path) -> dict[str, Any]:
    """Make a detector in ``folder`` and return how well it does on unseen digits."""
    folder.mkdir(parents=True, exist_ok=True)

    # What you have: weights, and images in folders named like the classes.
    torch.save(digits.trained().state_dict(), folder / "weights.pt")
    digits.write_images(folder)

    # Fit: the pruned weights and neurons and the threshold are chosen on validation images.
    backbone = from_spec(MODEL, folder / "weights.pt", digits.PREPROCESSING, digits.CLASSES)
    train, validation = images.find(folder / "train"), images.find(folder / "validation")
    settings = FitSettings(clip=(None, 90), temperature=(1.0,))  # 2,912 masks, to save time
    detector = fit(backbone, train, validation, folder / "features", settings)
    detector.save(folder / "detector")

    # Load: the folder never chooses the code that runs, so its reader names the model's factory.
    detector = opnp.load(folder / "detector", trust=MODEL)
    pictures = [min(folder.glob(f"{name}/**/*.png")) for name in ("test", *digits.OOD)]
    found = detector.score(pictures)
    for path, score, is_ood, predicted in zip(
        pictures, found.score, found.is_ood, found.predicted, strict=True
    ):
        verdict = "unlike the training images" if is_ood else predicted
        print(f"{path.relative_to(folder)}: score {score:.2f}, {verdict}")

    # Evaluate: images that the fit has not seen, and real OOD images.
    unlike = {name: images.find(folder / name) for name in digits.OOD}
    result = evaluate(detector, images.find(folder / "test"), unlike)
    print(f"{result['id']['flagged']:.1f} % of the ID test images are flagged as OOD")
    for name, found_in in (*result["ood"].items(), ("mean", result["mean"])):
        fpr95, plain = found_in["fpr95"], found_in["energy"]["fpr95"]
        flagged = found_in["flagged"]
        print(f"{name}: {flagged:.1f} % flagged, FPR95 {fpr95:.1f} % (unpruned {plain:.1f} %)")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="opnp-")))
