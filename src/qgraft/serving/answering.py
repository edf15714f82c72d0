"""One answer to a conversation: the prompt as in training, generate(), and the text up to where the answer ends.

Nothing goes beyond the model's context: positions behind it were never trained, and some models have no number for them.
A prompt that fills it is refused; an answer that reaches its end ends there, and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.calls import RowError
from qgraft.data.ends import end_token_ids, until_end
from qgraft.data.image_samples import image_prompt, require_processor
from qgraft.data.messages import as_messages
from qgraft.data.pairs import PairOptions, check_pair_options, encode_source
from qgraft.data.pictures import Picture, located
from qgraft.data.rows import with_pictures
from qgraft.data.sounds import sound_of
from qgraft.data.speech_samples import Spoken, spoken_as
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import ChatGlmOptions, decode_answer, encode_prompt, resolve_template
from qgraft.errors import DataError, OptionError, UnsupportedError, option
from qgraft.model_parts import hears, is_encoder_decoder, marker_ids, vision_of
from qgraft.passes.broken import of_numbers
from qgraft.passes.images import generate_seen
from qgraft.passes.limits import context_length, stated_ends
from qgraft.passes.pairs import generate_targets
from qgraft.passes.speech import generate_spoken
from qgraft.serving.text import AnswerText, joined_ids


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without what ends it.
        note: what a reader should know: that it stops because the model's context is full. Else "".
    """

    text: str
    note: str = ""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, str]],
    *,
    template: str | None = None,
    system: str | None = None,
    enable_thinking: bool | None = None,
    source_prefix: str = "",
    max_new_tokens: int = 256,
    images: Sequence[Any] = (),
    audio: Any = None,
    language: str | None = None,
    task: str | None = None,
    streaming: Callable[[AnswerText], Any] | None = None,
    **generation: Any,
) -> Answer:
    """The model's next answer to (role, content) turns.

    Args:
        template, system, enable_thinking: as in training, see resolve_template and encode_prompt.
        source_prefix: stands in front of the question, as in training.
        max_new_tokens: the longest answer.
        audio: a recording as rows name one, for a model that hears, which is asked nothing else.
        language, task: of the text that it writes, see TrainArguments.
        images: in front of the first question, for a model that sees: paths, bytes or images of Pillow.
        streaming: makes a streamer for generate(), given the text that a reader sees of the ids that it is told.
        generation: goes to generate().

    Raises DataError for a prompt that fills the model's context, and as encode_prompt does.
    """
    if images and not vision_of(model):
        raise UnsupportedError(f"images: {type(model).__name__} reads text alone")
    check_hearing(model, audio, language=language, task=task)
    if hears(model.config):
        asked = {"template": template, "system": system, "enable_thinking": enable_thinking}
        others = ["messages: it is asked by a recording"] if messages else []
        check_pair_options(asked, *others, *(["source_prefix: it reads no text"] if source_prefix else []))
        return _heard(
            model, tokenizer, audio, spoken_as(model, language, task, 0), max_new_tokens, streaming, generation
        )
    if is_encoder_decoder(model.config):
        check_pair_options({"template": template, "system": system, "enable_thinking": enable_thinking})
        source, _ = encode_source(tokenizer, as_messages(messages), PairOptions(source_prefix))
        return _target(model, tokenizer, source, max_new_tokens, streaming, generation)
    chosen = resolve_template(tokenizer, template, enable_thinking=enable_thinking)
    writing: dict[str, Any] = {"template": chosen, "system": system, "markers": marker_ids(model)}
    if images:
        turns = with_pictures(as_messages(messages), images)
        text, pictures = image_prompt(require_processor(model), turns, source_prefix=source_prefix, **writing)
        return _seen(model, tokenizer, text, pictures, chosen, max_new_tokens, streaming, generation)
    prompt = encode_prompt(tokenizer, messages, chatglm=ChatGlmOptions(source_prefix=source_prefix), **writing)
    context = context_length(model)
    if context is not None and len(prompt) >= context:
        raise DataError(
            f"the prompt is {len(prompt)} tokens, and the model's context is {context} with the answer",
            hint="ask a shorter question, or begin a new conversation",
        )
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
    ends = end_token_ids(tokenizer, stated_ends(model), chosen)

    def shown(ids: list[int]) -> str:
        return str(tokenizer.decode(until_end(ids, ends), skip_special_tokens=True))

    told = {**generation, "max_new_tokens": room, "eos_token_id": ends or None}
    input_ids = torch.tensor([prompt], device=model.device)
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(
            input_ids, attention_mask=torch.ones_like(input_ids), streamer=streaming and streaming(_told(tokenizer, shown)),
            **{"logits_processor": of_numbers(model), **told},
        )  # fmt: skip
    said = output[0, len(prompt) :].tolist()
    ids = until_end(said, ends)
    full = len(ids) == len(said) == room < max_new_tokens
    note = f"the answer stops here: with it the model's context of {context} tokens is full" if full else ""
    return Answer(decode_answer(tokenizer, ids), note)


