"""The report of a run: figures and plots, made from what its folder holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dst import tracking
from dst.config import Config, from_json
from dst.growing import strategy_name
from dst.progress import print_rows
from dst.topology import Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """The figures of a finished run.

    density: share of all linear and convolutional weights that is alive. *_flops: of one image
    forward, and of the whole training. explored_share: R_s, share of the sparse layers'
    connections that was ever alive. *_seconds: of all attempts of a resumed run together.
    """

    test_accuracy: float
    test_loss: float
    density: float
    weights: int
    dense_weights: int
    inference_flops: int
    dense_inference_flops: int
    training_flops: int
    dense_training_flops: int
    explored_share: float
    growth_seconds: float
    wall_seconds: float

    def rows(self) -> dict[str, str]:
        """As a table of words."""
        return {
            "test accuracy": f"{self.test_accuracy:.2%}",
            "density in weights": (
                f"{self.density:.4f} ({self.weights:,} of {self.dense_weights:,})"
            ),
            "inference FLOPs": _against(self.inference_flops, self.dense_inference_flops),
            "training FLOPs": _against(self.training_flops, self.dense_training_flops),
            "connections ever explored (R_s)": f"{self.explored_share:.2%}",
            "time in growth": (
                f"{self.growth_seconds:.2f} s "
                f"({self.growth_seconds / max(1e-9, self.wall_seconds):.2%} of the wall time)"
            ),
            "wall time": f"{self.wall_seconds:.1f} s",
        }


def announce(console: Console, summary: Summary, report: Path) -> None:
    """The last words of a run."""
    print_rows(console, "Result", summary.rows())
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def announce_choices(console: Console, searches: Mapping[str, Search]) -> None:
    """What growth decided for which number of layers, and the reason that it gives for the first of
    them; nothing where it decides nothing."""
    chosen: dict[str, list[Search]] = {}
    for search in searches.values():
        if search.choice is not None:
            chosen.setdefault(search.choice, []).append(search)
    for choice, own in chosen.items():
        why = own[0].report.get("why")
        layers = f"{len(own)} layer{'s' * (len(own) > 1)}"
        console.print(
            f"growth: {choice} for {layers}{f' ({why})' if why else ''}",
            highlight=False,
            soft_wrap=True,
        )


def write(folder: Path) -> Path:
    """Make ``report.md`` and its plots from ``config.json`` and ``metrics.jsonl``; its path.

    Raises InputError for a config that cannot be read, ValueError for a run that is not finished.
    """
    config = from_json(folder / "config.json")
    lines = tracking.read(folder)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    updates = [line for line in lines if line["kind"] == "update"]
    audits = [line for line in lines if line["kind"] == "audit"]
    phases = [line for line in lines if line["kind"] == "phase"]
    curves = [line for line in lines if line["kind"] == "curve"]
    finals = [line for line in lines if line["kind"] == "final"]
    if not finals:
        raise ValueError(f"the run in {folder} is not finished")
    final = {k: v for k, v in finals[-1].items() if k not in ("kind", "step")}
    summary = Summary(**final)
    plots = {
        "loss and accuracy": _plot(folder, "accuracy.png", 2, lambda a: _curves(a, epochs)),
        "density per layer": _plot(folder, "density.png", 1, lambda a: _density(a, epochs)),
    }
    if len({line["density"] for line in updates}) > 1:
        plots["density over the run"] = _plot(folder, "ramp.png", 1, lambda a: _ramp(a, updates))
    if updates:
        plots["explored connections"] = _plot(
            folder, "explored.png", 1, lambda a: _explored(a, updates)
        )
        plots["connections changed per update"] = _plot(
            folder, "changed.png", 1, lambda a: _changed(a, updates)
        )
    if any("beta" in line for line in epochs):
        plots["ordinary sum left"] = _plot(folder, "beta.png", 1, lambda a: _beta(a, epochs))
    if curves:
        plots["accuracy after pruning"] = _plot(folder, "curve.png", 2, lambda a: _curve(a, curves))
    if audits:
        plots["growth audit"] = _plot(folder, "audit.png", 1, lambda a: _audit(a, audits))
    plots["where the time went"] = _plot(folder, "time.png", 1, lambda a: _time(a, epochs))
    report = folder / "report.md"
    report.write_text(
        _markdown(config, summary, epochs[-1]["epoch"], phases, updates, audits, plots)
    )
    return report


def _markdown(
    config: Config,
    summary: Summary,
    epochs: int,
    phases: Lines,
    updates: Lines,
    audits: Lines,
    plots: dict[str, str],
) -> str:
    parts = [
        f"# {config.run.name}\n",
        f"{config.method} · {config.model} · {config.data.data} · density {summary.density:.4f} · "
        f"{epochs} epochs · seed {config.run.seed}\n",
        "The accuracy is that of the last epoch, measured on the test split; nothing was chosen on "
        "it.\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in summary.rows().items()),
    ]
    if updates:
        seconds = sum(sum(line["time"].values()) for line in updates)
        parts.append(
            f"| topology updates | {len(updates)}, {1000 * seconds / len(updates):.1f} ms each |"
        )
        parts.append(f"| growth | {_searches(strategy_name(config) or '', updates)} |")
    if audits:
        parts.append(f"| growth audit | {_audited(audits)} |")
    parts += _phases(phases)
    for title, file in plots.items():
        parts.append(f"\n## {title.capitalize()}\n\n![{title}]({file})")
    parts.append("\nAll settings: [config.json](config.json); all figures: "
                 "[metrics.jsonl](metrics.jsonl).")  # fmt: skip
    return "\n".join(parts) + "\n"


def _phases(phases: Lines) -> list[str]:
    """What each phase of a recipe came to."""
    if not phases:
        return []
    rows = ["\n## Phases\n", "| | validation | test | weights | FLOPs an image | FLOPs so far |"]
    rows.append("|---|---|---|---|---|---|")
    for line in phases:
        val = f"{line['val']['accuracy']:.2%}" if "val" in line else ""
        rows.append(
            f"| {line['phase']} | {val} | {line['test']['accuracy']:.2%} | {line['weights']:,} "
            f"| {_readable(line['inference_flops'])} | {_readable(line['training_flops'])} |"
        )
    return rows


def _searches(strategy: str, updates: Lines) -> str:
    """Which search served which layers at last, and the least recall that any of the run estimated
    of itself."""
    last: dict[str, dict[str, Any]] = {}
    for line in updates:
        # Where nothing is grown any more, nothing is searched.
        last |= {name: report for name, report in line["search"].items() if report}
    served: dict[str, list[str]] = {}
    for name, report in last.items():
        served.setdefault(report.get("search", strategy), []).append(name)
    words = [f"{how} for {_some(names)}" for how, names in served.items()]
    recalls = [
        report["recall"]
        for line in updates
        for report in line["search"].values()
        if report.get("recall") is not None
    ]
    if recalls:
        words.append(f"smallest estimated recall {min(recalls):.3f}")
    return "; ".join(words) or strategy


def _some(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} layers ({', '.join(names[:2])}, ...)"
    return ", ".join(names)


def _audited(audits: Lines) -> str:
    """The audits of a run in half a line."""
    of_layers = [item for line in audits for item in line["quality"].items()]
    least, worst = min((quality["recall"], name) for name, quality in of_layers)
    recall = sum(quality["recall"] for _, quality in of_layers) / len(of_layers)
    masses = [quality["mass"] for _, quality in of_layers if quality["mass"] is not None]
    times = [own for line in audits for own in line["time"].values()]
    seconds, reference = (
        sum(own[key] for own in times) for key in ("seconds", "reference_seconds")
    )
    words = [
        f"{len(audits)} update{'s' * (len(audits) > 1)} against the exact search: "
        f"mean recall {recall:.3f} (least {least:.3f}, {worst}), "
        f"mass {sum(masses) / max(1, len(masses)):.3f}, "
        f"{seconds / max(1e-9, reference):.2f} x its time"
    ]
    memory = [own["memory"] for own in times if own["memory"] is not None]
    if memory:
        words.append(f"at most {max(memory) / 1e6:.1f} MB more memory")
    return ", ".join(words)


def _plot(folder: Path, name: str, panels: int, draw: Callable[[list[Axes]], None]) -> str:
    # Not pyplot: no global state, no display, safe inside anybody's process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * panels + 2.5, 4), layout="constrained")
    draw(list(figure.subplots(1, panels, squeeze=False)[0]))
    figure.savefig(folder / name, dpi=120)
    return name


def _over_epochs(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(axes: list[Axes], epochs: Lines) -> None:
    at = [line["epoch"] for line in epochs]
    for axis, what in zip(axes, ("loss", "accuracy"), strict=True):
        for split in ("train", "val"):
            if all(split in line for line in epochs):
                axis.plot(at, [line[split][what] for line in epochs], marker=".", label=split)
        _over_epochs(axis)
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
        axis.legend()


def _density(axes: list[Axes], epochs: Lines) -> None:
    densities = epochs[-1]["density"]
    axis = axes[0]
    axis.barh(range(len(densities)), list(densities.values()))
    axis.set_yticks(range(len(densities)), list(densities), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the weights alive at the end")
    axis.grid(alpha=0.3, axis="x")


def _ramp(axes: list[Axes], updates: Lines) -> None:
    axis = axes[0]
    axis.plot([line["step"] for line in updates], [line["density"] for line in updates], marker=".")
    axis.set_xlabel("step")
    axis.set_ylabel("share of all weights alive after the update")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _beta(axes: list[Axes], epochs: Lines) -> None:
    axis = axes[0]
    own = [line for line in epochs if "beta" in line]
    # What an epoch ends with; the first one begins with the sum alone.
    at, betas = [line["epoch"] for line in own], [line["beta"] for line in own]
    axis.plot([0, *at], [1, *betas], marker=".")
    _over_epochs(axis)
    axis.set_ylabel("share of the ordinary sum (beta)")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)


def _curve(axes: list[Axes], curves: Lines) -> None:
    scores = list(dict.fromkeys(line["score"] for line in curves))
    for axis, scope in zip(axes, ("local", "global"), strict=True):
        for score in scores:
            own = sorted(
                (line["keep"], line["test"]["accuracy"])
                for line in curves
                if (line["score"], line["scope"]) == (score, scope)
            )
            axis.plot(*zip(*own, strict=True), marker=".", label=score)
        axis.set_xscale("log")
        axis.set_xlabel(f"share of the weights kept, {scope}")
        axis.set_ylabel("test accuracy, nothing trained after")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)


def _explored(axes: list[Axes], updates: Lines) -> None:
    axis = axes[0]
    at = [line["step"] for line in updates]
    for name in updates[-1]["explored"]:
        axis.plot(at, [line["explored"][name] for line in updates], color="0.75", linewidth=0.8)
    axis.plot(at, [line["explored_share"] for line in updates], marker=".", label="all layers")
    axis.plot([], [], color="0.75", label="each layer")
    axis.set_xlabel("step")
    axis.set_ylabel("share of connections ever alive (R_s)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()


def _changed(axes: list[Axes], updates: Lines) -> None:
    axis = axes[0]
    at = [line["step"] for line in updates]
    axis.bar(at, [sum(line["grown"].values()) for line in updates], width=0.7 * at[0])
    axis.set_xlabel("step")
    axis.set_ylabel("connections newly grown")
    axis.grid(alpha=0.3, axis="y")


def _audit(axes: list[Axes], audits: Lines) -> None:
    axis = axes[0]
    names = list(audits[-1]["quality"])
    for name in names:
        at = [line["step"] for line in audits if name in line["quality"]]
        recall = [line["quality"][name]["recall"] for line in audits if name in line["quality"]]
        axis.plot(at, recall, marker=".", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("recall of each layer")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    # A legend of many layers would cover the plot.
    if len(names) <= 12:
        axis.legend(fontsize=7)


def _time(axes: list[Axes], epochs: Lines) -> None:
    seconds = dict(sorted(epochs[-1]["time"].items(), key=lambda item: item[1]))
    total = sum(seconds.values())
    axis = axes[0]
    bars = axis.barh(list(seconds), list(seconds.values()))
    axis.bar_label(bars, [f"{value / total:.1%}" for value in seconds.values()], padding=3)
    axis.set_xlabel("seconds")
    axis.margins(x=0.15)


def _against(flops: int, dense: int) -> str:
    return f"{flops / max(1, dense):.3f} of dense ({_readable(flops)} of {_readable(dense)})"


def _readable(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"
