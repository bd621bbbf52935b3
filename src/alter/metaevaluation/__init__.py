"""`alter meta-evaluate`: which metrics to trust.

`members` makes pools of models that know or do not know, `measuring` tries every metric on them, `formulas` rates the
metrics and `table` ranks them; `settings` and `run` are the command.
"""
