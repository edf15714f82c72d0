"""Weights of labels on their way into a batch; the rest of batches is tested with the loss."""

import torch

from qgraft.data.batches import IGNORED, collate, count_labels, label_weights, split_batch, weigh_labels
from qgraft.data.tokenizing import Sample, samples_sha256

PLAIN = Sample([1, 2, 3], [IGNORED, 2, 3], "a:1")
WEIGHED = Sample([4, 5, 6, 7], [IGNORED, IGNORED, 6, 7], "a:2", [0.0, 0.0, 0.5, 2.0])


def test_weights_are_there_only_where_a_sample_has_some():
    assert "weights" not in collate([PLAIN])
    assert (
        label_weights(collate([PLAIN])) is None
        and weigh_labels(collate([PLAIN])) == count_labels(collate([PLAIN])) == 2
    )
    batch = collate([PLAIN, WEIGHED])
    assert batch["weights"].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.5, 2.0, 0.0]]
    assert label_weights(batch).tolist() == [1.0, 1.0, 0.5, 2.0] and weigh_labels(batch) == 4.5
    parts = split_batch(batch, budget=0)
    assert [weigh_labels(part) for part in parts] == [2.0, 2.5]
    assert torch.equal(torch.cat([part["weights"] for part in parts], dim=1), batch["weights"])


def test_weights_are_part_of_what_was_trained_on_and_their_absence_changes_nothing():
    """The hash of samples without weights is what it was before there were any."""
    import hashlib

    expected = hashlib.sha256(repr((PLAIN.input_ids, PLAIN.labels)).encode()).hexdigest()
    assert samples_sha256([PLAIN]) == expected
    other = Sample(WEIGHED.input_ids, WEIGHED.labels, "a:2", [0.0, 0.0, 1.5, 2.0])
    assert (
        len({samples_sha256([each]) for each in (WEIGHED, other, Sample(WEIGHED.input_ids, WEIGHED.labels, ""))}) == 3
    )
