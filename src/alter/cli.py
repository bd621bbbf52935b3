"""The command line: parse, then call one function. Torch is imported by the command that needs it, not by the help."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import functools
import gc
import importlib
import inspect
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.commands import COMMANDS, COMMON
from alter.core import UserError, deferred, ignore_known_warnings, lasting, nearest, plain, processes, wording
from alter.plugins import BENCHMARKS, add_files, place_in
from alter.settings import (
    as_standard_output,
    check_numbers,
    check_outputs,
    flags_of,
    given_once,
    list_flags,
    refusal,
    refuse_unknown,
    split_recipe,
    value_of,
    with_defaults,
    with_flags,
)

if TYPE_CHECKING:
    from pydantic import BaseModel


STATUSES = {
    0: "done",
    2: "a mistake in what was given",
    3: "done, and found NOT FORGOTTEN, COLLAPSED, come back or altered",
    70: "an error that is not yours, or of the system (a full disk); its trace is in a file",
    75: "not all of it was done; the same command goes on",
    130: "interrupted",
}
"""What the exit statuses mean."""


def _listed(names: Sequence[str]) -> list[str]:
    width = max(map(len, names))
    return [_wrapped(f"  {name:<{width}}  {COMMANDS[name].help}", width + 4) for name in names]


def _wrapped(line: str, indent: int = 0) -> str:
    """Break a line of the help at the terminal's width; what follows is indented."""
    wide = max(shutil.get_terminal_size().columns, indent + 20)
    return textwrap.fill(line, wide, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _help() -> str:
    lines = _listed(list(COMMANDS))
    more = [
        "`alter COMMAND --help` lists a command's options (`--help-all`: also those that few need); a recipe gives them in "
        "YAML, flags override it.",
        "A part of your own, such as an objective, lies in a Python file: `alter COMMAND --plugin FILE.py`.",
        f"Benchmarks: {', '.join(BENCHMARKS.known())} (`alter evaluate --benchmark NAME --help`).",
        "Exit status: " + ". ".join(f"{number}: {meaning}" for number, meaning in STATUSES.items()) + ".",
    ]
    return "\n".join(
        [
            "usage: alter COMMAND [RECIPE.yaml] [--OPTION VALUE ...]",
            "",
            _wrapped("Make a language model forget, with ALTER (arXiv:2603.01792), and measure that it did."),
            "",
            *lines,
            "",
            *map(_wrapped, more),
        ]
    )


def choose(args: Sequence[str]) -> tuple[str, str]:
    """Return module and settings of the benchmark that the flags or the recipe name; the first benchmark by default.

    Raises:
        UserError: there is no such benchmark.
    """
    given, flags = split_recipe(list(args))
    name = str(value_of(flags, "benchmark") or given.get("benchmark") or next(iter(BENCHMARKS)))
    if name not in BENCHMARKS:
        raise UserError(f"No benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}.{nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def parse(command: str, model: type[BaseModel], args: Sequence[str]) -> Any:
    """Parse settings from a recipe (the first argument, if it names a YAML file) and flags that override it.

    Raises:
        UserError: a recipe that is missing or not YAML, an unknown key or flag, or a value that the settings refuse.
    """
    import tyro
    from pydantic import ValidationError

    given, args = split_recipe(list(args))
    kinds = {}
    for place, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and flag.endswith(".kind"):
            name = flag[2:-5].replace("-", "_")
            kinds[name] = value if equals else (args[place + 1] if place + 1 < len(args) else "")
    presets = COMMANDS[command].presets if command in COMMANDS else None
    if presets is not None:
        method = value_of(args, "method")
        if not isinstance(given.get("method", ""), str | None):
            raise UserError(f"`method` is {given['method']!r}; expected a name.")
        flags: dict[str, Any] = {part: {"kind": kinds[part]} for part in ("adapter", "objective") if part in kinds}
        known = importlib.import_module(presets)
        named = {"method": method} if method else known.with_default({**given, **flags})
        given = known.expand({**given, **({"method": named["method"]} if named.get("method") else {})})
    shown = COMMON[command].split() if command in COMMON and {"-h", "--help"} & set(args) else None
    helps = {"-h", "--help", "--help-all"} & set(args)
    worded: Callable[[str], str] = functools.partial(with_flags, model=model) if helps else str
    default = with_defaults(model, given, "", kinds, shown=shown, worded=worded)
    if not helps:
        refuse_unknown(command, args, model, default, functools.partial(_flags_elsewhere, model))
    # a help text is the same whatever else is given, and may lack what else is given
    args = ["--help"] if helps else given_once(args, list_flags(default))
    more = f"Common options; `alter {command} --help-all` lists all." if shown else ""
    about = "\n\n".join(filter(None, (worded(inspect.cleandoc(model.__doc__ or "")), more)))
    parsed = tyro.cli(type(default), default=default, args=args, prog=f"alter {command}", description=about)
    check_numbers(dataclasses.asdict(parsed), dataclasses.asdict(default), given)
    try:
        return model.model_validate(dataclasses.asdict(parsed))
    except ValidationError as error:
        raise UserError(refusal(error, model, command)) from None


def _flags_elsewhere(model: type[BaseModel]) -> dict[str, set[str]]:
    """Return the flags of the commands that have other settings, by what is typed for them."""
    found: dict[str, set[str]] = {}
    for name, each in COMMANDS.items():
        owners = {name: (each.module, each.settings)}
        if each.chooser is not None:
            owners = {f"{name} --{each.chooser} {choice}": BENCHMARKS[choice] for choice in BENCHMARKS}
        kinds = {
            typed: getattr(importlib.import_module(module), settings) for typed, (module, settings) in owners.items()
        }
        flags = {typed: set(flags_of(kind).values()) for typed, kind in kinds.items() if kind is not model}
        # what every choice has is the command's
        shared = set.intersection(*flags.values()) if len(flags) > 1 else set()
        found |= {name: shared} if shared else {}
        found |= {typed: own - shared for typed, own in flags.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `alter` on these arguments; return the exit status.

    Each is in `STATUSES`.
    """
    if argv is not None:
        return _main(list(argv))
    # imported modules live as long as the process: collecting them takes a quarter of a short command's time
    gc.disable()
    atexit.register(gc.freeze)
    return lasting(lambda: _main(sys.argv[1:]))


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"alter {version('alter-unlearning')}")
        return 0
    _set_up()
    command = args.pop(0)
    members = [name for name in COMMANDS if name.startswith(f"{command} ")]
    if members:
        if not args or args[0] in ("-h", "--help"):
            print("\n".join([f"usage: alter {command} COMMAND [--OPTION VALUE ...]", "", *_listed(members)]))
            return 0
        command = f"{command} {args.pop(0)}"
    try:
        _run(command, args)
    except UserError as error:
        if processes.speaks():
            # a progress bar may be left on the line
            print(f"{'' if processes.size() == 1 else chr(10)}alter: {plain(error)}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("alter: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        given = _given(error, args)
        if processes.speaks():
            if given is None:
                _report(error)
            else:
                shown = given if len(given) < 80 else f"{given[:60]}…"
                print(f"alter: {shown!r} cannot be used: {error.strerror}. Give another path.", file=sys.stderr)
        return 70 if given is None else 2
    except Exception as error:  # the last resort: an unforeseen error becomes one line and a trace file
        if processes.speaks():
            _report(error)
        return 70
    return 0


def _set_up() -> None:
    """Set what libraries read from the environment when they load, and silence warnings that do not concern a user."""
    # waiting threads of libgomp, which torch's wheel brings, spin and take cores from other processes
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # pydantic would scan the metadata of all installed packages for plugins
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    ignore_known_warnings()
    if processes.launched() > 1:
        # torch would warn on every rank that DDP looks for unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # other libraries' progress bars fill a log with what only a terminal can erase
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    # it reports how it sorts checkpoints of equal modification time
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    # it reports every one of its retries without a network; what comes of them is said
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def _run(command: str, args: Sequence[str]) -> None:
    """Parse the flags and run the command.

    Raises:
        UserError: no such command, settings that it refuses, or what it raises.
    """
    broken = next((arg for arg in [command, *args] if not _is_text(arg)), None)
    if broken is not None:
        raise UserError(f"The argument {broken!r} holds bytes that are no text: write it in UTF-8.")
    if command.startswith("--plugin"):
        raise UserError(
            "--plugin stands behind the command: alter COMMAND --plugin FILE.py. For every command the environment's ALTER_PLUGINS "
            "names such files."
        )
    if command not in COMMANDS:
        raise UserError(
            f"Unknown command {command!r}; expected one of {', '.join(COMMANDS)}.{nearest(command, COMMANDS)}"
        )
    args = add_files(list(args))
    found = COMMANDS[command]
    if processes.launched() > 1 and not found.together:
        able = [name for name, each in COMMANDS.items() if each.together]
        raise UserError(
            f"`alter {command}` is for one process, the launcher started {processes.launched()}: run it without one. "
            f"Several processes together do {', '.join(able)}."
        )
    from tyro.constructors import ConstructorRegistry

    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.quiet())
        # tyro builds its rules once, and one reads torch if torch is imported: build them before
        with ConstructorRegistry(), deferred():
            owner, settings = (found.module, found.settings) if found.chooser is None else choose(args)
            model = getattr(importlib.import_module(owner), settings)
            stack.enter_context(_in_flags(model))
            parsed = parse(command, model, args)
            to_stdout = getattr(parsed, "json_path", None) == "-"
            check_outputs(parsed.model_copy(update={"json_path": None}) if to_stdout else parsed)
        function = found.load()
        gc.enable()
        _call(function, parsed)
    processes.stop()


@contextlib.contextmanager
def _in_flags(model: type[BaseModel]) -> Iterator[None]:
    """Inside the block, notes, and the error that ends it, name a command's settings by their flags."""
    worded = functools.partial(with_flags, model=model)
    with wording(worded):
        try:
            yield
        except UserError as error:
            raise type(error)(worded(str(error))) from error


def _is_text(arg: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in arg)


def _call(function: Callable[[Any], Any], settings: Any) -> None:
    """Call a command's function; with `--json -` the JSON goes to standard output, and all else to standard error."""
    if getattr(settings, "json_path", None) != "-":
        function(settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        with contextlib.redirect_stdout(sys.stderr), as_standard_output(str(path)):
            function(settings.model_copy(update={"json_path": str(path)}))
        if path.exists():
            # JSON is UTF-8, whatever the terminal shows
            sys.stdout.flush()
            binary = getattr(sys.stdout, "buffer", None)
            if binary is None:
                sys.stdout.write(path.read_text(encoding="utf-8"))
            else:
                binary.write(path.read_bytes())
            sys.stdout.flush()


def _given(error: OSError, args: Sequence[str]) -> str | None:
    """Return the argument path that the operating system refused, if the error is about one of them."""
    mistakes = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.EACCES, errno.ELOOP)
    if error.errno not in mistakes or not isinstance(error.filename, str):
        return None
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        if value and (
            error.filename == value or error.filename.startswith((f"{value}/", f"{os.path.abspath(value)}/"))
        ):
            return value
    return None


def _behind(error: Exception) -> Exception:
    """Return the system's refusal (no space left, a broken disk) that a library's own error hides, else the error."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            return each
        if isinstance(each, RuntimeError) and "iostream error" in str(each):
            # torch.save writes through C++, which does not say why it could not
            return OSError(errno.EIO, "a file could not be written: is the disk full?")
        each = each.__cause__ or each.__context__
    return error


def _report(error: Exception) -> None:
    """Report an error in one line, and keep its trace in a file that only the user can read."""
    trace = "".join(traceback.format_exception(error))
    error = _behind(error)
    reason = " ".join(str(error).split())[:300]
    said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    try:
        handle, path = tempfile.mkstemp(prefix="alter-trace-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
    except OSError:
        # a full disk takes no trace either
        print(trace, file=sys.stderr)
        path = "printed above"
    place = place_in(error)
    kind = f"an error in the plugin {place}" if place else "an error that alter does not know"
    kind = "the system refused" if isinstance(error, OSError) else kind
    print(f"alter: {kind}: {plain(said)}. Its trace is {path}.", file=sys.stderr)
