"""Forward and backward of a padding-free batch as one CUDA graph: recorded once for batches of a size, then replayed.

A small model computes faster than a CPU can start its kernels: of the 233 ms of a step of 8192 tokens of a 0.6B model the GPU
of an H100 computes 70. A graph starts all kernels of a pass at once. It reads and writes the same memory at every replay,
and knows no number that Python had when it was recorded. So a batch is put into tables of a fixed size (`StaticPass`):

    input_ids     a0 a1 a2 a3 b0 b1 b2 |  0  0  0 |        filled up to `tokens` with samples of their own, which nobody
    position_ids   0  1  2  3  0  1  2 |  0  1  2 |        learns; no kernel mixes the tokens of two samples
    bounds         0 4 7 10 10 10                          of `samples` samples, the last of no tokens
    places        of the states that predict a label, `labels` of them: the batch's own, over and over
    labels        their tokens
    weights       the weight of each, divided by what the step's loss is divided by; 0 for one that stands there again

What fills the tables up changes neither loss nor gradients: a label that weighs nothing has no gradient, and LoRAs get
none from a token without one.

Sizes are rounded up (`bucket_of`), so that few graphs serve all batches. A batch of a new size passes eagerly through its
tables, which compiles what has to be compiled; the second one is recorded (`GraphedPasses`). Its first replays are compared
with the ordinary pass of the same batch, which then counts. All graphs share one pool of memory, as large as the activations
of the largest pass. Where the model, the GPU or its memory does not go with this, the answer is a reason (`why_eager`,
`GraphedPasses.problem`), and passes go on one kernel after another.

Recording fails where a pass waits for the GPU or lets the CPU look at its numbers. So the bounds of samples are on the GPU
in a recorded pass: code that would go by the samples of one batch for all of them cannot read them.
"""

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.adapters.base import base_of, selection_of
from qgraft.attention import SAMPLES, attention_of, mark_checked
from qgraft.data.batches import IGNORED, Batch
from qgraft.kernels import varlen
from qgraft.kernels.summed_lora import casts_kept
from qgraft.linear import QuantizedLinear
from qgraft.model_parts import computed_dtype, decoder_layers, decoder_of
from qgraft.passes.decoder import by_own_forward, output_head, states_at
from qgraft.passes.loss import batch_loss, check_gradient, weighted_cross_entropy
from qgraft.rotary import by_length
from qgraft.sizes import format_size

MOST_GRAPHS = 8
JUDGED, APART = 2, 0.05  # replays of a graph, in steps of their own, that are compared; how far they may be off
ALIGNED = 64  # bytes that a table begins at a multiple of: kernels are compiled anew for other addresses
LEAST_SAMPLES = 8  # in a bucket; one of no tokens takes no time
STEP = 64  # tokens that small buckets differ by
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the tokens, that are labels
WASTE = 1.25  # times the tokens of its own bucket, that a batch takes a larger graph's

# When a pass is bound by the CPU: measured on one H100 host for the layers of a 0.6B model, forward and backward
LAUNCHES = 8e-3  # seconds that starting the kernels of a layer takes
OPERATIONS = 6  # for each weight and token, with what is no product
OF_DATA_CENTERS, OF_OTHERS = 3e12, 1.5e12  # operations a second and multiprocessor; since H100 and its kind


@dataclass(frozen=True, order=True)
class Shape:
    """How large a batch is, or the tables of a static pass are; `longest` is the most tokens of a sample."""

    tokens: int
    labels: int
    samples: int
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> "Shape":
        """That of a padding-free batch on the CPU."""
        tokens, starts = batch["input_ids"].shape[1], _starts(batch)
        ends = torch.cat([starts[1:], starts.new_tensor([tokens])])
        labels = int((batch["labels"] != IGNORED).sum())
        return cls(tokens, labels, len(starts), int((ends - starts).max()))

    def holds(self, batch: "Shape") -> bool:
        """Whether a batch of that shape, with what fills it up, has room in tables of this one."""
        return (
            batch.tokens <= self.tokens
            and batch.labels <= self.labels
            and batch.longest <= self.longest
            and batch.samples + _fillers(self.tokens - batch.tokens, self.longest) <= self.samples
        )


