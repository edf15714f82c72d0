"""Denoisers with LoRAs against diffusers and PEFT: outputs, gradients, losses of a run, files both ways."""

import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.functional import mse_loss

import qgraft
from qgraft import diffusion
from qgraft.diffusion.families import family_of
from qgraft.diffusion.latents import ImageSample
from qgraft.diffusion.noise import Denoising

diffusers = tiny.diffusers
NAMES = diffusion.ATTENTION.split(",")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_lora(ours, theirs, r=4, alpha=8):
    """Our LoRA on one model and PEFT's with the same weights on the other."""
    qgraft.attach_lora(ours, r, alpha, target_modules=diffusion.ATTENTION)
    state = qgraft.lora_state_dict(ours)
    for number, tensor in enumerate(state.values()):
        tensor.copy_(0.1 * randn(*tensor.shape, seed=number))
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=NAMES), theirs)
    into = dict(theirs.named_parameters())
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        into[name].data.copy_(tensor)
    return ours, theirs


# what each denoiser is given, as diffusers' training scripts and pipelines give it
TOLD = {
    "unet": (tiny.unet, lambda: ((randn(2, 4, 8, 8), torch.tensor([3, 70]), randn(2, 5, 32, seed=1)), {})),
    "sdxl": (tiny.sdxl, lambda: (
        (randn(2, 4, 8, 8), torch.tensor([3, 70]), randn(2, 5, 64, seed=1)),
        {"added_cond_kwargs": {"text_embeds": randn(2, 32, seed=2), "time_ids": randn(2, 6, seed=3)}},
    )),
    "sd3": (tiny.sd3, lambda: ((), {
        "hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 70.0]), "pooled_projections": randn(2, 64, seed=2),
        "encoder_hidden_states": randn(2, 5, 32, seed=1),
    })),
    "flux": (tiny.flux, lambda: ((), {
        "hidden_states": randn(2, 16, 16), "timestep": torch.tensor([0.3, 0.7]), "guidance": torch.tensor([3.5, 3.5]),
        "encoder_hidden_states": randn(2, 5, 32, seed=1), "pooled_projections": randn(2, 32, seed=2),
        "txt_ids": torch.zeros(5, 3), "img_ids": torch.randint(4, (16, 3)).float(),
    })),
    "pixart": (tiny.pixart, lambda: ((randn(2, 4, 8, 8),), {
        "timestep": torch.tensor([3, 70]), "encoder_hidden_states": randn(2, 5, 32, seed=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    })),
    "dit": (tiny.dit, lambda: ((randn(2, 4, 8, 8),), {
        "timestep": torch.tensor([3, 70]), "class_labels": torch.tensor([1, 7]),
    })),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("packed", [None, "q8_0", "q4_1"])
@pytest.mark.parametrize("kind", TOLD)
def test_outputs_and_gradients_are_those_of_peft(kind, packed):
    make, told = TOLD[kind]
    model, plain = make().eval(), make().eval()
    if packed:
        qgraft.quantize(model, packed)
        numbers = {
            path: each.dequantize() for path, each in model.named_modules() if isinstance(each, qgraft.QuantizedLinear)
        }
        for path, weight in numbers.items():
            plain.get_submodule(path).weight.data.copy_(weight)
        assert any(path.endswith("to_q") for path in numbers)
    ours, theirs = with_lora(model, plain)
    args, kwargs = told()
    one, other = ours(*args, **kwargs).sample, theirs(*args, **kwargs).sample
    with qgraft.adapters_off(ours):
        base = ours(*args, **kwargs).sample
    assert (one - other).abs().max() <= 1e-5
    assert (one - base).abs().max() > 1e-3  # the LoRA does something
    for each in (one, other):
        each.square().mean().backward()
    gradients = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    found = {
        name.replace(".loras.default.lora_A", ".lora_A.default.weight").replace(
            ".loras.default.lora_B", ".lora_B.default.weight"
        ): each.grad
        for name, each in ours.named_parameters()
        if each.grad is not None
    }
    assert found.keys() == gradients.keys() and len(found) > 2
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def sample(number, conditions, channels=4, side=8):
    told = {name: each[number : number + 1] for name, each in conditions.items()}
    mean, std = randn(channels, side, side, seed=10 + number), torch.full((channels, side, side), 0.1)
    return ImageSample(str(number), mean, std, None, told, (16, 16, 0, 0, 8, 8), "", "")


def noise_loss(model, schedule, samples, snr_gamma, call):
    """As train_text_to_image_lora.py computes it, drawing in its order."""
    mean, std = torch.stack([each.mean for each in samples]), torch.stack([each.std for each in samples])
    latents = mean + std * torch.randn(mean.shape)
    noise = torch.randn_like(latents)
    steps = torch.randint(0, schedule.config.num_train_timesteps, (len(samples),))
    noisy = schedule.add_noise(latents, noise, steps)
    target = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, steps)
    found = call(model, noisy, steps)
    if snr_gamma is None:
        return mse_loss(found, target)
    snr = diffusers.training_utils.compute_snr(schedule, steps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(steps)], dim=1).min(dim=1)[0]
    weights = weights / (snr if schedule.config.prediction_type == "epsilon" else snr + 1)
    return (mse_loss(found, target, reduction="none").mean(dim=[1, 2, 3]) * weights).mean()


