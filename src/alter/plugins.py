"""Registries of parts by name that installed packages and scripts can extend.

A plain file joins by `alter COMMAND --plugin FILE.py`, or by the environment's ALTER_PLUGINS; an installed package through an
entry point of the group `alter.plugins`, which names a module to import; a script registers its parts itself before it calls
alter. Each way the part is then usable by name in recipes, flags and help; in comparisons, whose cells are processes of their own, the
first two ways. Such a file or module might hold

    from alter.methods.objectives import FORGET, Labelled, Objective

    @FORGET.part
    class Fading(Objective):
        kind: Literal["fading"] = "fading"

        def __call__(self, tokens: Labelled) -> Tensor: ...
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from alter.core import UserError, nearest

GROUP = "alter.plugins"
FILES_VARIABLE = "ALTER_PLUGINS"
"""Variable of the environment, so that processes which a command starts load the same files: paths, divided as in PATH."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_loaded: set[str] = set()
_foreign: set[str] = set()
"""Modules that parts were added from."""


def entries() -> list[importlib.metadata.EntryPoint]:
    """Return the entry points of the installed plugins, sorted by name."""
    return list(_entries(tuple(sys.path)))


@functools.cache
def _entries(path: tuple[str, ...]) -> list[importlib.metadata.EntryPoint]:
    # reading the metadata of all installed packages takes 20 ms, and every part that is looked up asks
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def load_plugins() -> None:
    """Import the modules of all installed plugins, and the named files; each once.

    Raises:
        UserError: a plugin cannot be imported.
    """
    for path in filter(None, os.environ.get(FILES_VARIABLE, "").split(os.pathsep)):
        if path not in _loaded:
            _loaded.add(path)
            _load_file(path)
    for entry in entries():
        if entry.value in _loaded:
            continue
        # before the import, since the plugin's own imports may ask for parts
        _loaded.add(entry.value)
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            _loaded.discard(entry.value)
            owner = entry.dist.name if entry.dist is not None else entry.value
            raise UserError(
                f"The plugin {entry.name!r} of the package {owner} cannot be loaded: {error}. Expected a module that can be "
                f"imported ({entry.value}); fix the package, or uninstall it."
            ) from error


def add_files(args: list[str]) -> list[str]:
    """Take `--plugin FILE.py` out of a command's arguments, and register the files for this process and its children.

    Raises:
        UserError: no file follows, or there is none.
    """
    left: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg != "--plugin" and not arg.startswith("--plugin="):
            left.append(arg)
            continue
        path = arg.partition("=")[2] or next(rest, "")
        if not Path(path).is_file() or not path.endswith(".py"):
            raise UserError(f"--plugin is {path!r}; expected a Python file that registers a part, such as mine.py.")
        known = os.environ.get(FILES_VARIABLE, "").split(os.pathsep)
        os.environ[FILES_VARIABLE] = os.pathsep.join(dict.fromkeys([*filter(None, known), os.path.abspath(path)]))
    return left


