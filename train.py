"""Train a sparse network: ``python train.py --help``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

import tyro

try:
    from dst import presets
    from dst.config import Config, from_json
    from dst.errors import StoppedError
    from dst.training import run
    from growth import InputError
except ImportError as error:
    # A library that is missing, or another project's package of the same name: both say what to do.
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(2)

# What may differ between a run and its continuation.
CHANGES_ON_RESUME = {"resume", "device", "data_dir", "workers", "threads", "wandb"}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    try:
        run(parse(sys.argv[1:]))
    except InputError as error:
        fail(str(error), 2)
    except StoppedError as error:
        fail(str(error), 1)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has closed it; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: list[str]) -> Config:
    """Flags on top of the defaults, of ``--preset NAME``, of ``--config FILE``, or of the run that
    ``--resume`` names."""
    config = parse_flags(argv, Config())
    if config.preset is not None and config.run.config is not None:
        raise InputError(
            f"--preset={config.preset} and --config={config.run.config} both say what the other "
            "flags start from: give one of them"
        )
    if config.run.resume is not None:
        folder = Path(config.run.resume)
        if not os.path.isfile(folder / "config.json"):
            raise InputError(f"cannot resume {folder}: it is not the folder of a run")
        stored = from_json(folder / "config.json")
        config = parse_flags(argv, stored)
        changed = differences(dataclasses.asdict(stored), dataclasses.asdict(config))
        if forbidden := sorted(changed - CHANGES_ON_RESUME):
            raise InputError(
                f"--resume continues {folder} as it was: it cannot change {', '.join(forbidden)}; "
                f"for a new run use --config {folder / 'config.json'}"
            )
    elif config.run.config is not None:
        stored = from_json(config.run.config)
        # The stored name is that of the run it came from.
        unnamed = dataclasses.replace(stored.run, name=None)
        config = parse_flags(argv, dataclasses.replace(stored, run=unnamed))
    elif config.preset is not None:
        config = parse_flags(argv, presets.apply(config.preset, Config()))
    return config


def parse_flags(argv: list[str], default: Config) -> Config:
    """What tyro makes of the flags; its complaints, a box of several lines, become one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Config, args=boolean_flags(argv), default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"[^\x20-\x7e]+|-{3,}", " ", complaint.getvalue())
        words = re.sub(r"\s*For full helptext.*", "", " ".join(words.split()))
        # The box's title may say what its first words say again.
        raise InputError(re.sub(r"^(.{5,}) (?=\1)", "", words)) from None


def boolean_flags(argv: list[str]) -> list[str]:
    """``--x=true`` and ``--x true``, as W&B sweeps pass them, in the words that tyro expects:
    ``--x`` and ``--no-x``, or True and False where the option may also be left open."""
    kinds = option_types(Config)
    flags: list[str] = []
    for word in argv:
        flag, _, value = word.rpartition("=")
        if not flag and flags:
            flag = flags[-1]
        kind = kinds.get(flag.removeprefix("--").replace("-", "_"))
        if value.lower() not in ("true", "false") or kind not in (bool, bool | None):
            flags.append(word)
            continue
        if "=" not in word:
            flags.pop()
        if kind is bool:
            flags.append(flag if value.lower() == "true" else f"--no-{flag[2:]}")
        else:
            flags += [flag, value.capitalize()]
    return flags


def option_types(kind: Any) -> dict[str, object]:
    """Type of every option by its field's name."""
    types: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        types.update(option_types(hint) if dataclasses.is_dataclass(hint) else {name: hint})
    return types


def differences(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    changed = set()
    for name, value in old.items():
        if isinstance(value, dict):
            changed |= differences(value, new[name])
        elif value != new[name]:
            changed.add(name)
    return changed


def fail(message: str, status: int) -> NoReturn:
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
