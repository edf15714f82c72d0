"""The forward and backward passes of a run: one kernel after another, or replayed as CUDA graphs (passes/graphed.py).

cuda_graphs   auto   where a pass takes longer to start than to compute, which is so for small models on a GPU
              yes    wherever it can be; an error that says why where it cannot
              no     nowhere
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from qgraft.compat import asks_for_checkpointing
from qgraft.errors import OptionError, option
from qgraft.linear import computing
from qgraft.memory.budget import CPU_TOKENS, GPU_EVAL_TOKENS, on_gpu
from qgraft.memory.copies import copies_kept
from qgraft.memory.settings import settle_noted
from qgraft.model_parts import CAUSAL, is_encoder_decoder, task_of
from qgraft.passes.decoder import padding_free
from qgraft.passes.frozen_cache import frozen_layers_cached
from qgraft.passes.fused import fused_modules
from qgraft.passes.graphed import GraphedPasses, launch_bound, why_eager
from qgraft.passes.loss import check_gradient
from qgraft.passes.neftune import Noisy, noisy_embeddings
from qgraft.training.arguments import TrainArguments
from qgraft.training.images import IMAGES, holds_images
from qgraft.training.objective import Objective, Outcome, SupervisedFineTuning
from qgraft.training.optimization import Optimization
from qgraft.training.padded import padded_passes
from qgraft.training.speech import kind_of

if TYPE_CHECKING:
    from qgraft.training.prepare import Prepared


class Passes:
    """What adds the gradients of a batch to those of the step.

    Attributes:
        graphs: which batches are replayed; None where all pass eagerly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainArguments,
        objective: Objective,
        optimization: Optimization,
        graphs: GraphedPasses | None = None,
    ) -> None:
        self.model, self.args, self.objective, self.optimization = model, args, objective, optimization
        self.graphs = graphs

    def learn(self, batch: Any, count: float) -> Outcome:
        """The loss of a batch divided by `count`, without gradient, and its metrics.

        On a CPU a loss that is not finite adds no gradient. A GPU is not waited for: there it goes with the step.
        """
        replayed = None if self.graphs is None else self.graphs.learn(batch, count)
        if replayed is not None:
            return Outcome(replayed)
        alpha = self.args.neftune_noise_alpha
        noise = noisy_embeddings(self.model, [Noisy(batch["position_ids"][0], alpha)]) if alpha else nullcontext()
        with noise, torch.autocast("cuda", torch.float16, enabled=self.args.fp16):
            outcome = self.objective.outcome(self.model, batch)
            loss = outcome.loss / count
        check_gradient(self.model, loss)
        if may_be_learned(loss):
            self.optimization.backward(loss)
        return Outcome(loss.detach(), outcome.metrics)


def may_be_learned(loss: torch.Tensor) -> bool:
    """Whether the loss is finite; on a GPU, which would have to be waited for, it is taken for that."""
    return loss.is_cuda or bool(torch.isfinite(loss))


def graphs_of(
    model: PreTrainedModel,
    args: TrainArguments,
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    budget: int,
    say: Callable[[str], None],
) -> GraphedPasses | None:
    """The graphs of a run as args.cuda_graphs says, with the model as it is about to train; None for none.

    Args:
        parameters: those that are trained.
        budget: most tokens in a pass.
        say: takes a line for people.
    """
    supervised = isinstance(objective, SupervisedFineTuning)
    if not supervised or args.cuda_graphs == "no" or _why_not(model, args) is not None:
        return None
    most = inf if args.cuda_graphs == "yes" else launch_bound(model)
    return GraphedPasses(model, parameters, budget, most, args.label_smoothing_factor, say)


def check_graphs(model: PreTrainedModel, args: TrainArguments) -> None:
    """Raise OptionError where args asks for graphs by name, and they cannot be."""
    if args.cuda_graphs == "yes" and (reason := _why_not(model, args)) is not None:
        raise OptionError(f"cuda_graphs=yes: {reason}", hint=f"{option('cuda_graphs', 'auto')} takes them where it can")


def _why_not(model: PreTrainedModel, args: TrainArguments) -> str | None:
    """What of the options or the model does not go with graphs."""
    reasons = {
        "gradient checkpointing runs layers again in the backward pass": asks_for_checkpointing(args),
        "fp16 computes by autocast, with a scaled loss": args.fp16,
        "cache_frozen_layers reads from the disk in a pass": args.cache_frozen_layers,
        "neftune_noise_alpha draws other noise in every pass": bool(args.neftune_noise_alpha),
        "full_determinism: which passes are replayed depends on those before": args.full_determinism,
        "several processes add up their gradients": args.world_size > 1,
        "memory_limit leaves no room that was not asked for": args.cuda_graphs == "auto"
        and args.memory_limit not in (None, "auto"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or why_eager(model)


@contextmanager
def fastest_passes(
    model: PreTrainedModel, prepared: "Prepared", console: Console | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Within the block samples take the fastest way through the model; yields the tokens of a pass, and metrics."""
    args, samples, notes = prepared.args, prepared.longest, prepared.notes
    if is_encoder_decoder(model.config):
        with padded_passes(model, kind_of(model), args, samples, notes) as tokens:
            yield tokens, {}
        return
    if holds_images(samples):
        with padded_passes(model, IMAGES, args, samples, notes) as tokens:
            yield tokens, {}
        return
    with ExitStack() as stack:
        stack.enter_context(computing(model, args.compute))
        if task_of(model) != CAUSAL:
            yield args.max_tokens_per_pass or (GPU_EVAL_TOKENS if on_gpu(args) else CPU_TOKENS), {}
            return
        if problem := stack.enter_context(padding_free(model, [text for each in samples for text in each.texts])):
            notes.append(f"{problem}; every sample passes through the model alone")
        stack.enter_context(fused_modules(model))
        if prepared.lesson is not None and prepared.lesson.teacher is not None:
            stack.enter_context(prepared.lesson.teacher.ready(samples))
        found = settle_noted(model, args, samples, bool(problem), notes, console)
        check_graphs(model, args)
        stack.enter_context(copies_kept(model, args, found[1], notes))
        if args.cache_frozen_layers:
            every = [*samples, *prepared.eval_samples]
            notes += (said := stack.enter_context(frozen_layers_cached(model, every, prepared.folder)))
            if console is not None:
                console.print(*said, sep="\n", highlight=False)
        yield found
