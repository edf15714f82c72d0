"""From conversations with images to what a model that sees learns: token ids as its processor writes them, and labels.

    text        what the chat template writes, with the processor's placeholder for each image
    input_ids   what the processor makes of it: each placeholder is as many tokens as the image has places
    labels      the answers, as of conversations of text (tokenizing.py): the same template, the same masks, the same ends

Which tokens are learned is found out on the text without its images, piece by piece between their placeholders: behind an
image the processor's ids must end as that piece does, from its first label on, or the row is dropped. So whatever a
processor writes around an image, or merges with the text beside it, no label is moved.

The numbers of an image are made when its batch passes (passes/images.py): those of a whole set would not fit into memory.
A row is read once before, for its ids. Rows with images are not cut: an image has no part that could be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qgraft.data.accounted import accounted
from qgraft.data.markers import refuse_markers
from qgraft.data.masks import Answer
from qgraft.data.messages import Conversation, ConversationError, Message, Tool
from qgraft.data.pictures import INSTALL, Picture
from qgraft.data.reading import Accounting
from qgraft.data.tokenizing import (
    IGNORED,
    ChatTemplate,
    Encoder,
    Learning,
    Sample,
    cut_sample,
    segments_of,
    with_prefix,
    with_system,
)
from qgraft.data.turn_tokens import BREAK
from qgraft.errors import UnsupportedError

_PLACEHOLDERS = ("image_token", "boi_token")  # what a processor may call what the template writes for an image


@dataclass(frozen=True)
class ImageSample(Sample):
    """A Sample whose ids are the processor's of this text with these images."""

    text: str = ""
    images: tuple[Picture, ...] = ()


def build_image_samples(
    processor: Any,
    conversations: Sequence[Conversation],
    accounting: Accounting,
    *,
    template: ChatTemplate,
    max_length: int,
    learning: Learning,
) -> list[ImageSample]:
    """The samples of at most `max_length` ids; `accounting` moves what gives none to its place. Raises DataError for none."""
    encoder = ImageEncoder(processor, template, learning)

    def fitting(found: Sequence[ImageSample]) -> list[ImageSample]:
        if any(sample.images and len(sample.input_ids) > max_length for sample in found):
            raise ConversationError(f"longer than max_length {max_length}, and rows with images are not cut",
                                    hint="give a larger max_length, or smaller images")  # fmt: skip
        kept = [cut for sample in found if (cut := cut_sample(sample, max_length)) is not None]
        if not kept:
            raise ConversationError(f"no answer token within max_length {max_length}", hint="give a larger max_length")
        return kept

    return accounted(conversations, accounting, encoder.image_samples, fitting, encoder.remarks)


def image_prompt(
    processor: Any,
    messages: Sequence[Message],
    *,
    template: ChatTemplate,
    system: str | None = None,
    source_prefix: str = "",
    tools: Sequence[Tool] = (),
    markers: Sequence[int] = (),
) -> tuple[str, list[Picture]]:
    """(What asks for the next answer, as training saw it, the images in it); see encode_prompt.

    Raises ConversationError where the template writes no place for an image, or too many.
    """
    encoder = ImageEncoder(processor, template, Learning(markers=markers))
    turns = with_prefix(with_system(messages, system), source_prefix)
    refuse_markers(encoder.markers, turns, tools)
    turns = encoder.marks.guarded(turns)
    text = encoder.with_bos(encoder.writer.prompt(encoder.writer.settled(turns), tools)) if encoder.writer else ""
    images = [image for message in messages for image in message.images]
    place = encoder.placeholder(text, len(images))
    if images and text.count(place) != len(images):
        raise ConversationError(f"the chat template writes {text.count(place)} of {len(images)} images")
    return text, images


