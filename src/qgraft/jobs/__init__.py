"""Several adapters trained on one base at once.

train.py       train_jobs(): whole runs whose steps are taken together
joint_step.py  one forward and backward pass for the batches of several jobs
segments.py    one packed row whose tokens use different LoRAs
"""