def flow_loss(model, schedule, samples, weighting, preconditioned, call):
    """As train_dreambooth_lora_sd3.py and ..._flux.py compute it."""
    mean, std = torch.stack([each.mean for each in samples]), torch.stack([each.std for each in samples])
    latents = mean + std * torch.randn(mean.shape)
    noise = torch.randn_like(latents)
    u = diffusers.training_utils.compute_density_for_timestep_sampling(
        weighting_scheme=weighting, batch_size=len(samples), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    steps = schedule.timesteps[(u * schedule.config.num_train_timesteps).long()]
    index = [(schedule.timesteps == step).nonzero().item() for step in steps]
    sigmas = schedule.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    found = call(model, noisy, steps)
    if preconditioned:
        found = found * (-sigmas) + noisy
    weight = diffusers.training_utils.compute_loss_weighting_for_sd3(weighting_scheme=weighting, sigmas=sigmas)
    target = latents if preconditioned else noise - latents
    return (weight * (found - target) ** 2).reshape(len(samples), -1).mean(1).mean()


def call_flux(model, noisy, steps, conditions):
    pack = diffusers.FluxPipeline._pack_latents(noisy, *noisy.shape)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(
        len(noisy), noisy.shape[2] // 2, noisy.shape[3] // 2, "cpu", noisy.dtype
    )
    found = model(
        hidden_states=pack, timestep=steps / 1000, guidance=torch.full((len(noisy),), 3.5), img_ids=ids,
        txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3), **conditions,
    ).sample  # fmt: skip
    return diffusers.FluxPipeline._unpack_latents(found, noisy.shape[2] * 8, noisy.shape[3] * 8, 8)


CONDITIONS = {
    "unet": {"encoder_hidden_states": randn(4, 5, 32, seed=1)},
    "sdxl": {"encoder_hidden_states": randn(4, 5, 64, seed=1), "text_embeds": randn(4, 32, seed=2)},
    "sd3": {"encoder_hidden_states": randn(4, 5, 32, seed=1), "pooled_projections": randn(4, 64, seed=2)},
    "flux": {"encoder_hidden_states": randn(4, 5, 32, seed=1), "pooled_projections": randn(4, 32, seed=2)},
    "pixart": {
        "encoder_hidden_states": randn(4, 5, 32, seed=1), "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 4),
    },
    "dit": {"class_labels": torch.tensor([1, 2, 3, 4])},
}  # fmt: skip
CALLS = {
    "unet": lambda model, noisy, steps, c: model(noisy, steps, c["encoder_hidden_states"]).sample,
    "sdxl": lambda model, noisy, steps, c: model(noisy, steps, c["encoder_hidden_states"], added_cond_kwargs={
        "text_embeds": c["text_embeds"], "time_ids": torch.tensor([[16.0, 16, 0, 0, 8, 8]] * len(noisy))}).sample,
    "sd3": lambda model, noisy, steps, c: model(hidden_states=noisy, timestep=steps, **c).sample,
    "flux": call_flux,
    "pixart": lambda model, noisy, steps, c: model(
        noisy, timestep=steps, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **c
    ).sample.chunk(2, 1)[0],
    "dit": lambda model, noisy, steps, c: model(noisy, timestep=steps, **c).sample.chunk(2, 1)[0],
}  # fmt: skip
RUNS = [
    ("unet", {}), ("unet", {"snr_gamma": 5.0}), ("unet", {"prediction_type": "v_prediction"}),
    ("unet", {"prediction_type": "v_prediction", "snr_gamma": 5.0}),
    ("sdxl", {"snr_gamma": 5.0}), ("pixart", {}), ("dit", {}),
    ("sd3", {}), ("sd3", {"weighting_scheme": "mode"}),
    ("sd3", {"weighting_scheme": "cosmap", "precondition_outputs": False}),
    ("sd3", {"weighting_scheme": "sigma_sqrt"}), ("flux", {}), ("flux", {"weighting_scheme": "logit_normal"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", RUNS, ids=str)
def test_twenty_steps_have_the_losses_of_diffusers_and_peft(kind, options, tmp_path):
    """The same noise and time steps, drawn from one seed; AdamW on the same LoRAs."""
    ours, theirs = with_lora(TOLD[kind][0](), TOLD[kind][0]())
    family = family_of(ours)
    if family.flow:
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    else:
        told = {"prediction_type": options["prediction_type"]} if "prediction_type" in options else {}
        schedule = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", **told)
    args = diffusion.DiffusionArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, **options
    )
    objective = Denoising(family, schedule, args, kind == "flux")
    samples = [sample(number, CONDITIONS[kind]) for number in range(4)]
    optimizers = [
        torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        for model in (ours, theirs)
    ]
    losses = [[], []]
    for model in (ours, theirs):
        model.eval()  # a DiT drops labels in training, from a generator of its own
    for step in range(20):
        chosen = samples[step % 2 * 2 :][:2]
        torch.manual_seed(step)
        outcome = objective.outcome(ours, objective.batches(chosen, 0)[0])
        loss = outcome.loss / objective.count(chosen)
        torch.manual_seed(step)
        conditions = {name: torch.cat([each.conditions[name] for each in chosen]) for name in CONDITIONS[kind]}
        call = lambda model, noisy, steps, c=conditions: CALLS[kind](model, noisy, steps, c)  # noqa: E731
        if family.flow:
            expected = flow_loss(theirs, schedule, chosen, objective.weighting, objective.preconditioned, call)
        else:
            expected = noise_loss(theirs, schedule, chosen, options.get("snr_gamma"), call)
        for each, optimizer, kept in zip((loss, expected), optimizers, losses, strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
            kept.append(each.item())
    assert len(set(losses[0])) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