def _told(tokenizer: PreTrainedTokenizerBase, decode: Callable[[list[int]], str]) -> AnswerText:
    """The text of an answer that a streamer is told id by id."""
    rewrites = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    return AnswerText(decode, rewrites=rewrites, joined=joined_ids(tokenizer))


def check_hearing(model: PreTrainedModel, audio: Any, **told: str | None) -> None:
    """Raise OptionError where a model that hears gets no recording, or another one gets one, or `told` what is of those."""
    given = [name for name, value in {"audio": audio, **told}.items() if value is not None]
    if given and not hears(model.config):
        raise OptionError(f"{', '.join(given)}: of models that hear (Whisper), and {type(model).__name__} reads text")
    if audio is None and hears(model.config):
        raise OptionError(
            f"{type(model).__name__} hears, and no recording is given", hint=option("audio", "speech.wav")
        )


def _heard(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, audio: Any, written: Spoken, longest: int,
    streaming: Callable[[AnswerText], Any] | None, generation: dict[str, Any],
) -> Answer:  # fmt: skip
    """What a model that hears writes of a recording."""
    try:
        sound = located(sound_of(audio), None, True)
    except RowError as error:
        raise DataError(str(error)) from error

    def shown(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    told = {**generation, **written.told, "max_new_tokens": min(longest, written.room)}
    text = shown(generate_spoken(model, [sound], **told)[0])
    if streaming is not None:
        streaming(AnswerText(lambda _: text)).end()
    return Answer(text)


def _seen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, pictures: Sequence[Picture],
    template: ChatTemplate, longest: int, streaming: Callable[[AnswerText], Any] | None,
    generation: dict[str, Any],
) -> Answer:  # fmt: skip
    """What a model that sees says behind a prompt with images."""
    ends = end_token_ids(tokenizer, stated_ends(model), template)

    def shown(ids: list[int]) -> str:
        return str(tokenizer.decode(until_end(ids, ends), skip_special_tokens=True))

    told = {**generation, "max_new_tokens": longest, "eos_token_id": ends or None}
    length, said = generate_seen(
        model, text, pictures, streamer=streaming and streaming(_told(tokenizer, shown)), **told
    )
    ids, context = until_end(said, ends), context_length(model)
    full = context is not None and len(ids) == len(said) == context - length < longest
    note = f"the answer stops here: with it the model's context of {context} tokens is full" if full else ""
    return Answer(decode_answer(tokenizer, ids), note)


def _target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: list[int], longest: int,
    streaming: Callable[[AnswerText], Any] | None, generation: dict[str, Any],
) -> Answer:  # fmt: skip
    """What an encoder-decoder makes of the ids of a source: sources and answers have a context each."""
    context = context_length(model)
    if context is not None and len(source) > context:
        raise DataError(f"the text is {len(source)} tokens, and the encoder reads {context}", hint="give a shorter one")
    room = longest if context is None else min(longest, context - 1)

    def shown(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    beams = {} if streaming is None else {"num_beams": 1}  # a search with several shows nothing before its end
    told = {**beams, **generation, "max_new_tokens": room, "streamer": streaming and streaming(_told(tokenizer, shown))}
    return Answer(shown(generate_targets(model, [source], **told)[0]))
