"""The folder of a run: what may be overwritten, checkpoints to resume from, and the tensors and adapters kept in it.

While a run trains, `inputs.json`, `frozen.safetensors`, `trunk.safetensors`, `watched.safetensors`, `start.safetensors`
(initializers), `codes.safetensors`, `reinforced.safetensors` and `checkpoints/` let an interrupted run resume; they are for
their owner alone, and rows can be read from them. At the end they are removed, but for each token's entropy and gates, unless
`keep_working` is set.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from alter.adapter import same_base
from alter.core import UserError, processes, warn
from alter.data import Example, check_unread
from alter.groundwork import frozen
from alter.storage import (
    CLAIM_FILE,
    check_deletable,
    check_free,
    claim,
    digest,
    file_digest,
    folder_digest,
    from_json,
    keep,
    kept,
    to_json,
    write_atomic,
)
from alter.training.settings import Unlearn
from alter.training.trunk import TRUNK_FILE, WATCHED_FILE

GRADIENT = "gradient.safetensors"
"""File of what a rule for gradients has measured, in a run's folder, and of its state between steps, in a checkpoint."""

CODES = "codes.safetensors"
"""File of the base's codes of names or prompts, for objectives that need them (`Needs.codes`, `Needs.redirected`),
while the run works."""

TRACED = "traced.safetensors"
"""File of the result of causal tracing, or of each expert's share of the forget rows, in a run's folder."""


class Place(Protocol):
    """Settings that say where a run works, and whether it goes on there or starts again."""

    out: str
    resume: bool
    overwrite: bool


