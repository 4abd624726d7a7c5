"""Configurations: presets in a file, overrides on the command line."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rlib.experiment.errors import UsageError, unknown

#: Keys that do not change what a run computes: a work directory may be continued with others.
#: Where the number of devices does, the configuration has a key of its own for it.
NO_IDENTITY = ("mesh", "expected")


def apply_preset(
    base: Mapping[str, Any], presets: Mapping[str, Mapping], preset: str
) -> ConfigDict:
    """The base configuration with one preset's changes.

    Args:
        base: the nested default configuration.
        presets: name -> changes, nested or with dotted keys.
        preset: one of the names.

    Raises:
        UsageError: an unknown preset, or a key that the configuration lacks.

    >>> apply_preset({"model": {"width": 64}}, {"smoke": {"model.width": 8}}, "smoke").model.width
    8
    """
    if preset not in presets:
        raise unknown("preset", preset, presets)
    config = ConfigDict(base)
    for key, value in presets[preset].items():
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        if leaf not in node:
            raise unknown("config key in preset " + preset, key, flat(config))
        node[leaf] = value
    return config.lock()


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def as_stored(config: ConfigDict) -> dict[str, Any]:
    """`flat`, as it comes back from JSON."""
    return json.loads(json.dumps(flat(config)))


def first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first key that changes what a run computes, in words; None if there is none."""
    for key in sorted(here.keys() | there.keys()):
        if key.split(".")[0] in NO_IDENTITY:
            continue
        if here.get(key) != there.get(key):
            return f"{key}={there.get(key)!r} there, {here.get(key)!r} here"
    return None


def load_module(path: Path) -> ModuleType:
    """Execute a config file; by its path, so that no other `configs` package can shadow it."""
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{path} is no config file: it defines no get_config(preset)")
    return module


def find_file(given: str, checkout: Path) -> Path:
    """A config file by its path from here, or from the checkout."""
    for folder in (Path.cwd(), checkout):
        path = folder / given
        if path.suffix == ".py" and path.is_file():
            return path
    nearby = sorted(str(p.relative_to(checkout)) for p in checkout.glob("configs/[!_]*.py"))
    raise unknown("config file", given, nearby)


def load(given: str, overrides: Sequence[str], checkout: Path) -> tuple[ConfigDict, str, Path]:
    """Read "FILE:PRESET" and apply overrides such as "--config.model.width=128".

    Returns:
        The locked configuration, the preset's name and the file.
    """
    name, _, preset = given.partition(":")
    path = find_file(name, checkout)
    preset = preset or "default"
    config = load_module(path).get_config(preset)
    return override(config, overrides), preset, path


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Apply "--config.KEY=VALUE" arguments, typed by the values they replace."""
    known = flat(config)
    for argument in arguments:
        key, given, value = argument.lstrip("-").removeprefix("config.").partition("=")
        bare = key.removeprefix("no") if key.removeprefix("no").startswith("config.") else key
        if bare.removeprefix("config.") not in known:
            raise unknown("config key", bare, known)
        if given and value.lower() == "none":
            raise UsageError(f"--config.{key}={value}: a value is needed, now {known[key]!r}")
    values = flags.FlagValues()
    argv = ["", *arguments]
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv
        )
        values(argv)
    except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    return holder.value.lock()
