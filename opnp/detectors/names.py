"""The detectors by key, and the names that papers give them."""

__all__ = ["detector_name", "ours"]


NAMES = {
    "msp": "MSP",
    "maxlogit": "MaxLogit",
    "energy": "Energy",
    "gen": "GEN",
    "klmatching": "KL matching",
    "react": "ReAct",
    "dice": "DICE",
    "ash": "ASH",
    "scale": "SCALE",
    "vra": "VRA",
    "she": "SHE",
    "knn": "KNN",
    "mahalanobis": "Mahalanobis",
    "rmd": "RMD",
    "vim": "ViM",
    "gmm": "GMM",
    "fdbd": "fDBD",
    "nci": "NCI",
    "nnguide": "NNGuide",
    "lts": "LTS",
    "openmax": "OpenMax",
    "nero": "NERO",
    "odin": "ODIN",
    "gradnorm": "GradNorm",
    "rankfeat": "RankFeat",
    "nac": "NAC",
    "opp": "OPP",
    "onp": "ONP",
    "opnp": "OPNP",
}


def detector_name(name: str) -> str:
    """A detector as papers write it; one that has no such name here keeps its own."""
    return "+".join(NAMES.get(part, part) for part in name.split("+"))


def ours(name: str) -> bool:
    """Whether a detector prunes by sensitivity: OPP, ONP, OPNP, or one combined with it."""
    return name.partition("+")[0] in ("opp", "onp", "opnp")
