"""WMDP, MMLU and every other task of lm-evaluation-harness (extra `[eval]`), run on a model in memory.

The harness builds the prompts, asks for log-likelihoods and computes the metrics; the numbers are its own. What is ours:
tasks from local files in the harness's prompt format, batches by tokens, log-probabilities in fp32 whatever the model's
dtype, refusals where the harness would cut a prompt or count NaN as "A", and how the answers are spread over the
letters. A model that always says "A" has a quarter of the questions right (Li et al. 2024, arXiv:2403.03218; Hendrycks et
al. 2021, arXiv:2009.03300; Gao et al. 2024, doi:10.5281/zenodo.12608602).
"""
