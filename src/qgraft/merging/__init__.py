"""Deltas into packed weights, without losing what they learned.

algorithms.py   pure: (grid, least-squares problem) -> grid, one idea each
exact.py        deltas that only change minimums, in closed form
layer.py        one layer: its problem from its inputs, the chain of algorithms, what was won on held-out tokens
lockstep.py     the adapter's model and the merged one side by side, each layer merged when the pass reaches it
distill.py      the real-valued parameters of all layers together, against the adapter's logits
calibration.py  which rows calibrate and which measure; neutral.jsonl is the unrelated text
merge.py        merge and unmerge
work.py         one merge: measure, solve, measure, distill
measure.py      losses and divergences from hidden states
report.py       what was kept: numbers, table, merge.json, merge.png
"""
