"""transformers' tokenizers: what a tokenizer of our own stands on."""

import inspect
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AddedToken, AutoTokenizer, BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.utils import PaddingStrategy


class Letters(PreTrainedTokenizer):
    """One id for each letter, written as ChatGLM's tokenizers are."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, **kwargs: Any) -> None:
        self.added = [AddedToken("[MASK]", special=True), AddedToken("<eop>", special=True)]
        self._added_tokens_decoder = {26 + number: token for number, token in enumerate(self.added)}
        super().__init__(mask_token=self.added[0], eos_token=self.added[1], **kwargs)

    @property
    def vocab_size(self) -> int:
        return 28

    def get_vocab(self) -> dict[str, int]:
        return {**{chr(97 + n): n for n in range(26)}, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 97 if len(token) == 1 else 26 + [str(t) for t in self.added].index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(97 + index) if index < 26 else str(self.added[index - 26])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids: list[int], others: list[int] | None = None) -> list[int]:
        return [*ids, 27]

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.padded = (args, kwargs)
        return super()._pad(encoded_inputs, *args, **kwargs)


def test_special_tokens_that_are_put_in_before_the_base_is_made_keep_their_ids():
    tokenizer = Letters()
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (26, 27)
    assert tokenizer._added_tokens_encoder == {"[MASK]": 26, "<eop>": 27}, "added tokens get new ids"
    assert len(tokenizer) == 28


def test_text_is_split_at_special_tokens_and_ends_as_the_class_says():
    assert Letters()("ab[MASK]c")["input_ids"] == [0, 1, 26, 2, 27]
    assert Letters().encode("ab", add_special_tokens=False) == [0, 1]


def test_decoding_leaves_special_tokens_out_if_asked():
    assert Letters().decode([0, 1, 26, 27], skip_special_tokens=True) == "ab"


def test_padding_goes_through_one_method_with_these_arguments():
    names = list(inspect.signature(PreTrainedTokenizer._pad).parameters)
    assert names[1:6] == ["encoded_inputs", "max_length", "padding_strategy", "pad_to_multiple_of", "padding_side"]
    tokenizer = Letters(pad_token="<eop>")
    batch = tokenizer(["abc", "a"], padding=True)
    assert isinstance(batch, BatchEncoding) and batch["attention_mask"] == [[1, 1, 1, 1], [0, 0, 1, 1]]
    args, kwargs = tokenizer.padded
    given = {**dict(zip(names[2:], args, strict=False)), **kwargs}
    assert given["padding_strategy"] in (PaddingStrategy.LONGEST, PaddingStrategy.MAX_LENGTH)


@pytest.mark.parametrize("strategy", ["DO_NOT_PAD", "LONGEST", "MAX_LENGTH"])
def test_strategies_of_padding(strategy):
    assert isinstance(getattr(PaddingStrategy, strategy), PaddingStrategy)


def test_a_chat_template_is_an_attribute_that_is_text_or_none():
    tokenizer = Letters()
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_a_tokenizers_object_is_copied_before_it_is_used():
    """`copy.deepcopy`, which lets an object hand out itself: nothing else is asked of what is given as tokenizer_object."""

    class Handed:
        def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
            return built

    built = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Handed(), bos_token=AddedToken("<s>", special=True, normalized=False), add_bos_token=True
    )
    assert tokenizer.backend_tokenizer is built
    assert tokenizer("ab").input_ids == [2, 0, 1], "add_bos_token makes the post-processor"
    assert tokenizer("ab", add_special_tokens=False).input_ids == [0, 1]
    assert tokenizer.eos_token is None, "special tokens are made up"


def test_a_subclass_saves_the_name_that_its_class_says(tmp_path):
    class Ours(PreTrainedTokenizerFast):
        pass

    Ours.__name__ = PreTrainedTokenizerFast.__name__
    built = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    Ours(tokenizer_object=built).save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is PreTrainedTokenizerFast
