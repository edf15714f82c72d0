"""How close generated answers are to the expected ones: BLEU-4 and ROUGE-1, -2 and L, as ChatGLM's ptuning/main.py counts.

    ROUGE    F of rouge_chinese over words: jieba cuts both texts into words, also Chinese ones
    BLEU-4   nltk's sentence BLEU with one reference, over single characters, smoothed by its method 3: where no 4 characters
             in a row agree, a small number stands in for their count, halved with each further length
    each     x 100, rounded to 4 digits, then the mean over all answers

These are the figures in the tables of ChatGLM's README, so that ours can stand beside them. They are not the corpus BLEU
over words of other publications. An empty answer, or an answer to an empty reference, counts 0 everywhere; the libraries
know no figure for it (rouge_chinese raises an error). Newer scores by models were not chosen: they need another model.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from qgraft.errors import UnsupportedError

SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def mean_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The mean of each of SCORES over (reference, answer) pairs. Raises UnsupportedError where a library is missing."""
    each = [score(reference, answer) for reference, answer in pairs]
    return {name: sum(scores[name] for scores in each) / len(each) for name in SCORES}


def score(reference: str, answer: str) -> dict[str, float]:
    """Each of SCORES for one answer, 0 to 100."""
    cut, rouge, bleu = load_libraries()
    if not reference.strip() or not answer.strip():
        return dict.fromkeys(SCORES, 0.0)
    found = rouge(" ".join(cut(answer)), " ".join(cut(reference)))
    scores = {name: found[name]["f"] for name in SCORES[1:]} | {"bleu-4": bleu([list(reference)], list(answer))}
    return {name: round(100 * float(scores[name]), 4) for name in SCORES}


@cache
def load_libraries() -> tuple[Callable[[str], Any], Callable[[str, str], Any], Callable[[Any, Any], float]]:
    """The functions that cut a text into words, and that compute ROUGE and BLEU; UnsupportedError names what is missing."""
    try:
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"BLEU and ROUGE are computed by jieba, nltk and rouge_chinese, and {error.name} is not installed",
            hint="pip install 'qgraft[predict]'",
        ) from error
    jieba.setLogLevel(logging.WARNING)  # it tells how long its dictionary took
    smoothing = SmoothingFunction().method3
    return (
        jieba.cut,
        lambda answer, reference: Rouge().get_scores(answer, reference)[0],
        lambda references, answer: sentence_bleu(references, answer, smoothing_function=smoothing),
    )
