"""Map between the tensors of an adapter's file and their places in the model.

PEFT looks for the names of modules among the keys of a state dict, which lack the infixes of nested wrappers (FSDP, activation
checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from alter.adapter.layers import WRAPPERS
from alter.core import UserError


def expert_columns(weight: Tensor, expert: int, experts: int) -> Tensor:
    """Return a view of one expert's columns [out, r] of `alter_B` [out, (experts + 1) r]; expert 0 is the retention expert."""
    r = weight.shape[1] // (experts + 1)
    return weight[:, expert * r : (expert + 1) * r]


def check_keys(what: str, kind: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse weights with missing or extra tensors: a partly loaded adapter would forget less than it was trained to.

    Args:
        what: what errors call it.
        kind: the `peft_type` in its configuration.
        missing: names of tensors that the file lacks, which would keep their initial values.
        unexpected: names of tensors in the file that the adapter does not have.

    Raises:
        UserError: there are any.
    """
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} of its tensors {verb} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for names, verb in ((sorted(missing), "are missing"), (sorted(unexpected), "have no place in the model"))
        if names
    ]
    raise UserError(
        f"The weights of {what} do not fit its adapter_config.json (peft_type {kind}) on this model: {' and '.join(parts)}. "
        "Nothing was loaded in part: copy its whole folder again, and load it on the model it was made for."
    )


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under their names without wrappers around modules."""
    return {WRAPPERS.sub("", key): value for key, value in state_dict.items()}


def stored_tensors(model: nn.Module, clean: dict[str, Tensor], biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to write to an adapter's file.

    Args:
        model: adapted model.
        clean: its state dict, as `without_wrappers` names it.
        biases: trained biases, which go with the adapter.
    """
    prefixes = {WRAPPERS.sub("", prefix) for prefix in _get_tuner_state_dict_key_prefixes(model)}
    selected = _filter_state_dict_by_key_prefixes(clean, prefixes)
    selected.update(biases)
    # eval mode stores B expert by expert; the checkpoint format is column by column
    return {key: value.contiguous() for key, value in selected.items()}


def placed_tensors(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], nameless: Callable[[str, str], str]
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file under the names that the model has for them.

    Args:
        model: with the adapter's layers in place.
        adapter_name: of the adapter.
        state_dict: of the file.
        nameless: takes the adapter's name out of a key.

    Raises:
        UserError: tensors are missing, or have no place in the model.
    """
    prefixes = {WRAPPERS.sub("", prefix) for prefix in _get_tuner_state_dict_key_prefixes(model, adapter_name)}
    keys: dict[str, str] = {}
    for model_key in model.state_dict():
        clean = WRAPPERS.sub("", model_key)
        if not _filter_state_dict_by_key_prefixes({clean: None}, prefixes):
            continue
        key = nameless(clean, adapter_name)
        keys[key] = keys.setdefault(f"base_model.model.{key}", model_key)
    named = {keys.get(key, key): value for key, value in state_dict.items()}
    own = set(keys.values())
    places = {place for key in model.state_dict() for place in (key, f"base_model.model.{key}")}
    check_keys(f"adapter {adapter_name!r}", "ALTER", list(own - named.keys()), list(named.keys() - own - places))
    return named
