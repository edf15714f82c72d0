"""P-Tuning v2: trained keys and values in front of every layer's attention, and the network that makes them.

    prefix ids [B, P] -> embedding -> [B, P, W]                                        plain: the values themselves
    prefix ids [B, P] -> embedding -> Linear (trans.0) -> tanh -> Linear (trans.2) -> [B, P, W]        with projection

W = 2 · layers · width numbers for each token of the prefix, width = kv heads · head dim. A row is laid out
[2 · layers, kv heads, head dim], with the keys of layer i at 2i and its values at 2i + 1. The layouts of the projection:

                 embedding     trans.0        trans.2       tokens' positions
    chatglm      [P, hidden]   [H, hidden]    [W, H]        from 0: the prefix has none       H = hidden size
    chatglm2     [P, W]        [H, W]         [W, H]        from 0                            H = hidden size
    peft         [P, width]    [H, width]     [W, H]        from P, after the prefix          H = width

A model of another architecture gets PEFT's layout, so that its files and ours mean the same. In the original the prefix
is a part of the cache that the forward pass begins with, and positions follow from the length of the cache, except in
ChatGLM. Keys of the prefix are not rotated. Initial values are torch's own: N(0, 1) for the embedding.

Sources: Liu et al. 2021 (arXiv:2110.07602); THUDM/ChatGLM-6B and ChatGLM2-6B, `PrefixEncoder`; PEFT 0.21,
tuners/prefix_tuning/model.py. Parameters are float32 whatever the base computes in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qgraft.adapters.adapter import Adapter, Part
from qgraft.adapters.holder import Holder
from qgraft.adapters.selection import Selection
from qgraft.errors import AdapterError, OptionError
from qgraft.ranges import COUNT, SHARE, check_ranges

LAYOUTS = ("chatglm", "chatglm2", "peft")
HOME = "prefixes"  # the name of Prefixes among the children of the base model


@dataclass(frozen=True)
class PrefixConfig:
    """The options of one prefix.

    Attributes:
        pre_seq_len: P, how many tokens it is as long as.
        prefix_projection: whether embedding and projection make the values, or are the values trained as they are.
        prefix_hidden_size: H, the width in the middle of the projection; None for the layout's own.
        prefix_dropout: share of all the values that is zeroed in training, drawn once in each forward pass.
        layout: how the projection is built and positions are counted: chatglm, chatglm2 or peft.
    """

    pre_seq_len: int = 128
    prefix_projection: bool = False
    prefix_hidden_size: int | None = None
    prefix_dropout: float = 0.1
    layout: str = "peft"

    def __post_init__(self) -> None:
        hidden = 1 if self.prefix_hidden_size is None else self.prefix_hidden_size
        check_ranges({
            "pre_seq_len": (self.pre_seq_len, COUNT), "prefix_dropout": (self.prefix_dropout, SHARE),
            "prefix_hidden_size": (hidden, COUNT),
        })  # fmt: skip
        if self.layout not in LAYOUTS:
            raise OptionError(f"layout={self.layout!r}: expected {', '.join(LAYOUTS)}")

    @property
    def count_positions(self) -> bool:
        """Whether the positions of the tokens begin after the prefix."""
        return self.layout == "peft"


@dataclass(frozen=True)
class Geometry:
    """What the attention layers of a model want keys and values to be.

    Attributes:
        layers: the layer_idx of every layer that attends; those of a hybrid model's other layers are missing.
        kv_heads, head_dim: of each of them.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers of one key."""
        return self.kv_heads * self.head_dim

    @property
    def total(self) -> int:
        """W, numbers of all keys and values of one token."""
        return 2 * len(self.layers) * self.width

    def __str__(self) -> str:
        return f"{len(self.layers)} layers of {self.kv_heads} key heads of {self.head_dim}"


class PrefixEncoder(Part):
    """Makes the keys and values of one prefix; see the module's docstring for shapes and layouts.

    Args:
        hidden_size: of the model.
    """

    kind = "prefix"
    config: PrefixConfig

    def __init__(self, config: PrefixConfig, geometry: Geometry, hidden_size: int) -> None:
        super().__init__()
        self.config, self.geometry = config, geometry
        width, middle = {
            "chatglm": (hidden_size, hidden_size),
            "chatglm2": (geometry.total, hidden_size),
            "peft": (geometry.width, geometry.width),
        }[config.layout]
        middle = config.prefix_hidden_size or middle
        self.embedding = nn.Embedding(config.pre_seq_len, width if config.prefix_projection else geometry.total)
        self.trans: nn.Module = nn.Identity()
        if config.prefix_projection:
            self.trans = nn.Sequential(nn.Linear(width, middle), nn.Tanh(), nn.Linear(middle, geometry.total))

    def forward(self, prefix_BP: Tensor) -> Tensor:
        """Ids of prefix tokens [B, P] -> their keys and values [B, P, W]."""
        values_BPW: Tensor = self.trans(self.embedding(prefix_BP))
        return values_BPW

    def key_values(self) -> Tensor:
        """Keys and values of the whole prefix, layer by layer: [2 · layers, kv heads, P, head dim]; drops in training."""
        values_PW: Tensor = self.trans(self.embedding.weight)
        values_PW = F.dropout(values_PW, self.config.prefix_dropout, self.training)
        return values_PW.unflatten(1, (-1, self.geometry.kv_heads, self.geometry.head_dim)).permute(1, 2, 0, 3)

    def differences(self, values: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with the names and shapes of a state dict, each one line that begins with a name."""
        own = dict(self.named_parameters())
        problems = [f"{name}: missing, expected {list(own[name].shape)}" for name in own.keys() - values.keys()]
        problems += [
            f"{name}: {list(values[name].shape)}, expected no such tensor" for name in values.keys() - own.keys()
        ]
        problems += [
            f"{name}: got {list(values[name].shape)}, expected {list(parameter.shape)}"
            for name, parameter in own.items()
            if name in values and values[name].shape != parameter.shape
        ]
        return sorted(problems)

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part; a model has one place for prefixes, so their names say no path."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a state dict. Raises AdapterError for other names or shapes, with all that differ."""
        if problems := self.differences(values):
            lines = "\n  ".join(problems)
            raise AdapterError(
                f"the prefix does not fit {self.geometry}, pre_seq_len {self.config.pre_seq_len}, prefix_projection "
                f"{self.config.prefix_projection}, layout {self.config.layout}:\n  {lines}"
            )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(values[name])


