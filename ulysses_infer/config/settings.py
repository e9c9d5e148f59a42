"""Settings: values with their origin, read from recipes, mappings, command lines and `Config` objects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from ulysses_infer.config.aliases import ALIASES, dtype_name, is_alias_section, split_flags
from ulysses_infer.config.foreign import FOREIGN, settle
from ulysses_infer.config.keys import all_keys, hint_for, is_key, is_mapping, is_open
from ulysses_infer.config.schema import Config
from ulysses_infer.errors import ConfigError, first_line

PATH_KEYS = (
    "model.path",
    "model.hf_config",
    "model.tokenizer",
    "model.generation_config",
    "speculation.model",
    "policy.profile",
    "cache.offload_disk_folder",
    "server.chat_template",
    "server.ssl_certfile",
    "server.ssl_keyfile",
    "lora.adapters",
)
WORDS = ("", "auto", "none")
"""Values of path keys that are no paths."""
REPOSITORY_SIGNS = ("pyproject.toml", ".git")


@dataclass(frozen=True)
class Setting:
    """A value for a key, with its origin."""

    key: str
    value: Any
    origin: str
    """The file or kind of argument, for messages."""
    spelling: str
    """The key as written: an alias, or `key` itself."""

    def complain(self, text: str) -> ConfigError:
        """A one-line error about this value."""
        alias = "" if self.spelling == self.key else f", as {self.spelling}"
        return ConfigError(f"{self.key} = {self.value!r} (in {self.origin}{alias}): {text}")


def settings_of_file(path: Path, including: tuple[Path, ...] = ()) -> list[Setting]:
    """The settings of a recipe, after those of the files it includes, so that later ones win."""
    resolved = path.resolve()
    if resolved in including:
        chain = " -> ".join(_shown(p) for p in (*including, resolved))
        raise ConfigError(f"recipes include each other in a circle: {chain}")
    tree = _read_yaml(path)
    included = _included_files(tree.pop("include", None), path.parent, _shown(path))
    settings = [setting for file in included for setting in settings_of_file(file, (*including, resolved))]
    return settings + settings_of_mapping(tree, _shown(path), path.parent)


def settings_of_mapping(tree: Mapping[Any, Any], origin: str, folder: Path | None = None) -> list[Setting]:
    """The settings of a mapping with nested or dotted keys. Relative paths are searched in `folder` first."""
    folder = folder or Path.cwd()
    plain = dict(tree)
    included = _included_files(plain.pop("include", None), folder, origin)
    own = [_setting(name, value, origin, folder) for name, value in _leaves(plain, "", origin)]
    _refuse_contradictions(own)
    return [setting for file in included for setting in settings_of_file(file)] + own


def settings_of_arguments(arguments: list[str], origin: str = "the command line") -> list[Setting]:
    """The settings of `a.b=c` strings and alias flags; for a key given twice the last value counts."""
    settings: dict[str, Setting] = {}
    for name, text in split_flags(arguments):
        tree = {name: _parse_text(name, text, origin)}
        settings |= {name: _setting(name, value, origin, Path.cwd()) for name, value in _leaves(tree, "", origin)}
    _refuse_contradictions(list(settings.values()))
    return list(settings.values())


def settings_of_config(config: Config, origin: str = "the given Config") -> list[Setting]:
    """The settings in which `config` differs from the defaults."""
    settings = []
    for key in all_keys().values():
        section, _, name = key.name.partition(".")
        value = getattr(getattr(config, section), name)
        if value != key.default:
            settings.append(Setting(key.name, escaped(value), origin, key.name))
    return settings


def escaped(value: Any) -> Any:
    """`value` with every literal `${` escaped for OmegaConf."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