def bucket_of(batch: Shape, budget: int) -> Shape:
    """The tables for a batch: rounded up, tokens to quarters of powers of two, but to no more than `budget`."""
    quarter = max(STEP, 1 << max(0, batch.tokens.bit_length() - 3))
    tokens = max(batch.tokens, min(-(-batch.tokens // quarter) * quarter, budget))
    longest = min(_power(max(batch.longest, STEP)), tokens)
    labels = next(most for share in SHARES if (most := -int(-tokens * share // 1)) >= batch.labels)
    fillers = max(_fillers(tokens - batch.tokens, longest), batch.samples // 4 + 2)  # the same for as many samples
    samples = _power(max(batch.samples + fillers, LEAST_SAMPLES))
    return Shape(tokens, max(labels, 1), samples, longest)


def _fillers(tokens: int, longest: int) -> int:
    """How many samples of at most so many tokens fill up a pass by so many."""
    return -(-tokens // longest)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _starts(batch: Batch) -> Tensor:
    return (batch["position_ids"][0] == 0).nonzero()[:, 0]


class Tables:
    """Views of one block of bytes, so that one copy moves all of them; see the module's docstring."""

    def __init__(self, shape: Shape, device: torch.device, pinned: bool = False) -> None:
        sizes = {
            "input_ids": (shape.tokens, torch.int64), "position_ids": (shape.tokens, torch.int64),
            "places": (shape.labels, torch.int64), "labels": (shape.labels, torch.int64),
            "weights": (shape.labels, torch.float32), "bounds": (shape.samples + 1, torch.int32),
        }  # fmt: skip
        bytes_of = [-(-count * dtype.itemsize // ALIGNED) * ALIGNED for count, dtype in sizes.values()]
        self.block = torch.empty(sum(bytes_of), dtype=torch.uint8, device=device, pin_memory=pinned)
        parts = zip(sizes.items(), self.block.split(bytes_of), strict=True)
        views = {name: part.view(dtype)[:count] for (name, (count, dtype)), part in parts}
        self.input_ids, self.position_ids, self.places = views["input_ids"], views["position_ids"], views["places"]
        self.labels, self.weights, self.bounds = views["labels"], views["weights"], views["bounds"]

    def fill(self, batch: Batch, count: float, longest: int) -> None:
        """Write a batch on the CPU whose loss is divided by `count`, and what fills the tables up."""
        labels_T, starts, used = batch["labels"][0], _starts(batch), batch["input_ids"].shape[1]
        tokens = len(self.input_ids)
        fillers = torch.arange(used, tokens, longest)
        self.input_ids[:used], self.input_ids[used:] = batch["input_ids"][0], 0
        self.position_ids[:used] = batch["position_ids"][0]
        self.position_ids[used:] = torch.arange(tokens - used) % longest
        self.bounds.fill_(tokens)
        self.bounds[: len(starts) + len(fillers)] = torch.cat([starts, fillers])
        chosen_N = (labels_T != IGNORED).nonzero()[:, 0]
        self.weights.zero_()
        if not len(chosen_N):
            self.places.zero_()
            self.labels.zero_()
            return
        self.places.copy_(chosen_N[torch.arange(len(self.places)) % len(chosen_N)])
        self.labels.copy_(labels_T[self.places])
        weights = batch.get("weights")
        self.weights[: len(chosen_N)] = (1.0 if weights is None else weights[0][chosen_N]) / count


class StaticPass:
    """Forward and backward of whatever batch is in the tables.

    Attributes:
        loss: the weighted sum of the last one, float32; overwritten by the next.
        replay: what runs the recorded pass; None until it is.
        judged: versions of the adapter's weights that a replay was compared with the ordinary pass at.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape, label_smoothing: float = 0.0) -> None:
        self.model, self.shape, self.label_smoothing = model, shape, label_smoothing
        self.tables = Tables(shape, model.device)
        self.loss = torch.zeros((), dtype=torch.float32, device=model.device)
        self.replay: Callable[[], None] | None = None
        self.judged: list[int] = []
        self._host = self.tables
        self._bounds = self.tables.bounds.view_as(self.tables.bounds)
        mark_checked(self._bounds)  # by the eager pass
        varlen.keep_placed(self._bounds, self.tables.bounds, shape.longest)

    def may_be_judged(self, version: int) -> bool:
        """Whether a replay is to be compared: the first ones, with weights of the adapter of this version."""
        return len(self.judged) < JUDGED and version not in self.judged

    def fill(self, batch: Batch, count: float) -> None:
        """Take a batch that `shape` holds, on the CPU. A GPU is not waited for: the copy reads memory of its own."""
        on_gpu = self.model.device.type == "cuda"
        self._host = Tables(self.shape, torch.device("cpu"), pinned=on_gpu)
        self._host.fill(batch, count, self.shape.longest)
        self.tables.block.copy_(self._host.block, non_blocking=True)

    def run(self) -> None:
        """The pass, eagerly: gradients are added to those that are there."""
        bounds = self._host.bounds
        varlen.keep_placed(bounds, self.tables.bounds, self.shape.longest)
        self._learn(bounds)

    def record(self, pool: Any) -> None:
        """Let `replay` be the pass. Nothing is computed. Raises RuntimeError where it cannot be recorded."""
        self.replay = recorded(lambda: self._learn(self._bounds), pool)

    def _learn(self, bounds: Tensor) -> None:
        """Everything that a graph consists of; it must not depend on what is in the tables."""
        tables = self.tables
        with casts_kept():  # its own: A and B are others at every replay
            states_NH = states_at(
                self.model, tables.places, tables.input_ids[None], tables.position_ids[None], cu_seq_lens_q=bounds
            )
            loss, _ = weighted_cross_entropy(
                states_NH, tables.labels, tables.weights, output_head(self.model), self.label_smoothing
            )
            check_gradient(self.model, loss)
            loss.backward()
        self.loss.copy_(loss.detach())


def recorded(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """What `work` starts on the GPU, as a function that starts it again. Raises RuntimeError where that cannot be."""
    gc.collect()  # a gradient function that is left over would go on in the stream that it was made in
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),  # which torch.cuda.graph does not restore after an error
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


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
