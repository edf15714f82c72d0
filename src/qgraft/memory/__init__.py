"""What a run will hold, and the setting that fits.

measure.py   bytes that a pass keeps, counted on the model itself
settings.py  the estimate of a run, and the fastest setting below a limit
copies.py    what a GPU has left, filled with unpacked weights
budget.py    how many tokens go through a model at a time where nobody says it
"""
