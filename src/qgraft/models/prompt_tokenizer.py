"""What the tokenizers of both ChatGLM generations share: a checked sentencepiece file, rounds, samples, no template.

What a model starts to answer from has special ids between pieces of text, which no chat template can write: a template
gives text, and the text of a special id is ordinary text here. So there is no template; two methods say instead what
the templates of other models say:

    prompt_ids   (role, content) turns up to a question  ->  the ids that generating the answer starts from
    sample_ids   the same turns and the answer           ->  ids and labels, as the official training scripts make them

Neither generation has a system role: a system text stands in front of the first question, with a blank line between.

A subclass of transformers' SentencePieceBackend was not chosen: it splits special tokens out of the text, and joins
pieces by itself instead of letting sentencepiece decode bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from qgraft import storage
from qgraft.errors import CheckpointError, DataError, OptionError

Messages = Sequence[tuple[str, str]]  # (role, content); roles system (first, if at all), user, assistant

IGNORED = -100  # the label of what is not learned
_KEPT = ("model_max_length", "name_or_path", "padding_side")  # of a tokenizer_config.json; the class knows the rest
_SENTENCEPIECE_HINT = "the vocabulary is a sentencepiece file, ice_text.model (ChatGLM) or tokenizer.model (ChatGLM2)"


class PromptTokenizer(PreTrainedTokenizer):
    """What both generations share: the file, the rounds of a prompt, samples, chat templates."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    round_format: ClassVar[str]  # of a question; {} are its number and its text
    round_end: ClassVar[str]  # behind an answer that another question follows
    first_round: ClassVar[int]
    bare_single: ClassVar[bool]  # a single question is a prompt as it is
    spare_length: ClassVar[int]  # official samples are padded to max_source_length + max_target_length + this

    def __init__(self, vocab_file: str | Path, special: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.vocab_file = str(vocab_file)
        self._file = _read(Path(vocab_file))
        self.sp_model = _load(self._file, Path(vocab_file))
        if problems := self._problems():
            raise CheckpointError(f"{vocab_file}: no vocabulary of {type(self).__name__}: {'; '.join(problems)}",
                                  hint="the other generation's file, or another model's?")  # fmt: skip
        tokens = [token for token in special.values() if isinstance(token, AddedToken)]
        self._added_tokens_decoder = {self._convert_token_to_id(token.content): token for token in tokens}
        super().__init__(**special, **{key: options[key] for key in _KEPT if key in options})

    def _problems(self) -> list[str]:
        raise NotImplementedError

    def _has(self, piece: str) -> bool:
        return bool(self.sp_model.id_to_piece(self.sp_model.piece_to_id(piece)) == piece)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special ones included."""
        return int(self.sp_model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Every piece with its id."""
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        return {**{piece: number for number, piece in enumerate(pieces)}, **self.added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the sentencepiece file as it was read."""
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        storage.write_file(path, self._file)
        return (str(path),)

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.sp_model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        # Models have more rows than the vocabulary has pieces; what stands there is no text.
        return str(self.sp_model.id_to_piece(index)) if 0 <= index < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces; special ones have none."""
        return str(self.sp_model.decode_pieces([token for token in tokens if token]))

    def clean_answer(self, text: str) -> str:
        """A decoded answer as the released chat() shows it and sends it back as history."""
        return text.strip().replace("[[训练时间]]", "2023年")

    def prompt_text(self, messages: Messages, *, numbered: bool = False) -> str:
        """The text of a prompt. Messages end in a question; `numbered` numbers a single one in both generations."""
        past, question = _rounds(messages)
        if self.bare_single and not past and not numbered:
            return question
        written = [self.round_format.format(k, asked) + answer + self.round_end
                   for k, (asked, answer) in enumerate(past, self.first_round)]  # fmt: skip
        return "".join(written) + self.round_format.format(len(past) + self.first_round, question)

    def prompt_ids(
        self, messages: Messages, max_source_length: int | None = None, *, source_prefix: str = ""
    ) -> list[int]:
        """The ids that generating an answer starts from. Messages end in a question.

        Args:
            max_source_length: the text is cut at the right so that there are at most so many ids, special ones included.
            source_prefix: text in front of the prompt's.
        """
        ids = self._context_ids(source_prefix + self.prompt_text(messages))
        cut = ids[: None if max_source_length is None else max_source_length - 2]
        return list(self.build_inputs_with_special_tokens(cut))

    def generated_length(self, max_source_length: int | None, max_target_length: int | None) -> int:
        """How many ids, the prompt's included, the official script stops an answer at."""
        raise NotImplementedError

    def sample_ids(
        self,
        messages: Messages,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        *,
        numbered: bool = False,
        learn_padding: bool = False,
        source_prefix: str = "",
    ) -> tuple[list[int], list[int]]:
        """Ids and labels (-100: not learned) of a training sample, as the official scripts make them, without padding.

        Args:
            messages: end in an answer, which is what is learned; earlier rounds are its history.
            max_source_length, max_target_length: the prompt and the answer are cut at the right so that they have at
                most so many ids. Special ids count, but for the second generation's end id.
            numbered: see prompt_text; the first generation's script does it where a history column is named.
            learn_padding: what the scripts make with ignore_pad_token_for_loss false: padded at the right to the full
                length, the padding is learned; in the second generation also to predict padding all along the prompt.
            source_prefix: text in front of the prompt's.
        """
        if not messages or messages[-1][0] != "assistant":
            raise DataError("a sample must end in an assistant turn")
        prompt = self._context_ids(source_prefix + self.prompt_text(messages[:-1], numbered=numbered))
        ids, labels = self._join(prompt, self._text_ids(messages[-1][1]), max_source_length, max_target_length)
        pad = self.pad_token_id
        if not learn_padding:
            return ids, [IGNORED if label == pad else label for label in labels]
        if max_source_length is None or max_target_length is None:
            raise OptionError("padding is learned up to a length: give max_source_length and max_target_length")
        padding = [pad] * (max_source_length + max_target_length + self.spare_length - len(ids))
        return ids + padding, labels + padding

    def _join(
        self, prompt: list[int], answer: list[int], max_source: int | None, max_target: int | None
    ) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    def _context_ids(self, text: str) -> list[int]:
        """The ids of a prompt's text. Raises DataError where they would end the prompt."""
        return self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        ids: Any = self.convert_tokens_to_ids(self.tokenize(text))
        return list(ids)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_dict: bool = True,
        chat_template: str | None = None,
        **options: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """The prompt of messages that end in a question, or the whole sample of messages that end in an answer.

        `options` are those of calling the tokenizer (padding, truncation, max_length, return_tensors). What only a
        template can do (tools, continue_final_message, a template of one's own) is refused.
        """
        refused = [key for key in ("tools", "documents", "continue_final_message") if options.pop(key, None)]
        if refused or chat_template is not None:
            what = ", ".join(refused) or "a template of one's own"
            raise ValueError(f"{type(self).__name__} writes prompts itself, without {what}")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        chats: Any = conversation if batched else [conversation]
        turns = [[(message["role"], message["content"]) for message in chat] for chat in chats]
        answered = {bool(chat) and chat[-1][0] == "assistant" for chat in turns}
        if len(answered) != 1:
            raise ValueError("either all conversations end in an answer, or none")
        answers = [chat.pop()[1] for chat in turns] if answered == {True} else None
        prompts = [self.prompt_text(chat) for chat in turns]
        if not tokenize:
            texts = [prompt + answer for prompt, answer in zip(prompts, answers or [""] * len(prompts), strict=True)]
            return texts if batched else texts[0]
        encoded = (self(prompts, answers, **options) if batched
                   else self(prompts[0], answers[0] if answers else None, **options))  # fmt: skip
        return encoded if return_dict else encoded["input_ids"]


def _rounds(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """Earlier (question, answer) rounds, and the question that is open. A system text joins the first question."""
    system = messages[0][1] if messages and messages[0][0] == "system" else ""
    turns = messages[1:] if messages and messages[0][0] == "system" else messages
    roles = [role for role, _ in turns]
    if roles != [("user", "assistant")[number % 2] for number in range(len(roles))] or len(roles) % 2 == 0:
        raise DataError(f"got the roles {', '.join(role for role, _ in messages) or 'of no message'}, expected user and "
                        "assistant in turn, ending in user", hint="ChatGLM has no tool turns")  # fmt: skip
    texts = [text for _, text in turns]
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"vocabulary file {path} cannot be read: {error}", hint=_SENTENCEPIECE_HINT) from error


def _load(data: bytes, path: Path) -> Any:
    model = SentencePieceProcessor()
    try:
        loaded = bool(data) and model.LoadFromSerializedProto(data)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece file ({error})", hint=_SENTENCEPIECE_HINT) from error
    if not loaded or not model.get_piece_size():
        raise CheckpointError(f"{path}: an empty sentencepiece file", hint=_SENTENCEPIECE_HINT)
    return model
