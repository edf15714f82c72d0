"""Options of training a denoiser, what has no meaning for one, and that diffusers may be missing."""

import sys

import pytest

from qgraft import diffusion
from qgraft.cli.main import main
from qgraft.diffusion.arguments import DiffusionArguments
from qgraft.errors import InstallationError, OptionError, UnsupportedError


def test_options_of_texts_are_refused_at_once(tmp_path):
    with pytest.raises(OptionError) as raised:
        DiffusionArguments(
            output_dir=str(tmp_path), template="chatml", max_length=100, stage="dpo", neftune_noise_alpha=5
        )
    for name in ("template", "max_length", "stage", "neftune_noise_alpha"):
        assert name in raised.value.message


@pytest.mark.parametrize(
    "options, told",
    [
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"resolution": 4}, "resolution"),
        ({"prediction_type": "sample"}, "expected epsilon, v_prediction"),
        ({"weighting_scheme": "uniform"}, "expected sigma_sqrt"),
        ({"instance_prompt": "a", "caption_column": "b"}, "give one of them"),
        ({"finetuning_type": "p_tuning"}, "finetuning_type"),
        ({"exact": True}, "exact"),
    ],
)
def test_impossible_options_are_refused(options, told, tmp_path):
    with pytest.raises(OptionError, match=told):
        DiffusionArguments(output_dir=str(tmp_path), **options)


def test_alpha_is_the_rank_where_it_is_not_said(tmp_path):
    assert DiffusionArguments(output_dir=str(tmp_path), r=8).lora_alpha == 8
    assert DiffusionArguments(output_dir=str(tmp_path), r=8, lora_alpha=4.0).lora_alpha == 4


def test_an_unknown_option_names_the_command(capsys):
    assert main(["diffuse", "--quite_unlike_any", "1"]) == 2
    assert "qgraft diffuse --help" in capsys.readouterr().err


def test_without_diffusers_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InstallationError, match="diffusers") as raised:
        diffusion.load(tmp_path)
    assert "qgraft[diffusion]" in str(raised.value.hint)


def test_a_language_model_is_no_denoiser(tmp_path):
    from torch import nn

    with pytest.raises(UnsupportedError, match="Linear is no denoiser"):
        diffusion.train(nn.Linear(2, 2), DiffusionArguments(output_dir=str(tmp_path)))