def _load_file(path: str) -> None:
    name = Path(path).stem
    if getattr(sys.modules.get(name), "__file__", None) == path:
        return
    if name in sys.modules or not name.isidentifier():
        _loaded.discard(path)
        why = "Python has a module of that name already" if name.isidentifier() else "that is no name of a module"
        raise UserError(f"The plugin {path} cannot be loaded as {name!r}: {why}. Rename the file.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    # under its name before it runs: pydantic looks up the names in annotations there
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        _loaded.discard(path)
        del sys.modules[name]
        raise
    except Exception as error:
        _loaded.discard(path)
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = "" if line is None else f", line {line}"
        raise UserError(f"The plugin {path} cannot be loaded{where}: {type(error).__name__}: {error}") from error


def is_found_elsewhere(module: str) -> bool:
    """Tell whether another process finds what a module registers: one of alter's own, a named file or an installed plugin's."""
    if module.partition(".")[0] in {"alter", *(entry.module.partition(".")[0] for entry in entries())}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    named = filter(None, os.environ.get(FILES_VARIABLE, "").split(os.pathsep))
    return file is not None and os.path.abspath(file) in map(os.path.abspath, named)


def place_in(error: BaseException) -> str | None:
    """Return the last line of a plugin that an error passed through, as `FILE, line N`; None if it passed through none."""
    files = {getattr(sys.modules.get(name), "__file__", None) for name in _foreign - {""}}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


def plugins_digest() -> str | None:
    """Return a hash of the source files of all plugin parts, or None if every part is alter's own.

    These are all files of each installed plugin's package, and the files that registered parts were defined in.
    """
    load_plugins()
    found = hashlib.sha256()
    files: set[Path] = set()
    for name in {entry.module.partition(".")[0] for entry in entries()}:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            files |= {path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py")}
        elif spec is not None and spec.origin is not None:
            files.add(Path(spec.origin))
    origins = (getattr(sys.modules.get(name), "__file__", None) for name in _foreign)
    files |= {Path(origin) for origin in origins if origin is not None}
    for content in sorted(path.read_bytes() for path in files):
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest() if files else None


class Registry(Mapping[str, T], Generic[T]):
    """Parts of one sort by name: alter's own first, then plugins' in the order of registration.

    Looking something up loads the installed plugins first.

    Args:
        sort: what the parts are, for messages: "objective".
        own: the parts that alter brings.
    """

    def __init__(self, sort: str, own: Mapping[str, T]) -> None:
        self.sort = sort
        self._parts: dict[str, T] = dict(own)

    def add(self, name: str, part: T) -> None:
        """Register a part. The same part may come again, as when its module is reloaded.

        Raises:
            UserError: another part has the name.
        """
        former = self._parts.get(name)
        if former is not None and _origin(former) != _origin(part):
            raise UserError(f"There is already a part named {name!r} ({self.sort}): give yours another name.")
        self._parts[name] = part
        _foreign.add(part[0] if isinstance(part, tuple) else getattr(_code(part), "__module__", ""))

    def part(self, cls: type[M]) -> type[M]:
        """Register a class of settings by the default of its field `kind`; used as a decorator.

        Raises:
            UserError: it has no such field, or another class has the name.
        """
        field = cls.model_fields.get("kind")
        if field is None or not isinstance(field.default, str):
            raise UserError(
                f'{cls.__name__} has no name: give it a field such as kind: Literal["mine"] = "mine" ({self.sort}).'
            )
        self.add(field.default, cls)  # type: ignore[arg-type]
        return cls

    def known(self) -> list[str]:
        """Return the names registered so far, without loading plugins."""
        return list(self._parts)

    def __getitem__(self, name: str) -> T:
        load_plugins()
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(list(self._parts))

    def __len__(self) -> int:
        load_plugins()
        return len(self._parts)


def _code(part: Any) -> Any:
    """Return what was written: of a record that holds functions the first of them, else the part itself."""
    own = vars(part).values() if is_dataclass(part) and not isinstance(part, type) else ()
    return next((value for value in own if isinstance(value, FunctionType)), part)


def _origin(part: Any) -> Any:
    code = _code(part)
    return (code.__module__, code.__qualname__) if isinstance(code, (type, FunctionType)) else part


def kinds(*classes: type[M]) -> dict[str, type[M]]:
    """Map the value of the field `kind` to its class of settings."""
    return {cls.model_fields["kind"].default: cls for cls in classes}


@dataclass(frozen=True)
class OneOf:
    """Marks a field that holds one of a registry's classes, chosen by `kind`: a union that stays open.

    `Annotated[Base, OneOf(registry)]` takes an instance or a mapping with `kind`; what the class refuses is reported under
    the field's own name.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, value: Any) -> BaseModel:
        members: dict[str, type[BaseModel]] = dict(self.registry)
        if isinstance(value, tuple(members.values())):
            return cast(BaseModel, value)
        if isinstance(value, BaseModel):
            raise ValueError(
                f"the class {type(value).__name__} is no {self.registry.sort} that alter knows: register it by `.part` of the registry"
            )
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{' '.join(repr(value).split())[:80]}; expected keys and values with kind, as in {{'kind': {next(iter(members))!r}}}, "
                f"one of {', '.join(members)}"
            )
        kind = value.get("kind")
        if kind not in members:
            raise ValueError(
                f"kind is {kind!r}; expected one of {', '.join(members)}.{nearest(str(kind), members)} "
                "`alter COMMAND --plugin FILE.py` adds one of your own."
            )
        return members[kind].model_validate(value)


@dataclass(frozen=True)
class NamesOf:
    """Marks a field that holds names of a registry's parts, which help and completion list without loading alter's own parts.

    Attributes:
        own: names of alter's own parts, with blanks between.
        module: where the registry is; a plugin that adds to it has imported it.
        registry: its name there.
    """

    own: str
    module: str
    registry: str

    def names(self) -> list[str]:
        """Return the names, plugins' among them."""
        load_plugins()
        loaded = sys.modules.get(self.module)
        return self.own.split() if loaded is None else list(getattr(loaded, self.registry))


BENCHMARKS: Registry[tuple[str, str]] = Registry(
    "benchmark",
    {
        "tofu": ("alter.evaluation.tofu.benchmark", "TofuEvaluation"),
        "muse": ("alter.evaluation.muse", "MuseEvaluation"),
        "book": ("alter.evaluation.book", "BookEvaluation"),
        "wmdp": ("alter.evaluation.harness.benchmarks", "WmdpEvaluation"),
        "mmlu": ("alter.evaluation.harness.benchmarks", "MmluEvaluation"),
        "lm-eval": ("alter.evaluation.harness.benchmarks", "LmEvalEvaluation"),
        "fluency": ("alter.evaluation.fluency", "FluencyEvaluation"),
        "rows": ("alter.evaluation.rows", "RowsEvaluation"),
        "rwku": ("alter.evaluation.rwku", "RwkuEvaluation"),
        "lume": ("alter.evaluation.lume", "LumeEvaluation"),
        "knowundo": ("alter.evaluation.knowundo", "KnowundoEvaluation"),
    },
)
"""Module and class of the settings that `--benchmark NAME` stands for; the first is the default."""


def benchmark_of(name: str) -> type[Any]:
    """Return the settings of a benchmark.

    Raises:
        UserError: there is none of the name.
    """
    if name not in BENCHMARKS:
        raise UserError(f"No benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}.{nearest(name, BENCHMARKS)}")
    module, settings = BENCHMARKS[name]
    found: type[Any] = getattr(importlib.import_module(module), settings)
    return found


def benchmark(name: str) -> Callable[[type[M]], type[M]]:
    """Decorate a subclass of `alter.evaluation.base.Evaluation`, so that `--benchmark NAME` finds it.

    The class has a field `benchmark: Literal["NAME"] = "NAME"`, as every benchmark has.

    Raises:
        UserError: another benchmark has the name, or the class has no such field.
    """

    def register(cls: type[M]) -> type[M]:
        field = cls.model_fields.get("benchmark")
        if field is None or field.default != name:
            raise UserError(f'{cls.__name__} lacks its name: give it a field benchmark: Literal["{name}"] = "{name}".')
        BENCHMARKS.add(name, (cls.__module__, cls.__name__))
        return cls

    return register
