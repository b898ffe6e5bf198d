"""The runs behind docs/results.md: groups of variants of one training program, over seeds."""

from __future__ import annotations

from typing import Any, NamedTuple

METHODS = ("static", "set", "rigl", "snfs", "similarity")

# Similarity search with RigL's schedule in place of its own, and with the vectors of ten steps
# searched together. By the name in a variant: the name on the page, and the flags.
_RIGL_SCHEDULE = ("--update-interval=100", "--update-fraction=0.3")
FURTHER = {
    "similarity30": ("similarity, RigL's schedule", _RIGL_SCHEDULE),
    "similarity30x10": (
        "similarity, RigL's schedule, over 10 steps",
        (*_RIGL_SCHEDULE, "--update-average=10"),
    ),
}


class Group(NamedTuple):
    """Runs that are compared with each other.

    flags: of train.py, common to all. variants: what differs, by name. seeds: how many.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]
    seeds: int


class Job(NamedTuple):
    """One run. name: also that of its folder, and of its JSON file below docs/results."""

    group: str
    variant: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def made(self, result: dict[str, Any]) -> bool:
        """Whether what a result file holds is of this job: of the same flags, in any order."""
        return sorted(result.get("flags", [])) == sorted(self.flags)


def _compared(densities: tuple[float, ...], methods: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Every sparse method at every density; the dense network once."""
    variants = {"dense": ("--method=dense",)} if "dense" in methods else {}
    for density in densities:
        for method in methods:
            if method in FURTHER:
                flags = ("--method=similarity", *FURTHER[method][1])
            elif method != "dense":
                flags = (f"--method={method}",)
            else:
                continue
            variants[f"{method}-{density}"] = (*flags, f"--density={density}")
    return variants


def _thesis() -> dict[str, tuple[str, ...]]:
    """Rows of tables 3.1 to 3.3 that search by brute force, exactly."""
    common = {"dense": ("--method=dense",), "static": ("--method=static",)}
    searched = {
        f"{table}-{share}": (f"--preset={preset}", f"--update-fraction={share}", metric)
        for table, preset, metric in (
            ("step-abs-ip", "similarity-step", "--growth.metric=abs-ip"),
            ("step-l2", "similarity-step", "--growth.metric=l2"),
            ("epoch-abs-ip", "similarity-epoch", "--growth.metric=abs-ip"),
        )
        for share in (0.01, 0.05, 0.1)
    }
    return {
        **{name: ("--preset=similarity-step", *flags) for name, flags in common.items()},
        **searched,
    }


def _thesis_indexes() -> dict[str, tuple[str, ...]]:
    """Rows of tables 3.1 to 3.5 that search by an index of faiss, and what 3.5 compares with."""
    step, epoch = "--preset=similarity-step", "--preset=similarity-epoch"
    faiss = ("--growth=faiss", "--growth.index=flat")
    rows = {
        f"{table}-faiss{k}-{share}": (
            preset,
            *faiss,
            f"--growth.k-similar={k}",
            f"--update-fraction={share}",
            metric,
        )
        for table, preset, metric, neighbours in (
            ("step-abs-ip", step, "--growth.metric=abs-ip", (0.15, 0.125)),
            ("step-l2", step, "--growth.metric=l2", (0.15, 0.2)),
            ("epoch-abs-ip", epoch, "--growth.metric=abs-ip", (0.15, 0.125)),
        )
        for k in neighbours
        for share in (0.01, 0.05, 0.1)
    }
    hashed = ("--growth=faiss", "--growth.index=lsh", "--growth.k-similar=0.15")
    hashes = {
        f"lsh-{density}-{share}-{bits}": (
            step,
            *hashed,
            f"--growth.bits={bits}",
            f"--density={density}",
            f"--update-fraction={share}",
        )
        for density, share, several in (
            (0.2, 0.05, (0.5, 1, 1.5, 2, 4, 8)),
            (0.1, 0.01, (0.5, 1, 1.5, 2)),
            (0.1, 0.025, (0.5, 1, 1.5, 2)),
        )
        for bits in several
    }
    return {
        "static-0.1": (step, "--method=static", "--density=0.1"),
        **rows,
        **hashes,
    }


