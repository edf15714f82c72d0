"""Passes of small models that are replayed as CUDA graphs (static_pass.py), and which are not.

A small model computes faster than a CPU can start its kernels: of the 233 ms of a step of 8192 tokens of a 0.6B model the GPU
of an H100 computes 70. A graph starts all kernels of a pass at once.

Sizes are rounded up (`bucket_of`), so that few graphs serve all batches. A batch of a new size passes eagerly through its
tables, which compiles what has to be compiled; the second one is recorded (`GraphedPasses`). Its first replays are compared
with the ordinary pass of the same batch, which then counts. All graphs share one pool of memory, as large as the activations
of the largest pass. Where the model, the GPU or its memory does not go with this, the answer is a reason (`why_eager`,
`GraphedPasses.problem`), and passes go on one kernel after another.
"""

import re
from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.adapters.base import base_of, selection_of
from qgraft.adapters.token_rows import token_rows_of
from qgraft.attention import SAMPLES, attention_of
from qgraft.data.batches import Batch
from qgraft.kernels import varlen
from qgraft.linear import QuantizedLinear
from qgraft.model_parts import computed_dtype, decoder_layers, decoder_of
from qgraft.passes.decoder import by_own_forward
from qgraft.passes.loss import batch_loss
from qgraft.passes.static_pass import Shape, StaticPass, bucket_of
from qgraft.rotary import by_length
from qgraft.sizes import format_size

MOST_GRAPHS = 8
APART = 0.05  # how far a replay may be off
WASTE = 1.25  # times the tokens of its own bucket, that a batch takes a larger graph's

# When a pass is bound by the CPU: measured on one H100 host for the layers of a 0.6B model, forward and backward
LAUNCHES = 8e-3  # seconds that starting the kernels of a layer takes
OPERATIONS = 6  # for each weight and token, with what is no product
OF_DATA_CENTERS, OF_OTHERS = 3e12, 1.5e12  # operations a second and multiprocessor; since H100 and its kind


