"""Deltas into packed weights, without losing what they learned.

merge.py        merge and unmerge: solve, measure, finish, replace
calibration.py  which rows fit, which judge and which measure; neutral.jsonl is the unrelated text
exact.py        deltas that only change minimums, in closed form
lockstep.py     the adapter's model and the merged one side by side, each layer merged when the pass reaches it
store.py        solved layers on the disk, until the merge is done
layer.py        one layer: its problem from its inputs, the chain of algorithms, what was won on held-out tokens
problem.py      the least-squares problem of a layer, kept by its moments or by its tokens
algorithms.py   pure: (grid, least-squares problem) -> grid, one idea each
finish.py       when the layers are distilled together, how often, and on which rows at last
distill.py      minimums and scales of all layers together, against the adapter's logits
measure.py      losses and divergences from hidden states
report.py       what was kept: numbers, table, merge.json
"""