def _leaves(tree: Mapping[Any, Any], prefix: str, origin: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each key or alias under `tree`; any other name raises ConfigError."""
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if is_mapping(name) or is_alias_section(name):
            yield from _leaves(_mapping(name, value, origin), name + ".", origin)
        elif is_key(name) or name in ALIASES:
            if not _means_default(name, value):
                yield name, value
        elif name in FOREIGN:
            settle(name, value, origin)
        else:
            raise ConfigError(f"unknown key '{name}' in {origin}; {hint_for(name)}")


def _means_default(name: str, value: Any) -> bool:
    """Whether an alias has the value null, which vLLM writes for a default and its key here does not take."""
    return value is None and name in ALIASES and not all_keys()[ALIASES[name].target].optional


def _mapping(name: str, value: Any, origin: str) -> Mapping[Any, Any]:
    if value is None:  # an empty section
        return {}
    if isinstance(value, Mapping):
        return value
    kind = "a mapping" if is_open(name) else "a section"
    raise ConfigError(f"{name} = {value!r} (in {origin}): {name} is {kind}, give its keys, as in {name}.key=value")


def _setting(name: str, value: Any, origin: str, folder: Path) -> Setting:
    alias = ALIASES.get(name)
    key = alias.target if alias else name
    if alias and alias.translate:
        try:
            value = alias.translate(value)
        except ConfigError as error:
            raise ConfigError(f"{name} (in {origin}): {error}") from error
    if key.endswith(".dtype"):
        value = dtype_name(value)
    if key == "lora.adapters" and isinstance(value, Mapping):  # as an alias gives it
        value = {adapter: locate(path, folder) if isinstance(path, str) else path for adapter, path in value.items()}
    if (key in PATH_KEYS or key.rpartition(".")[0] in PATH_KEYS) and isinstance(value, str):
        value = locate(value, folder)
    return Setting(key, value, origin, spelling=name)


def locate(value: str, folder: Path) -> str:
    """A relative path as an absolute one, if it exists in `folder`, in the repository that contains `folder`, or in the
    working directory.

    Anything else is a hub id or a word such as `auto` and stays as it is, unless it starts with a dot.
    """
    if value in WORDS:
        return value
    path = Path(value).expanduser()
    for base in (folder, *repository_of(folder), Path.cwd()):
        if (base / path).exists():
            return os.path.abspath(base / path)
    return os.path.abspath(folder / path) if value.startswith((".", "~")) else value


def repository_of(folder: Path) -> list[Path]:
    """The root of the repository that contains `folder`; empty if there is none."""
    absolute = Path(os.path.abspath(folder))
    roots = (base for base in (absolute, *absolute.parents) if any((base / sign).exists() for sign in REPOSITORY_SIGNS))
    return list(roots)[:1]


def _refuse_contradictions(settings: list[Setting]) -> None:
    """Raise ConfigError if one source sets a key twice, by its own name and by an alias."""
    seen: dict[str, Setting] = {}
    for setting in settings:
        earlier = seen.setdefault(setting.key, setting)
        if earlier is not setting and earlier.value != setting.value:
            raise ConfigError(
                f"'{earlier.spelling}' and '{setting.spelling}' in {setting.origin} both set {setting.key}, "
                f"to {earlier.value!r} and {setting.value!r}: give one of them"
            )


def _parse_text(name: str, text: str, origin: str) -> Any:
    """The value that `text` means for a key: itself for keys of type str, else its meaning in YAML."""
    key = all_keys().get(ALIASES[name].target if name in ALIASES else name)
    if key and key.type is str:
        return None if key.optional and text == "null" else text
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{name}={text} (in {origin}): not a valid value: {first_line(error)}") from error
    assert isinstance(tree, dict)
    return tree["value"]


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ConfigError(f"recipe '{path}' does not exist; give the path of a YAML file")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"recipe '{path}' is not valid YAML{line}: {error.problem}") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{path}' cannot be read: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe '{path}' holds a {type(tree).__name__}; it must hold sections such as 'model:'")
    return tree


def _included_files(include: Any, folder: Path, origin: str) -> list[Path]:
    names = [include] if isinstance(include, str) else include or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"include = {include!r} (in {origin}): give a list of file names")
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"include '{name}' (in {origin}) does not exist in '{folder}'")
    return [folder / name for name in names]


def _shown(path: Path) -> str:
    """`path` relative to the working directory if it is below it."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
