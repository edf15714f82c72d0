"""Answering people.

answering.py  one answer to a conversation, and where it ends
decoding.py   one token of one sequence in one C call, within transformers' generate()
"""
