"""The objective of a denoiser: how much of what a step has added to an image it finds. An Objective of the loop.

    latents   x = mean + std e_1               drawn anew from what the VAE says of the image
    noise     n = e_2 (+ noise_offset e_3)     e are standard normal; e_3 is one number for a channel

    noise prediction   t uniform in 0 .. T-1;  x_t = sqrt(a_t) x + sqrt(1 - a_t) n,   a_t = alphas_cumprod of the schedule
        epsilon        loss = w_t mean (f(x_t, t) - n)^2
        v_prediction   loss = w_t mean (f(x_t, t) - (sqrt(a_t) n - sqrt(1 - a_t) x))^2
        snr_gamma      w_t = min(SNR_t, gamma) / SNR_t, of v min(SNR_t, gamma) / (SNR_t + 1),  SNR_t = a_t / (1 - a_t)
                       (Hang et al. 2023, arXiv:2303.09556); 1 without it
    flow matching      u drawn as weighting_scheme says, t = T u;  x_t = (1 - s_t) x + s_t n,  s_t = sigmas of the schedule
                       loss = w mean (f(x_t, t) - (n - x))^2;  compared as images (precondition_outputs) that is times s_t^2
                       (Esser et al. 2024, arXiv:2403.03206)

The loss of a step is the mean over its images, as in diffusers' scripts. All is drawn on the CPU, batch after batch and in
the order of the scripts (x, n, offset, t), so a seed gives the same run on every device. Held-out images have draws of
their own, the same ones whenever they are measured.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgraft.diffusion.arguments import OF_FLOW, OF_NOISE, PREDICTIONS, DiffusionArguments
from qgraft.diffusion.denoisers import diffusers, frozen_parameter
from qgraft.diffusion.families import Family
from qgraft.diffusion.latents import ImageSample
from qgraft.errors import OptionError, UnsupportedError, option
from qgraft.passes.decoder import evaluating
from qgraft.training.objective import Outcome
from qgraft.training.processes import Processes


@dataclass(frozen=True, eq=False)
class Drawn:
    """A batch with all that chance has a part in, on the CPU.

    Attributes:
        latents, noise: [B, C, h, w] float32.
        steps: [B] numbers of time steps, counted in the schedule's tables.
    """

    samples: list[ImageSample]
    latents: Tensor
    noise: Tensor
    steps: Tensor


@dataclass(frozen=True)
class HeldOut:
    """The mean loss of held-out images."""

    loss: float
    images: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """For the log."""
        return {"loss": self.loss}


class Denoising:
    """See the module's docstring."""

    names: Sequence[str] = ()

    def __init__(self, family: Family, scheduler: Any, args: DiffusionArguments, guided: bool) -> None:
        """`guided`: whether the denoiser is told a guidance. Raises OptionError for options without meaning here."""
        self.family, self.scheduler, self.args = family, scheduler, args
        self.batch_size = args.per_device_train_batch_size
        self.count_of_steps = int(scheduler.config.num_train_timesteps)
        if not guided and args.guidance_scale is not None:
            raise OptionError("guidance_scale: the denoiser is told none", hint="leave it out")
        self.guidance = 3.5 if args.guidance_scale is None else args.guidance_scale
        if family.flow:
            self._settle_flow()
        else:
            self._settle_noise()

    def _settle_noise(self) -> None:
        args, scheduler = self.args, self.scheduler
        args.refuse(OF_FLOW[:-1], "it is of flow matching, and this denoiser predicts noise")
        self.prediction = args.prediction_type or scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            expected = " or ".join(PREDICTIONS)
            raise UnsupportedError(f"the scheduler's prediction_type is {self.prediction!r}: expected {expected}")
        alphas = scheduler.alphas_cumprod.double()
        self.signal, self.spread = alphas.sqrt().float(), (1 - alphas).sqrt().float()
        weights = torch.ones_like(alphas)
        if args.snr_gamma is not None:
            snr = alphas / (1 - alphas)
            least = snr.clamp(max=args.snr_gamma)
            weights = least / snr if self.prediction == "epsilon" else least / (snr + 1)
            if not bool(weights.isfinite().all()):
                raise OptionError("snr_gamma: the last step of the schedule is noise alone, whose epsilon has no weight",
                                  hint=option("prediction_type", "v_prediction"))  # fmt: skip
        self.weights = weights.float()

    def _settle_flow(self) -> None:
        args, family = self.args, self.family
        args.refuse(OF_NOISE, "it is of noise prediction, and this denoiser predicts a flow")
        self.weighting = args.weighting_scheme or family.weighting
        self.preconditioned = family.preconditioned if args.precondition_outputs is None else args.precondition_outputs
        of = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
        for name, scheme in of.items():
            if getattr(args, name) is not None and self.weighting != scheme:
                raise OptionError(
                    f"{name}: weighting_scheme is {self.weighting}", hint=option("weighting_scheme", scheme)
                )
        self.spread = self.scheduler.sigmas[: self.count_of_steps]
        self.signal = 1 - self.spread
        weights = diffusers().training_utils.compute_loss_weighting_for_sd3(self.weighting, self.spread)
        self.weights = weights * self.spread**2 if self.preconditioned else weights

    @property
    def schedule_sha256(self) -> str:
        """A hash of the pipeline's schedule: how much noise each step has, and what is predicted by default."""
        told = f"{self.scheduler.config.get('prediction_type')} {self.spread.tolist()}"
        return hashlib.sha256(told.encode()).hexdigest()

    # --- the objective of a run

    def begin(
        self, model: Any, every: Sequence[Any], own: Sequence[Any], tokens: int, processes: Processes, step: int
    ) -> tuple[Sequence[Any], float]:
        """As they are: each image is learned by itself."""
        return own, self.count(every)

    def count(self, samples: Sequence[ImageSample]) -> float:
        """The images."""
        return len(samples)

    def batches(self, samples: Sequence[ImageSample], tokens: int) -> list[Drawn]:
        """So many images in each as per_device_train_batch_size says."""
        return self._drawn(samples, self.batch_size, None)

    def outcome(self, model: Any, batch: Drawn) -> Outcome:
        """The sum of the images' losses."""
        return Outcome(self._losses(model, batch).sum())

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {}

    @torch.no_grad()
    def evaluate(self, model: Any, samples: Sequence[ImageSample], tokens: int, processes: Processes) -> HeldOut:
        """The mean loss of the images, with draws that depend on the seed alone."""
        drawn = self._drawn(samples, self.batch_size, torch.Generator().manual_seed(self.args.seed))
        with evaluating(model):
            total = sum(self._losses(model, batch).sum().item() for batch in drawn)
        return HeldOut(total / len(samples), len(samples))

    # --- a batch

    def _drawn(self, samples: Sequence[ImageSample], size: int, generator: torch.Generator | None) -> list[Drawn]:
        parts = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
        return [self._draw(part, generator) for part in parts]

    def _draw(self, samples: list[ImageSample], generator: torch.Generator | None) -> Drawn:
        sides = [(each.mean, each.std) for each in samples]
        if self.args.random_flip:
            mirrored = torch.rand(len(samples), generator=generator) < 0.5
            sides = [each.mirrored if flip and each.mirrored else side
                     for each, side, flip in zip(samples, sides, mirrored.tolist(), strict=True)]  # fmt: skip
        mean, std = (torch.stack(tensors) for tensors in zip(*sides, strict=True))
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if self.args.noise_offset:
            noise = noise + self.args.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator)
        return Drawn(samples, latents, noise, self._steps(len(samples), generator))

    def _steps(self, count: int, generator: torch.Generator | None) -> Tensor:
        if not self.family.flow:
            return torch.randint(0, self.count_of_steps, (count,), generator=generator)
        args = self.args
        shares = diffusers().training_utils.compute_density_for_timestep_sampling(
            self.weighting, count, logit_mean=0.0 if args.logit_mean is None else args.logit_mean,
            logit_std=1.0 if args.logit_std is None else args.logit_std,
            mode_scale=1.29 if args.mode_scale is None else args.mode_scale, generator=generator,
        )  # fmt: skip
        return (shares * self.count_of_steps).long().clamp(0, self.count_of_steps - 1)

    def _losses(self, model: Any, batch: Drawn) -> Tensor:
        """The weighted loss of each image, [B] float32."""
        frozen = frozen_parameter(model)
        latents, noise = batch.latents.to(frozen.device), batch.noise.to(frozen.device)
        signal, spread, weights = (
            table[batch.steps].to(frozen.device) for table in (self.signal, self.spread, self.weights)
        )
        signal, spread = signal.view(-1, 1, 1, 1), spread.view(-1, 1, 1, 1)
        noisy = (signal * latents + spread * noise).to(frozen.dtype)
        steps = self.scheduler.timesteps[batch.steps] if self.family.flow else batch.steps
        given = {
            name: torch.cat([each.conditions[name] for each in batch.samples]).to(frozen.device)
            for name in batch.samples[0].conditions
        }
        given = {name: each.to(frozen.dtype) if each.is_floating_point() else each for name, each in given.items()}
        places = torch.tensor([each.places for each in batch.samples], device=frozen.device)
        found = self.family.predict(model, noisy, steps.to(frozen.device), given, places, self.guidance).float()
        return weights * (found - self._target(latents, noise, signal, spread)).square().flatten(1).mean(1)

    def _target(self, latents: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        if self.family.flow:
            return noise - latents
        return noise if self.prediction == "epsilon" else signal * noise - spread * latents
