"""Recipes: YAML files of settings, validated into typed configurations; ``--set`` overrides single keys."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lipflow.config import StrictConfig
from lipflow.errors import ConfigError
from pipeline import storage

C = TypeVar("C", bound=StrictConfig)


def load_recipe(config_class: type[C], recipe: str | None, overrides: Sequence[str] = ()) -> C:
    """Build a configuration from a recipe file and overrides; what they leave out keeps the class's own defaults.

    Args:
        config_class: what the recipe must be.
        recipe: path or URI of a YAML file, or None for the defaults.
        overrides: ``"key.sub=value"``; values are YAML, later ones win.

    Raises:
        ConfigError: unreadable YAML, an unknown key (the nearest known one is named), or a bad value.
    """
    settings: Any = {}
    where = "the defaults"
    if recipe is not None:
        where = recipe
        try:
            settings = yaml.safe_load(storage.read_bytes(recipe)) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{recipe}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{recipe}: expected a mapping of settings, found {type(settings).__name__}")
    for override in overrides:
        _apply_override(settings, override)
    try:
        return config_class.model_validate(_merged(_defaults(config_class), settings))
    except ValidationError as error:
        raise ConfigError(f"recipe {where}: {_explain(error, config_class)}") from error


def dump_recipe(config: StrictConfig, path: Path) -> None:
    """Write a configuration as a recipe file that :func:`load_recipe` reads back to an equal one."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _defaults(config_class: type[BaseModel]) -> dict[str, Any]:
    """The defaults as a recipe: a class may give a group other defaults than the group's own class does."""
    if any(item.is_required() for item in config_class.model_fields.values()):
        return {}
    return config_class().model_dump(mode="json")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both_groups = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both_groups else value
    return merged


def _apply_override(settings: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is not a group of settings")
    settings[last] = value


def _explain(error: ValidationError, config_class: type[BaseModel]) -> str:
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(config_class, item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            problems.append(f"unknown key {path!r}; {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # A group as a whole is no answer to what was found: its message says which of its settings are meant.
            found = "" if isinstance(item["input"], dict) else f", found {item['input']!r}"
            problems.append(f"{path}: {message}{found}" if path else message)
    return "; ".join(problems)


def _known_keys(config_class: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current: Any = config_class
    for part in location:
        annotation = current.model_fields[part].annotation if part in getattr(current, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        current = models[0]
    return list(current.model_fields)
