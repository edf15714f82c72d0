"""What a pipeline's scheduler says, beside the class of diffusers that it names; and what latents are made of."""

import json
import os

import pytest
import tiny
import torch

from qgraft import diffusion
from qgraft.diffusion.denoisers import scheduler_of
from qgraft.diffusion.families import family_named
from qgraft.diffusion.latents import made_of
from qgraft.errors import CheckpointError, UnsupportedError

diffusers = tiny.diffusers
NOISE, FLOW = family_named("UNet2DConditionModel"), family_named("FluxTransformer2DModel")


def said(folder, name, config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return str(folder)


@pytest.mark.parametrize(
    "name, config",
    [
        ("PNDMScheduler", {"beta_schedule": "scaled_linear", "skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "beta_end": 0.012}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
        ("LCMScheduler", {}),  # whose defaults are not DDPM's
        ("TCDScheduler", {}),
        ("HeunDiscreteScheduler", {}),
    ],
)
def test_the_schedule_is_that_of_the_class(tmp_path, name, config):
    found, own = scheduler_of(said(tmp_path, name, config), NOISE), getattr(diffusers, name)(**config)
    assert torch.equal(found.alphas_cumprod, own.alphas_cumprod)
    assert found.config.prediction_type == own.config.prediction_type


@pytest.mark.parametrize(
    "family, name, config, error, match",
    [
        (NOISE, "EDMEulerScheduler", {}, UnsupportedError, "is a EDMEulerScheduler, expected one of noise prediction"),
        (NOISE, "FlowMatchHeunDiscreteScheduler", {}, UnsupportedError, "expected one of noise prediction"),
        (NOISE, "CogVideoXDDIMScheduler", {}, UnsupportedError, "expected one of noise prediction"),
        (NOISE, "NoneSuchScheduler", {}, UnsupportedError, "expected one of noise prediction"),
        (NOISE, "UniPCMultistepScheduler", {"use_flow_sigmas": True}, UnsupportedError, "has use_flow_sigmas=True"),
        (
            NOISE,
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            UnsupportedError,
            "timestep_type='continuous'",
        ),
        (NOISE, "DDPMScheduler", {"trained_betas": [0.1, 0.2]}, CheckpointError, "no schedule of 1000 steps"),
        (NOISE, "DDPMScheduler", {"beta_start": -0.5}, CheckpointError, "no schedule of 1000 steps"),
        (FLOW, "FlowMatchEulerDiscreteScheduler", {"shift": 0.0}, CheckpointError, "no schedule of 1000 steps"),
        (FLOW, "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, UnsupportedError, "has invert_sigmas=True"),
        (FLOW, "FlowMatchHeunDiscreteScheduler", {}, UnsupportedError, "expected FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_other_schedules_are_refused(tmp_path, family, name, config, error, match):
    with pytest.raises(error, match=match):
        scheduler_of(said(tmp_path, name, config), family)


def test_latents_are_made_anew_when_the_pipeline_changes(tmp_path):
    weights, index = tmp_path / "vae" / "weights", tmp_path / "model_index.json"
    weights.parent.mkdir()
    weights.write_text("one")
    index.write_text("{}")
    args = diffusion.DiffusionArguments(output_dir=str(tmp_path), use_cpu=True)
    found = [made_of([], args, str(tmp_path), "torch.float32") for _ in range(2)]
    times = weights.stat()
    weights.write_text("two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync -t leave it
    found.append(made_of([], args, str(tmp_path), "torch.float32"))
    index.write_text('{"id2label": {}}')  # what a DiT's captions mean
    found.append(made_of([], args, str(tmp_path), "torch.float32"))
    assert found[0] == found[1] and len(set(found)) == 3
