"""TOFU (Maini et al. 2024, arXiv:2401.06121): rows, answers and metrics of its table.

| set          | rows               | right answer for the truth ratio | probability                    |
|--------------|--------------------|----------------------------------|--------------------------------|
| forget       | forgetNN_perturbed | paraphrased                      | of the answer                  |
| retain       | retain_perturbed   | paraphrased                      | of the answer                  |
| real_authors | real_authors_pert. | plain                            | answer's share among 1 + 3     |
| world_facts  | world_facts_pert.  | plain                            | answer's share among 1 + 3     |

ROUGE-L recall is that of a greedy reply of at most 200 tokens; an empty reply is a reply: ROUGE 0, repetition 0, and a
note says how many there are. A reply that does not fit into the model's context is refused before anything is measured.

Membership attacks compare the forget set's answers with holdout rows, which no model has seen: TOFU's holdoutNN, or any
rows of your own. Five of the six come from the pass that scores the answers; `mia_gradnorm` costs a backward per row and
is made on request; `mia_reference` and PrivLeak need the retrained model. Model utility is the harmonic mean of the nine figures
of the last three sets; forget quality compares the truth ratios on the forget set with those of a model retrained
without it.
"""