class GraphedPasses:
    """The passes of a run: each batch takes the graph of its size, or tells that it goes the eager way.

    Attributes:
        problem: why nothing is replayed any more, once something went wrong.
        replayed, recorded: how many passes and graphs there were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Sequence[nn.Parameter],
        budget: int,
        most: float = inf,
        label_smoothing: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            parameters: those that are trained, with gradients that stay where they are.
            budget: the most tokens of a pass, which no bucket goes beyond.
            most: tokens of a pass that is replayed, see launch_bound.
            say: takes a line for people.
        """
        self.model, self.parameters, self.budget = model, parameters, budget
        self.most, self.label_smoothing, self._say = most, label_smoothing, say
        self.problem: str | None = None
        self.replayed = self.recorded = 0
        self._passes: dict[Shape, StaticPass] = {}
        self._pool: Any = None
        self._pool_bytes = 0
        self._known: tuple[Any, ...] = ()

    def learn(self, batch: Batch, count: float) -> Tensor | None:
        """The loss of a batch on the CPU, divided by `count`; its gradients are added. None: nothing was done.

        The tensor is overwritten by the next pass.
        """
        if self.problem is not None or any(parameter.grad is None for parameter in self.parameters):
            return None
        known = self._written_in()
        if known != self._known:
            self._passes, self._known = {}, known
        chosen = self._pass_for(Shape.of(batch))
        if chosen is None:
            return None
        chosen.fill(batch, count)
        if chosen.shape not in self._passes:
            self._passes[chosen.shape] = chosen
        elif chosen.replay is None:
            self._record(chosen)
        if chosen.replay is None:
            chosen.run()
        else:
            self.replayed += 1
            if chosen.may_be_judged(version := self.parameters[0]._version):
                chosen.judged.append(version)
                return self._judge(chosen, batch, count)
            chosen.replay()
        return chosen.loss

    def _judge(self, passing: StaticPass, batch: Batch, count: float) -> Tensor:
        """The loss of the ordinary pass, whose gradients are added; a replay that comes to others is the last."""
        assert passing.replay is not None
        before = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

        def added() -> Tensor:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            return torch.cat([(now - then).flatten() for now, then in zip(gradients, before, strict=True)])

        passing.replay()
        replayed, gradient = passing.loss.clone(), added()
        for parameter, then in zip(self.parameters, before, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(then)
        loss = batch_loss(self.model, batch, self.label_smoothing) / count
        loss.backward()
        expected = added()
        off = torch.stack([(replayed - loss).abs() / loss.abs(), (gradient - expected).norm() / expected.norm()])
        apart = float(off.detach().max())
        if apart > APART or (isnan(apart) and bool(loss.isfinite()) and bool(expected.any())):
            self._give_up(passing, RuntimeError(f"a replayed pass came to a result that is {apart:.1%} off"))
        return loss.detach()

    def close(self) -> None:
        """Let the graphs and their memory go."""
        self._passes, self._pool = {}, None

    def _pass_for(self, batch: Shape) -> StaticPass | None:
        """That of the batch's own bucket; else of a graph that holds it; a new one; or None."""
        own = bucket_of(batch, self.budget)
        graphs = [each for each in self._passes.values() if each.replay is not None]
        if own in self._passes and (self._passes[own].replay is not None or len(graphs) < MOST_GRAPHS):
            return self._passes[own]
        full = len(graphs) >= MOST_GRAPHS
        holding = sorted((each.shape, each) for each in graphs if each.shape.holds(batch))
        for shape, each in holding[:1]:
            if shape.tokens <= WASTE * own.tokens or (full and shape.tokens <= self.most):
                return each
        return None if full or own.tokens > self.most else StaticPass(self.model, own, self.label_smoothing)

    def _record(self, passing: StaticPass) -> None:
        """Record a pass, or say why nothing is from now on; gradients stay as they are."""
        try:
            if self.model.device.type == "cuda":
                self._record_in_pool(passing)
            else:
                passing.record(None)
        except (RuntimeError, TypeError, ValueError) as error:
            self._give_up(passing, error)
            return
        self.recorded += 1
        if self.recorded == 1:
            self._say("cuda_graphs: passes are recorded once for each size of batch, and replayed")

    def _record_in_pool(self, passing: StaticPass) -> None:
        """Raises RuntimeError also where a pass that is not replayed would have no memory beside the graphs."""
        device = self.model.device
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        passing.record(self._pool)
        self._pool_bytes += max(0, torch.cuda.memory_reserved(device) - before)
        free = torch.cuda.mem_get_info(device)[0]
        if free < self._pool_bytes:
            held, left = format_size(self._pool_bytes), format_size(free)
            raise RuntimeError(f"they hold {held}, and {left} are left for passes that are not replayed")

    def _give_up(self, passing: StaticPass, error: BaseException) -> None:
        passing.replay = None
        self.close()
        if self.model.device.type == "cuda":  # or random numbers would wait for the end of the recording
            generator = torch.cuda.default_generators[self.model.device.index]
            generator.graphsafe_set_state(generator.clone_state())
        while error.__context__ is not None:  # what the end of a recording says only tells that there was something
            error = error.__context__
        self.problem = (str(error) or type(error).__name__).splitlines()[0]
        self._say(f"cuda_graphs: passes go on one kernel after another: {self.problem}")

    def _written_in(self) -> tuple[Any, ...]:
        """What goes into a graph beside the tables: where weights and gradients are, and which adapters take part."""
        addresses = (t.data_ptr() for p in self.parameters for t in (p, p.grad) if t is not None)
        return (*addresses, *selection_of(self.model).now().weights.items(), self.model.training)


def launch_bound(model: PreTrainedModel) -> int:
    """The most tokens of a pass whose kernels take longer to be started than they take on the model's GPU."""
    layers = decoder_layers(model)
    modules = [module for layer in layers for module in layer.modules()]
    weights = sum(m.in_features * m.out_features for m in modules if isinstance(m, QuantizedLinear | nn.Linear))
    has = torch.cuda.get_device_properties(model.device)
    in_data_centers = has.major in (9, 10)
    rate = has.multi_processor_count * (OF_DATA_CENTERS if in_data_centers else OF_OTHERS)
    return int(LAUNCHES * len(layers) * rate / (OPERATIONS * max(weights, 1)))


def why_eager(model: PreTrainedModel) -> str | None:
    """What keeps the passes of a model, as it is about to train, from being recorded; None where nothing does."""
    if model.device.type != "cuda":
        return "the model is not on a GPU"
    if model.device.index != torch.cuda.current_device():
        return f"the model is on another GPU than the current one, {torch.cuda.current_device()}"
    if (dtype := computed_dtype(model)) != torch.bfloat16:
        return f"the model computes in {str(dtype).removeprefix('torch.')}, the kernel of packed samples in bfloat16"
    if not varlen.status()[0]:
        return varlen.status()[1]
    return why_changing(model)


def why_changing(model: PreTrainedModel) -> str | None:
    """What makes a pass of the model another one than the pass before, beside the numbers in its tables."""
    name, config = type(model).__name__, model.config.get_text_config()
    selection = selection_of(model)
    active = [selection.adapters[each] for each in selection.weights]
    kinds = set(getattr(config, "layer_types", None) or ())
    if attention_of(model) != SAMPLES or by_own_forward(model):
        return f"{name} does not attend sample by sample"
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return f"{name} has layers that attend in other ways than to all before, or to a window"
    if by_length(model):
        return f"the rotation of {name} goes by the length of the text"
    if any(adapter.is_prefix for adapter in active):
        return "a prefix is trained"
    if any(getattr(config, "use_dora", False) for adapter in active for config in adapter.configs.values()):
        return "a DoRA computes the lengths of its rows in every pass"
    if any(map(token_rows_of, active)):
        return "rows of tokens are trained"
    return _why_random(model, active) or _why_hooked(model)


def _why_random(model: PreTrainedModel, active: Sequence[Any]) -> str | None:
    if any(part.lora_dropout for adapter in active for part in adapter.configs.values()):
        return "lora_dropout draws anew in every pass"
    said = model.config.get_text_config().to_dict().items()  # what functions drop, configurations call by such names
    named = [value for name, value in said if re.search("drop|jitter|noise", name) and "classifier" not in name]
    dropped = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if dropped or any(isinstance(value, float) and value > 0 for value in named):
        return "the model drops at random in training"
    return None


def _why_hooked(model: PreTrainedModel) -> str | None:
    own = [handle.id for module in (model, decoder_of(model)) for handle in base_of(module).hooks]
    for path, module in model.named_modules():
        hooks = {**module._forward_hooks, **module._forward_pre_hooks, **module._backward_hooks}
        others = {key for key, hook in hooks.items() if not getattr(hook, "__module__", "").startswith("transformers.")}
        if others - set(own):
            return f"{path or 'the model'} has a hook, which no replay would run"
    return None