def encoder_of(adapter: Adapter) -> PrefixEncoder:
    """The network that the adapter is, with its options and geometry. Raises AdapterError for a LoRA."""
    if not adapter.is_prefix:
        raise AdapterError(f"adapter {adapter.name!r} is a LoRA, expected a prefix")
    (encoder,) = adapter.parts.values()
    assert isinstance(encoder, PrefixEncoder)
    return encoder


class Prefixes(Holder):
    """The prefixes of a model: a child of its base model, which has a hook that passes them on (attach_prefix.py).

    Args:
        selection: that of the model, which says which are active.
        attention: the attention implementation that the model had before.
        hook: of the base model.
    """

    def __init__(self, selection: Selection, geometry: Geometry, attention: str, hook: RemovableHandle) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.selection, self.geometry, self.attention, self.hook = selection, geometry, attention, hook

    @property
    def held(self) -> nn.ModuleDict:
        """See Holder."""
        return self.encoders

    def add(self, name: str, part: Part) -> None:
        """See Holder."""
        self.encoders[name] = part.train(self.training)

    def take_away(self, model: nn.Module, path: str) -> None:
        """See Holder."""
        base: Any = model.get_submodule(path.removesuffix(HOME).removesuffix("."))
        self.hook.remove()
        delattr(base, HOME)
        base.set_attn_implementation(self.attention)

    def encoder(self, name: str) -> PrefixEncoder:
        """The prefix of this name."""
        encoder = self.encoders[name]
        assert isinstance(encoder, PrefixEncoder)
        return encoder

    @property
    def counted(self) -> bool:
        """Whether tokens are numbered from after the prefixes; it is the same for all of a model."""
        return any(self.encoder(name).config.count_positions for name in list(self.encoders))

    def key_values(self, name: str) -> Tensor:
        """The keys and values of a prefix; within one call of generate() they are computed once."""
        computed = self.selection.now().evaluated
        if computed is None or self.training:
            return self.encoder(name).key_values()
        if name not in computed:
            computed[name] = self.encoder(name).key_values()
        return computed[name]
