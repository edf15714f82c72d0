"""Answering people: one answer to a conversation, and where it ends (answering.py)."""
