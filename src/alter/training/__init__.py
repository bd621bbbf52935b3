"""One run of `alter unlearn`, and `alter finetune`.

`run.unlearn` reads downwards: `settings`, `data`, the model in `loaded`, `preparation` (the router's fit, the frozen
passes, where the adapter goes), training by `loss` on `batches`, and `result` in the run's `folder`; `closing`
measures it, `watcher` does so while it trains. `finetune` has `starting`, `corpora`, `fitting` and `finetuned`; both
share `arguments`, `attention`, `saving` and `trackers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.training.arguments import fitting_arguments as fitting_arguments
    from alter.training.attention import attention_for_training as attention_for_training
    from alter.training.finetune import Finetune as Finetune
    from alter.training.folder import OtherInputs as OtherInputs
    from alter.training.folder import check_folder as check_folder
    from alter.training.folder import check_inputs as check_inputs
    from alter.training.folder import last_whole_checkpoint as last_whole_checkpoint
    from alter.training.folder import make_folder as make_folder
    from alter.training.folder import remove_run as remove_run
    from alter.training.folder import seal_checkpoint as seal_checkpoint
    from alter.training.progress import Steps as Steps
    from alter.training.run import unlearn as unlearn
    from alter.training.saving import check_finite as check_finite
    from alter.training.saving import save_adapter as save_adapter
    from alter.training.settings import Unlearn as Unlearn
    from alter.training.settings import batches_of_step as batches_of_step
    from alter.training.settings import branch_needs as branch_needs
    from alter.training.trackers import ReportTo as ReportTo
    from alter.training.trackers import check_trackers as check_trackers

lazy(globals())