class ImageEncoder(Encoder):
    """Makes samples of conversations with images."""

    def __init__(self, processor: Any, template: ChatTemplate, learning: Learning) -> None:
        super().__init__(processor.tokenizer, template, learning)
        self.processor = processor
        self.places = [str(token) for name in _PLACEHOLDERS if (token := getattr(processor, name, None))]
        self.markers = tuple(dict.fromkeys((*self.markers, *self.places)))

    def image_samples(self, conversation: Conversation) -> list[ImageSample]:
        """The samples of a conversation, as the processor writes them; raises DataError where there is none."""
        images = [image for message in conversation.messages for image in message.images]
        opened = [image.open() for image in images]
        samples = [self._expanded(sample, images, opened) for sample in self.samples(conversation)]
        if len(samples[-1].images) != len(images):
            raise ConversationError(f"the chat template writes {len(samples[-1].images)} of {len(images)} images")
        return samples

    def _sample(self, group: list[Answer], source: str) -> ImageSample:
        """The sample of these answers before images are put in, with its text."""
        found = super()._sample(group, source)
        text = "".join(piece for piece, _, _ in segments_of(group))
        text += "" if group[-1].ends else str(self.tokenizer.convert_ids_to_tokens(self.ends[0]))
        return ImageSample(found.input_ids, found.labels, source, found.weights, text=self.with_bos(text))

    def with_bos(self, text: str) -> str:
        """The text with the token that begins texts, where the tokenizer puts one there and the template did not.

        Raises ConversationError for what a processor would read as tokens that nobody may write.
        """
        if (at := text.find(BREAK)) >= 0:
            held = text.replace(BREAK, "")[at - 1 :]
            raise ConversationError(f"beside images a text holds {held[:20]!r}, which begins with a token of turns")
        bos = self.tokenizer.bos_token
        added = bos is not None and getattr(self.tokenizer, "add_bos_token", False) and not text.startswith(str(bos))
        return f"{bos}{text}" if added else text

    def _expanded(self, sample: Sample, images: Sequence[Picture], opened: Sequence[Any]) -> ImageSample:
        """The sample with the processor's ids, and the labels at their places among these."""
        assert isinstance(sample, ImageSample)
        place = self.placeholder(sample.text, len(images))
        count = sample.text.count(place) if place else 0
        ids = self._processed(sample.text, opened[:count])
        labels, weights = [IGNORED] * len(ids), [0.0] * len(ids)
        for number, (start, stop) in enumerate(self._pieces(sample.input_ids, place)):
            learned = [at for at in range(start, stop) if sample.labels[at] != IGNORED]
            if not learned:
                continue
            before = ids if number == count else self._processed(place.join(sample.text.split(place)[: number + 1]),
                                                                 opened[:number])  # fmt: skip
            shift = len(before) - stop  # of the piece, whose end is that of what is before the next image
            same = all(before[at + shift] == sample.input_ids[at] for at in range(learned[0], learned[-1] + 1))
            if shift + start < 0 or not same or before[: learned[-1] + shift + 1] != ids[: learned[-1] + shift + 1]:
                raise ConversationError("the processor writes an answer in other tokens than the tokenizer does")
            for at in learned:
                labels[at + shift] = sample.labels[at]
                weights[at + shift] = 1.0 if sample.weights is None else sample.weights[at]
        return ImageSample(ids, labels, sample.source, None if sample.weights is None else weights, sample.part,
                           sample.text, tuple(images[:count]))  # fmt: skip

    def placeholder(self, text: str, images: int) -> str:
        """What stands in the text for an image; "" where there is none. Raises ConversationError for images without one."""
        found = [token for token in self.places if token in text]
        if images and not found:
            raise ConversationError("the chat template writes no images")
        return found[0] if found else ""

    def _pieces(self, ids: Sequence[int], place: str) -> list[tuple[int, int]]:
        """(start, stop) of what stands between the placeholders."""
        token = self.tokenizer.convert_tokens_to_ids(place) if place else None
        at = [index for index, each in enumerate(ids) if each == token]
        return list(zip([0, *(index + 1 for index in at)], [*at, len(ids)], strict=True))

    def _processed(self, text: str, opened: Sequence[Any]) -> list[int]:
        """The processor's ids of a text with these images."""
        ids: list[int] = process(self.processor, [text], [list(opened)])["input_ids"][0].tolist()
        return ids


def process(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What a processor makes of texts and the images in them: tensors of the batch, padded at the right.

    Raises ConversationError with what it says where it cannot.
    """
    seen = [list(each) for each in images] if any(images) else None
    told = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    try:
        return dict(processor(text=list(texts), images=seen, **told))
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        raise ConversationError(f"the processor fails: {' '.join(str(error).split())[:200]}") from error


def require_processor(model: Any) -> Any:
    """The processor of a model that sees images. Raises UnsupportedError where it was loaded without one."""
    found = getattr(getattr(model, "qgraft", None), "processor", None)
    if found is None:
        raise UnsupportedError("the rows hold images, and the model was loaded without a processor of images",
                               hint=f"its load says why; Pillow and torchvision: {INSTALL}")  # fmt: skip
    return found
