"""The maths of training, on torch alone, without a collective: losses, advantages, corrections, metrics.

rows.py        the contract of a policy loss, also of the user's own
losses.py      policy losses, KL estimators, corrections, aggregation, the critic's loss
algorithms.py  the table of algorithms: which loss, which advantage, which defaults
advantages.py  from rewards to advantages
preference.py, sequences.py, distillation.py   losses of the kinds without rollouts
metrics.py     what a loss may measure; evaluation.py: what held-out samples say
"""