# Every way to search, by the name in a variant, and what it is called on the page.
STRATEGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "exact": ("exact", ("--growth=exact",)),
    "dense": ("dense", ("--growth=dense",)),
    "auto": ("auto", ("--growth=auto",)),
    "blocks": ("blocks (of 1)", ("--growth=blocks",)),
    "lowrank": ("lowrank", ("--growth=lowrank",)),
    "pool": ("pool (linear layers: exact)", ("--growth=pool",)),
    "faiss-flat": ("faiss, flat, k .15", ("--growth=faiss",)),
    "faiss-range": ("faiss, range", ("--growth=faiss", "--growth.index=range")),
    "faiss-ivf": ("faiss, IVF, k .15", ("--growth=faiss", "--growth.index=ivf")),
    "faiss-hnsw": ("faiss, HNSW, k .15", ("--growth=faiss", "--growth.index=hnsw")),
    "faiss-lsh": ("faiss, LSH, 2 bits, k .15", ("--growth=faiss", "--growth.index=lsh")),
    "nmslib-hnsw": ("nmslib, HNSW, k .15", ("--growth=nmslib",)),
    "nmslib-brute": (
        "nmslib, brute force, k .15",
        ("--growth=nmslib", "--growth.index=brute-force"),
    ),
    "subblock": ("subblock, .35", ("--growth=subblock",)),
    "gse-uniform": ("gse, uniform", ("--growth=gse", "--growth.sampling=uniform")),
    "gse-norm": ("gse, norm", ("--growth=gse", "--growth.sampling=norm")),
    "gse-sign": ("gse, sign", ("--growth=gse", "--growth.sampling=sign")),
    "random": ("random", ("--growth=random",)),
    "momentum": ("momentum (dense matrices)", ("--growth=momentum",)),
    "averaged": ("averaged, rank 32, decay .9", ("--growth=averaged",)),
    "averaged8": (
        "averaged, rank 8, decay .9",
        ("--growth=exact", "--update-average-rank=8"),
    ),
}


def _strategies() -> dict[str, tuple[str, ...]]:
    return {
        "static": ("--method=static",),
        **{name: ("--method=similarity", *flags) for name, (_, flags) in STRATEGIES.items()},
    }


# Both make about 1,100 steps of 64.
_MNIST = ("--model=mlp-300-100", "--data=mnist-5k", "--epochs=20")
_STROKES = ("--model=mlp-300-100", "--data=strokes", "--epochs=10", "--lr=0.05")

GROUPS = {
    group.name: group
    for group in (
        Group(
            "mlp-mnist-5k",
            "MLP 784-300-100-10 on mnist-5k",
            _MNIST,
            _compared((0.1, 0.05, 0.02), ("dense", *METHODS, *FURTHER)),
            seeds=5,
        ),
        Group(
            "mlp-strokes",
            "MLP 784-300-100-10 on strokes",
            _STROKES,
            _compared((0.1, 0.05, 0.02), ("dense", *METHODS, *FURTHER)),
            seeds=5,
        ),
        Group(
            "wrn-10-1-mnist-5k",
            "WideResNet-10-1 on mnist-5k",
            ("--model=wrn-10-1", "--data=mnist-5k", "--epochs=8"),
            _compared((0.1, 0.05), ("dense", *METHODS)),
            seeds=3,
        ),
        Group(
            "thesis",
            "The thesis' protocol: WideResNet-10-1 on mnist-5k, 8 epochs of batch 256",
            ("--model=wrn-10-1", "--data=mnist-5k", "--epochs=8"),
            _thesis(),
            seeds=3,
        ),
        Group(
            "thesis-indexes",
            "The thesis' protocol with its indexes",
            ("--model=wrn-10-1", "--data=mnist-5k", "--epochs=8"),
            _thesis_indexes(),
            seeds=1,
        ),
        Group(
            "growth-mlp",
            "Every growth strategy on one network: MLP 784-300-100-10 on mnist-5k, density 0.1",
            (*_MNIST, "--density=0.1", "--update-interval=100", "--update-fraction=0.3"),
            _strategies(),
            seeds=5,
        ),
        Group(
            "alexnet-small-mnist-5k",
            "AlexNet with a small stem on mnist-5k",
            (
                "--model=alexnet-small",
                "--data=mnist-5k",
                "--epochs=2",
                "--optimizer=adam",
                "--lr=5e-4",
                "--weight-decay=0",
                # 112 steps are too few for the papers' intervals.
                "--update-interval=20",
            ),
            _compared((0.1,), ("static", "rigl", "similarity")),
            seeds=3,
        ),
    )
}


def jobs(groups: list[str]) -> list[Job]:
    """All runs of these groups, every variant's first seed before any second one."""
    return [
        Job(name, variant, seed, (*GROUPS[name].flags, *flags, f"--seed={seed}"))
        for name in groups
        for seed in range(GROUPS[name].seeds)
        for variant, flags in GROUPS[name].variants.items()
    ]
