"""What adapters add in a decoder that kernels compute (decoding_network.py): structures of some LoRAs with their weights.

One network serves any number of them, and a new adapter, or another choice, makes nothing anew but its own structures. As a
network does, they list what the modules held when they were made, and are compared before each token.
"""

from collections.abc import Callable, Container, Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.lora import Lora
from qgraft.adapters.lora_experts import ExpertLora
from qgraft.errors import UnsupportedError
from qgraft.kernels import decoder
from qgraft.passes.decoding_network import Network

Weights = Mapping[str, float]


class DecoderLoras:
    """The structures of some adapters on the layers of a network.

    Raises UnsupportedError or ValueError, with the reason, for adapters that it does not add.

    Attributes:
        loras: the structures; None where nothing is added.
    """

    def __init__(self, network: Network, weights: Weights) -> None:
        self._holders: list[dict[str, Any]] = []  # dictionaries of modules, what is asked of them,
        self._names: list[str] = []
        self._found: list[Any] = []  # and what they had
        self._places: list[Callable[[], int]] = []  # where tensors lie, or how often they were written to,
        self._placed: list[int] = []  # and what that was
        layers = [self._of_layer(layer, weights) for layer in network.adapted]
        self.loras = network.structures.adapters(layers) if any(layers) else None

    def holds(self) -> bool:
        """Whether the adapters still are what the structures were made of."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._found))
            and [place() for place in self._places] == self._placed
        )

    def _of_layer(self, layer: Any, weights: Weights) -> list[decoder.Lora]:
        if layer is None:
            return []
        layer, stack = layer if isinstance(layer, tuple) else (layer, None)
        outputs = None if stack is None else layer.base.outputs()[stack]
        named = [(name, self._ask(layer.loras._modules, name)) for name in weights]
        return [
            self._lora(name, lora, weights[name]) if outputs is None else self._of_experts(lora, weights[name], outputs)
            for name, lora in named
            if lora is not None
        ]

    def _of_experts(self, lora: ExpertLora, weight: float, outputs: slice) -> decoder.Lora:
        """That of these outputs of a projection of all experts."""
        A, B = (self._parameter(lora, part) for part in ("lora_A", "lora_B"))
        own = B.detach()[:, outputs]
        if outputs.step not in (None, 1):  # they alternate with others: a copy, which does not follow
            own = own.contiguous()
            self._place(lambda: B._version)
        return decoder.Lora(A.detach(), own, lora.config.scaling * weight)

    def _lora(self, name: str, lora: Lora, weight: float) -> decoder.Lora:
        A, B = (self._parameter(lora, part) for part in ("lora_A", "lora_B"))
        if (pair := lora.factors()) is None:
            raise UnsupportedError(f"the adapter {name!r} has {lora.about}, which no kernel adds")
        if pair[0] is not A or pair[1] is not B:  # made of them, so that it does not follow when they are written to
            self._place(lambda: A._version + B._version)
        return decoder.Lora(pair[0].detach(), pair[1].detach(), lora.config.scaling * weight)

    def _parameter(self, lora: nn.Module, name: str) -> Tensor:
        parameter: Tensor = self._ask(lora._parameters, name)
        self._place(parameter.data_ptr)
        return parameter

    def _ask(self, holder: Any, name: str) -> Any:
        self._holders.append(holder)
        self._names.append(name)
        self._found.append(holder.get(name))
        return self._found[-1]

    def _place(self, place: Callable[[], int]) -> None:
        self._places.append(place)
        self._placed.append(place())


class Decoding:
    """A decoder's structures and those of choices of adapters, made when they are asked for, kept while they are right."""

    def __init__(self, base: nn.Module, choices: int) -> None:
        self.base, self.choices = base, choices
        self.network: Network | None = None
        self._loras: dict[tuple[tuple[str, float], ...], DecoderLoras] = {}

    def check(self) -> None:
        """Make anew what is not right any more: the network, or None where no kernel computes what the decoder is now."""
        if self.network is None or not self.network.holds():
            self._loras.clear()  # they keep what was detached in memory
            try:
                self.network = Network(self.base)
            except (UnsupportedError, ValueError):  # layers were exchanged, or weights moved
                self.network = None

    def check_loras(self) -> None:
        """Forget the choices that are not right any more."""
        self._loras = {key: loras for key, loras in self._loras.items() if loras.holds()}

    def keep_loras(self, names: Container[str]) -> None:
        """Forget the choices that are not of these adapters alone, which are what they were."""
        self._loras = {key: loras for key, loras in self._loras.items() if all(name in names for name, _ in key)}

    def loras(self, weights: Weights) -> DecoderLoras | None:
        """The structures of these adapters on the network, as they were checked last; None where it cannot add them."""
        assert self.network is not None
        key = tuple(weights.items())
        found = self._loras.get(key)
        if found is None:
            while len(self._loras) >= self.choices:
                del self._loras[next(iter(self._loras))]
            try:
                found = DecoderLoras(self.network, weights)
            except (UnsupportedError, ValueError):  # an adapter that it does not take
                return None
            self._loras[key] = found
        return found
