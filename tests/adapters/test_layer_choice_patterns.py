"""layers_pattern with groups of its own, as a file may have them."""

from qgraft.adapters.layer_choice import layer_number


def test_groups_of_a_pattern_are_no_numbers() -> None:
    assert layer_number("model.layers.3.mlp", "layers") == 3
    assert layer_number("model.layers.3.mlp", ["h", "layers"]) == 3
    for pattern in ("(layers)", "(h)?layers", "(?:h|layers)(x)?"):
        assert layer_number("model.layers.3.mlp", pattern) is None
