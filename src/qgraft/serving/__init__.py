"""Answering people.

decoding.py   one token of one sequence in one C call, within transformers' generate()
"""
