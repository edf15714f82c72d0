"""How far written speech is from what was said: word and character error rates.

    WER    100 x (substitutions + deletions + insertions) / words of the references, over all rows together
    CER    the same of characters, without blanks: of Chinese, Japanese and Thai, which write none between words

The edits are the fewest that make the reference of the answer (Levenshtein's distance). Words are what stands between blanks.
Texts are compared as they are: case and punctuation count, as in Hugging Face's recipe; the figures of Whisper's paper are of
normalized texts. Both can be above 100. Source: Morris, Maier, Green, From WER and RIL to MER and WIL (Interspeech 2004);
jiwer counts the same (tests/training/test_speech.py).
"""

from collections.abc import Sequence


def error_rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The "wer" and the "cer" of (reference, answer) pairs, in percent."""
    return {
        "wer": _rate([(reference.split(), answer.split()) for reference, answer in pairs]),
        "cer": _rate([("".join(reference.split()), "".join(answer.split())) for reference, answer in pairs]),
    }


def _rate(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    wrong = sum(edits(*pair) for pair in pairs)
    return 100.0 * wrong / max(sum(len(reference) for reference, _ in pairs), 1)


def edits(reference: Sequence[str], answer: Sequence[str]) -> int:
    """The fewest substitutions, deletions and insertions between them."""
    before = list(range(len(answer) + 1))
    for number, expected in enumerate(reference, 1):
        row = [number]
        for place, said in enumerate(answer):
            row.append(min(before[place] + (said != expected), before[place + 1] + 1, row[place] + 1))
        before = row
    return before[-1]
