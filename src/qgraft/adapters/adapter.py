"""An attached adapter is one value: its name, its kind, and the modules that it consists of.

    Adapter("law",   "lora",   {"model.layers.0.self_attn.q_proj": Lora, "model.embed_tokens": EmbeddingLora, ...})
    Adapter("style", "prefix", {"model.prefixes": PrefixEncoder})

A part is what the adapter adds in one place of the model: a torch module with its options and its weights. It stands under
the path of the module that holds it (holder.py). What is asked of an adapter (how large it is, what goes into its file, what
trains) is asked of its parts, so a new kind of part is a class with `config` and `tensors`, and a holder that computes
with it.

The value does not change; where an adapter gets other parts, the model gets another value (selection.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from qgraft.adapters.kept_rows import KeptRows
from qgraft.errors import AdapterError, worded

Kind = Literal["lora", "prefix"]


class Part(nn.Module):
    """What an adapter adds in one place of the model.

    Attributes:
        kind: of the adapters that it is a part of.
        config: its options.
    """

    kind: ClassVar[Kind]
    config: Any

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Its weights under the names that they have in a file when it stands at `path`; sharing memory, if they can."""
        raise NotImplementedError

    def taken(self, path: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(own tensor, what is to be copied into it), from tensors by the names and of the shapes of `tensors`.

        Raises AdapterError for values that it cannot have.
        """
        return [(own, state[name]) for name, own in self.tensors(path).items()]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of a model.

    Attributes:
        parts: module path -> what is there, in the order of the model.
        trained: the arguments it was trained with, as its seal has them; empty where they are not known.
        kept: rows of its training, to be merged with; None where it brings none.
    """

    name: str
    kind: Kind
    parts: Mapping[str, Part]
    trained: dict[str, Any] = field(default_factory=dict)
    kept: KeptRows | None = None

    @property
    def is_prefix(self) -> bool:
        """Whether it is keys and values in front of the attention, and not LoRAs."""
        return self.kind == "prefix"

    @property
    def configs(self) -> dict[str, Any]:
        """The options of its parts, by module path; a module that is trained whole has none."""
        return {path: part.config for path, part in self.parts.items() if part.config is not None}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its trainable tensors, by module path and name."""
        return ((f"{path}.{name}", p) for path, part in self.parts.items() for name, p in part.named_parameters())

    @property
    def size(self) -> int:
        """How many trainable numbers it has."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights under the names that they have in files; see Part.tensors."""
        return {name: tensor for path, part in self.parts.items() for name, tensor in part.tensors(path).items()}

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor]) -> None:
        """Put the weights that `state_dict` gave back, all of them or none. Raises AdapterError for impossible values."""
        pairs = [pair for path, part in self.parts.items() for pair in part.taken(path, state)]
        for own, value in pairs:
            own.copy_(value)

    def let_train(self, wanted: bool) -> None:
        """Let its weights require gradients, or not."""
        for part in self.parts.values():
            # half a millisecond faster than part.requires_grad_(), for a LoRA
            parameters = part.parameters() if part._modules else part._parameters.values()
            for parameter in parameters:
                cast(Tensor, parameter).requires_grad = wanted

    def within(self, stem: str) -> Self:
        """The adapter as the module at the path `stem` sees it: the parts below it, by their paths from there."""
        if not stem:
            return self
        below = [(path, part) for path, part in self.parts.items() if f"{path}.".startswith(f"{stem}.")]
        return replace(self, parts={path[len(stem) + 1 :]: part for path, part in below})

    def under(self, stem: str) -> Self:
        """The adapter as a model sees it in which this one's is the module at the path `stem`."""
        return replace(self, parts={join(stem, path): part for path, part in self.parts.items()}) if stem else self

    def without(self, parts: Iterable[Part]) -> Self:
        """The adapter less these parts."""
        gone = set(parts)
        return replace(self, parts={path: part for path, part in self.parts.items() if part not in gone})


def join(*paths: str) -> str:
    """One module path out of several, of which some may be empty."""
    return ".".join(filter(None, paths))


def prefix_error(action: str, names: Iterable[str]) -> AdapterError:
    """The error where `action` needs deltas and these adapters have none."""
    return AdapterError(
        f"{action}: {', '.join(map(repr, names))} is a prefix (P-Tuning v2): keys and values in front of the "
        "attention, which change no weight, so there is no delta",
        hint=worded(flags="give LoRAs alone", python="choose LoRAs with use_adapter()")
        + "; a prefix stays an adapter beside its base",
    )