def check_folder(run: Place, reads: Iterable[tuple[str, str | None]]) -> Path:
    """Return a run's folder after checking it; nothing is created or deleted before the model is loaded.

    Args:
        run: settings of the run.
        reads: settings and the sources of rows or models that they name, which are not deleted.

    Raises:
        UserError: it is a file, another process is working in it, it holds something and neither `resume` nor `overwrite` is
            set, or both are, it is not of a run or holds what the run reads and would be overwritten, or there is nothing to
            resume.
    """
    out = Path(run.out)
    if run.resume and run.overwrite:
        raise UserError("`resume` and `overwrite` contradict each other: give one of them.")
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` is {run.out!r}, which is a file; give a folder.")
    check_free(out)
    used = out.is_dir() and any(out.iterdir())
    if used and run.overwrite:
        check_deletable(out, MARKS)
        check_unread(out, reads)
    if used and not run.resume and not run.overwrite:
        raise UserError(
            f"The output folder {run.out} is not empty: add `resume` to go on with what it holds, `overwrite` to delete it, "
            "or give another `out`."
        )
    if run.resume and not used:
        raise UserError(f"Nothing to resume: {run.out} is empty or missing. Leave `resume` out to start.")
    return out


class RunSettings(Protocol):
    """Settings of a run that a folder keeps."""

    out: str
    overwrite: bool

    def model_dump(self, *, exclude: set[str]) -> dict[str, Any]:
        """Return the settings by name."""


def make_folder(run: RunSettings, inputs: Mapping[str, Any]) -> None:
    """Create the run's folder, emptied first if it is to be overwritten, and write down the settings and the inputs.

    Raises:
        UserError: another process has begun in it, or it cannot be made.
    """
    out = Path(run.out)
    # another process may have started while the model was loaded
    check_free(out)
    if run.overwrite:
        remove_run(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"`out` is {run.out!r}, which cannot be made: {error.strerror}. Give another folder."
        ) from None
    claim(out)
    write_atomic(out / "run.yaml", yaml.safe_dump(run.model_dump(exclude={"resume", "overwrite"}), sort_keys=False))
    if not (out / INPUTS).exists():
        write_atomic(out / INPUTS, to_json(inputs))


def remove_run(out: Path) -> None:
    """Delete a run's folder, if it is there. `run.json` goes first: what a kill leaves then counts as no finished run.

    Raises:
        UserError: it is no folder of a run (`check_deletable`).
    """
    check_deletable(out, MARKS)
    if out.is_dir():
        (out / "run.json").unlink(missing_ok=True)
        shutil.rmtree(out)


@contextmanager
def undone_if_refused(run: Place, out: Path) -> Iterator[None]:
    """Remove a new run's folder if what is done inside the block is refused: it would be in the corrected command's way."""
    try:
        yield
    except UserError:
        if processes.first() and not run.resume:
            with suppress(UserError):
                remove_run(out)
        raise


def has_ended(out: Path) -> bool:
    """Tell whether a run's folder holds a complete result, with nothing left to resume."""
    return (out / "run.json").exists() and not (out / "checkpoints").exists()


INPUTS = "inputs.json"
"""File of a run's folder with the inputs that its checkpoints were made from."""

MARKS = (INPUTS, "run.json", "forget.json", CLAIM_FILE)
"""Files by which a folder is known as one that a run of ours made, and may be deleted with `overwrite`."""

UNCOMPARED = {"method", "model", "forget", "retain", "start_from", "out", "resume", "overwrite", "device"} | {
    "closing_rows",
    "must_forget",
    "save_steps",
    "keep_working",
    "report_to",
    "trunk_gib",
}
"""Settings that may differ when a run is resumed: names of what is compared by content, and what changes no weight."""


class OtherInputs(UserError):
    """A run cannot be resumed: data, settings or model differ from those it began with."""


BASE = "base model"
"""Name of the base's fingerprint among a run's inputs; compared once the model is loaded."""
SUB_DOMAINS = "sub-domains"
"""Name of the digest of the forget rows' sub-domains among a run's inputs; clustering reads the model, so it is
compared then too."""


def inputs_of(run: Unlearn, forget: Sequence[Example], retain: Sequence[Example]) -> dict[str, Any]:
    """Return what a run's weights depend on, as `check_inputs` compares it: settings, and hashes of the rows and of
    `start_from`.
    """

    def rows(examples: Sequence[Example]) -> str:
        return digest([[e.row, e.domain] for e in examples])

    local = run.start_from is not None and Path(run.start_from).is_dir()
    found = {
        "forget rows": rows(forget),
        "retain rows": rows(retain),
        BASE: None,
        SUB_DOMAINS: None,
        "start_from": folder_digest(str(run.start_from)) if local else run.start_from,
        **_flat(run.model_dump(mode="json", exclude=UNCOMPARED)),
    }
    compared: dict[str, Any] = from_json(to_json(found))
    return compared


def _flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{where}{name}.") if isinstance(value, dict) and value else {f"{where}{name}": value}
    return found


def check_inputs(out: Path, now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with inputs other than those it began with; for a new run, write them down.

    Args:
        out: the run's folder.
        now: what `inputs_of` gives; what is None there until the model is loaded is not compared.

    Raises:
        OtherInputs: names what differs.
    """
    file = out / INPUTS
    try:
        then = dict(from_json(file.read_text()))
    except FileNotFoundError:
        if any((out / "checkpoints").glob("checkpoint-*")):
            raise OtherInputs(
                f"{out} holds checkpoints but no {INPUTS}, so that nobody knows what they were made from: start again with "
                "`overwrite`, or give another `out`."
            ) from None
        return
    except (ValueError, TypeError):
        raise OtherInputs(f"{file} is broken: start again with `overwrite`, or give another `out`.") from None
    unknown = {name for name in (BASE, SUB_DOMAINS) if now.get(name) is None}
    differ = [name for name in {**then, **now} if name not in {BASE, *unknown} and then.get(name) != now.get(name)]
    if then.get(BASE) and now.get(BASE) and not same_base(then[BASE], now[BASE]):
        differ.append(BASE)
    if not differ:
        return
    told = [
        f"other {name}"
        if name in (BASE, SUB_DOMAINS, "forget rows", "retain rows", "start_from")
        else f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in differ[:3]
    ]
    raise OtherInputs(
        f"{out} was begun with other data or settings: {'; '.join(told)}{'; …' if len(differ) > 3 else ''}. `resume` goes on "
        "with the same alone: give what was given then, `overwrite` to start again, or another `out`."
    )


WHOLE = "whole.json"
"""File of a checkpoint with the digests of the others, written last."""


def seal_checkpoint(checkpoint: Path, alone: bool = False) -> None:
    """Write the digests of a checkpoint's files; `last_whole_checkpoint` compares them to detect damage.

    With `alone` delete the other checkpoints, but not before this one can be resumed from.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != WHOLE)
    found = {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}
    write_atomic(checkpoint / WHOLE, to_json(found))
    for other in checkpoint.parent.glob("checkpoint-*") if alone else ():
        if other.name != checkpoint.name:
            shutil.rmtree(other)


def _damage(checkpoint: Path) -> str | None:
    """Return how a checkpoint is damaged, None if it is intact, "" if it was never finished."""
    try:
        written = dict(from_json((checkpoint / WHOLE).read_text()))
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError, OSError):
        return f"{WHOLE} is broken"
    for name, wanted in written.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != wanted:
            return f"{name} is not what was written"
    return None


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their digests; a kill while saving leaves one that does not.

    One whose bytes have changed since is passed over, and said; so it is where none is left.
    """
    damaged = False
    numbered = [
        (int(number), path)
        for path in folder.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isascii() and number.isdecimal()
    ]
    for _, path in sorted(numbered, reverse=True):
        wrong = _damage(path)
        if wrong is None:
            return path
        if wrong:
            damaged = True
            warn(f"{path} is damaged ({wrong}): it is passed over.")
    if damaged:
        warn(f"No whole checkpoint is left in {folder}: training begins again at its first step.")
    return None


def clean(out: Path, forget_rows: int) -> None:
    """Delete what only a resumed run needs, once the run has ended: forgotten rows could be read from it.

    Args:
        out: the run's folder.
        forget_rows: see `frozen.strip`.
    """
    # temporary files of a killed write have hidden names
    for path in [
        *(
            out / name
            for name in (
                TRUNK_FILE,
                WATCHED_FILE,
                GRADIENT,
                TRACED,
                CODES,
                "start.safetensors",
                "reinforced.safetensors",
            )
        ),
        *out.glob(".*"),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    frozen.strip(out / "frozen.safetensors", forget_rows)
    # last: without them a run counts as ended
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that this launch cannot load completely.

    Raises:
        UserError: it was written under another way to divide the model, or for DeepSpeed by another number of processes.
    """
    files = {path.name for path in checkpoint.iterdir()}
    wrote = "fsdp2" if "optimizer.bin" in files else "zero3" if "latest" in files else "ddp"
    if wrote != processes.launch():
        names = {"ddp": "without sharding", "fsdp2": "under FSDP2", "zero3": "under DeepSpeed ZeRO-3"}
        raise UserError(
            f"{checkpoint} was written {names[wrote]}, this run is started {names[processes.launch()]}: resume as it was "
            f"started (recipes/accelerate/{wrote}.yaml), or start again with `overwrite`."
        )
    count = max(1, sum(name.startswith("rng_state_") for name in files))
    if wrote == "zero3" and count != processes.size():
        raise UserError(
            f"{checkpoint} was written by {count} processes, and DeepSpeed ZeRO-3 reads it with as many only: resume "
            f"with `accelerate launch --num_processes {count}`."
        )


def kept_tensors(cache: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors that `make` computes, or those cached in `cache` under the same key.

    Rank 0 computes them, and the other ranks read the file.
    """

    def read_or_make() -> dict[str, Tensor]:
        found = kept(cache, key)
        if found is not None:
            return found[0]
        made = {name: value.contiguous() for name, value in make().items()}
        keep(cache, made, key)
        return made

    return processes.in_turn(read_or_make)
