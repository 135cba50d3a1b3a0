"""What the scripts share that take tucker-cnn's configuration files; see docs/configuration.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnslim.cli import main
from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError, NNSlimError
from nnslim.files import read_yaml


def is_config(arguments: list[str]) -> bool:
    """Whether a command line begins with a configuration file, as tucker-cnn's do."""
    return bool(arguments) and Path(arguments[0]).suffix in (".yml", ".yaml", ".json")


def read_config(path: str, *needed: str) -> dict[str, Any]:
    """Return the content of a file, or raise a ConfigError: it cannot be read, lacks a key, or has an unknown one."""
    content = read_yaml(Path(path), ConfigError)
    if missing := [key for key in needed if not isinstance(content, dict) or content.get(key) is None]:
        raise ConfigError(f"{path}: this script needs {', '.join(missing)}; without a configuration it takes options")
    from_dict({"tucker_config": {}, **content}, path)
    return content


def nnslim(*arguments: object) -> None:
    """Run a command of nnslim; it ends the process unless all went well."""
    sys.argv[1:] = list(map(str, arguments))
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def run(command: str, translated: Callable[[list[str]], None]) -> None:
    """Run a script: by a configuration of tucker-cnn where the first argument is one, else as `nnslim <command>`."""
    given = sys.argv[1:]
    if not is_config(given):
        return nnslim(command, *given)
    try:
        translated(given)
    except NNSlimError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
