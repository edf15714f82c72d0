"""ChatGLM3 and GLM-4: ids of texts and prompts, from the folder's vocabulary file and from a GGUF file.

Judges: sentencepiece itself with the order of build_chat_input, and tiktoken's algorithm on the ranks of the file.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

import qgraft
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.gguf_write_tokenizer import PROBES
from qgraft.checkpoints.glm_tokenizer import chatglm3_tokenizer, glm4_tokenizer, is_glm4, with_own_prompts
from qgraft.data.messages import Call, Conversation, Message
from qgraft.data.tokenizing import IGNORED, Encoder, Learning, encode_prompt, resolve_template
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration

REAL = Path(__file__).parents[3] / "shared" / "golden" / "tokenizer_chatglm2" / "tokenizer.model"
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "天气 <now>", "parameters": {"type": "object", "properties": {"city": {}}},
}}  # fmt: skip
CALL = Call("get_weather", '{"city": "北京", "n": 2, "ok": true}')
TALK = (
    Message("system", "You are ChatGLM3."), Message("user", "北京天气"), Message("assistant", "好的", calls=(CALL,)),
    Message("tool", '{"t": 22}'), Message("assistant", "22度"), Message("user", "谢谢"),
)  # fmt: skip
TEXTS = [*PROBES, "people sop eop philosophy", "晚上睡不着应该怎么办", "the cat sat on the mat", " the", "\n\nthe"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def official(path: Path, *turns: tuple[str, str, str]) -> list[int]:
    """[gMASK] sop, and of each (role, metadata, text) the role's id, the line of metadata, the text; an answer is asked."""
    pieces = SentencePieceProcessor(model_file=str(path))
    first = pieces.get_piece_size()
    ids = [first + 1, first + 3]
    for role, metadata, text in turns:
        ids += [first + 5 + ROLES.index(f"<|{role}|>"), *pieces.encode(metadata + "\n"), *pieces.encode(text)]
    return [*ids, first + 5 + ROLES.index("<|assistant|>")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece file of merges, as ChatGLM2's and ChatGLM3's is one."""
    path = tmp_path_factory.mktemp("chatglm3") / "tokenizer.model"
    texts = [
        "the cat sat on the mat, 你好，世界！晚上睡不着应该怎么办 hello world it's 12345 get_weather tool_call"
    ] * 8
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=400, hard_vocab_limit=False, model_type="bpe",
            character_coverage=1.0, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
        )  # fmt: skip
    return path


@pytest.fixture(params=["tiny", "real"])
def vocabulary(request: pytest.FixtureRequest, tiny: Path) -> Path:
    if request.param == "real" and not REAL.exists():
        pytest.skip("the released vocabulary is not here")
    return tiny if request.param == "tiny" else REAL


def test_prompts_of_chatglm3_are_those_of_its_code(vocabulary: Path) -> None:
    tokenizer = chatglm3_tokenizer(vocabulary)
    for text in TEXTS:
        if "\0" not in text:
            assert encode_prompt(tokenizer, [Message("user", text)]) == official(vocabulary, ("user", "", text)), text
    tools = json.dumps([TOOL["function"]], indent=4, ensure_ascii=False)
    called = "```python\ntool_call(city='北京', n=2, ok=True)\n```"
    behind = [("user", "", "北京天气"), ("assistant", "", "好的"), ("assistant", "get_weather", called),
              ("observation", "", '{"t": 22}'), ("assistant", "", "22度"), ("user", "", "谢谢")]  # fmt: skip
    expected = official(vocabulary, ("system", "", f"You are ChatGLM3.\n{tools}"), *behind)
    assert encode_prompt(tokenizer, TALK, tools=[TOOL]) == expected
    told = "Answer the following questions as best as you can. You have access to the following tools:\n"
    assert encode_prompt(tokenizer, TALK[1:], tools=[TOOL]) == official(
        vocabulary, ("system", "", told + tools), *behind
    )


def test_samples_of_chatglm3_learn_answers_and_calls(tiny: Path) -> None:
    tokenizer = chatglm3_tokenizer(tiny)
    samples = Encoder(tokenizer, resolve_template(tokenizer), Learning()).samples(
        Conversation(TALK[:-1], "row 1", (TOOL,))
    )
    learned = [tokenizer.decode([label for label in sample.labels if label != IGNORED]) for sample in samples]
    # a call behind a text is a turn that the model begins itself
    called = "<|assistant|> get_weather\n ```python\ntool_call(city='北京', n=2, ok=True)\n```"
    assert learned == [f"\n 好的{called}</s>", "\n 22度</s>"]
    asked = official(tiny, ("user", "", "北京天气"))
    (sample,) = Encoder(tokenizer, resolve_template(tokenizer), Learning()).samples(
        Conversation((TALK[1], TALK[4]), "row 2")
    )
    answer = [token for text in ("\n", "22度") for token in SentencePieceProcessor(model_file=str(tiny)).encode(text)]
    assert sample.input_ids == [*asked, *answer, 2]
    assert sample.labels == [*[IGNORED] * len(asked), *answer, 2]


def test_a_gguf_of_llamacpps_converter_has_the_ids_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    path = tiny
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    tokens = [{0: "<unk>", 1: "<bos>", 2: "<eos>"}.get(n, each.piece) for n, each in enumerate(proto.pieces)]
    special = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES]
    writer = GGUFWriter(tmp_path / "x.gguf", "chatglm")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("chatglm-spm")
    writer.add_token_list([*tokens, *special, "[PAD]"])
    writer.add_token_scores([*(each.score for each in proto.pieces), *[0.0] * 10])
    writer.add_token_types([*(each.type for each in proto.pieces), *[3] * 9, 5])
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for message in messages %}<|{{ message['role'] }}|> \n {{ message['content'] }}{% endfor %}"
    )
    writer.add_tensor_info("x", [1], torch.zeros(1).numpy().dtype, 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.fout[0].write(bytes(-writer.fout[0].tell() % 32 + 4))
    writer.close()
    ours, folder = with_own_prompts(gguf_tokenizer(read_gguf(tmp_path / "x.gguf"))), chatglm3_tokenizer(path)
    for text in TEXTS:
        assert ours(text).input_ids == folder(text).input_ids, text
    assert encode_prompt(ours, TALK, tools=[TOOL]) == encode_prompt(folder, TALK, tools=[TOOL])


def ranks_of(words: str, count: int = 380) -> dict[bytes, int]:
    """Bytes, and what merging the most frequent pairs of the text makes of them."""
    ranks, split = {bytes([byte]): byte for byte in range(256)}, [
        [bytes([byte]) for byte in word.encode()] for word in regex.findall(PATTERN, words)
    ]  # fmt: skip
    while len(ranks) < count and (pairs := Counter(pair for word in split for pair in pairwise(word))):
        token = b"".join(max(pairs, key=lambda pair: (pairs[pair], pair)))
        ranks.setdefault(token, len(ranks))
        split = [merged(word, {**ranks}) for word in split]
    return ranks


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's algorithm: again and again the pair whose union has the lowest rank."""
    parts = list(parts)
    while found := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    """A vocabulary file of GLM-4's kind, and its ranks."""
    ranks = ranks_of("the cat sat on the mat, 你好，世界！晚上睡不着应该怎么办 hello world it's 12345 " * 3)
    path = tmp_path_factory.mktemp("glm4") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path, ranks


def test_ids_of_glm4_are_tiktokens(glm4: tuple[Path, dict[bytes, int]]) -> None:
    path, ranks = glm4
    assert is_glm4(path)
    tokenizer = glm4_tokenizer(path)

    def ids(text: str) -> list[int]:
        words = [word.encode() for word in regex.findall(PATTERN, text)]
        parts = [[word] if word in ranks else merged([bytes([byte]) for byte in word], ranks) for word in words]
        return [ranks[part] for each in parts for part in each]

    for text in TEXTS:
        assert tokenizer(text).input_ids == ids(text), text
        assert tokenizer.decode(ids(text)) == text
    end = len(ranks)
    tools = json.dumps(TOOL["function"], indent=4, ensure_ascii=False)
    system = (
        "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
        f"\n\n## get_weather\n\n{tools}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )
    turns = [
        (0, system),
        (1, "北京天气"),
        (2, ("get_weather", json.dumps(json.loads(CALL.arguments), ensure_ascii=False))),
    ]
    expected = [end + 2, end + 4]
    for role, text in turns:
        metadata, said = text if isinstance(text, tuple) else ("", text)
        expected += [end + 6 + role, *ids(f"{metadata}\n{said}")]
    asked = [Message("user", "北京天气"), Message("assistant", calls=(CALL,)), Message("tool", "22")]
    got = encode_prompt(tokenizer, asked, tools=[TOOL])
    assert got == [*expected, end + 9, *ids("\n22"), end + 8]
    assert tokenizer.eos_token_id == end


def folder_of(path: Path, vocabulary: Path, tokens: int, **config: Any) -> Path:
    """A tiny model of the second generation's layout with this vocabulary file."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "multi_query_group_num": 2}
    model = ChatGLM2ForConditionalGeneration(
        ChatGLM2Config(padded_vocab_size=tokens, ffn_hidden_size=64, seq_length=512, **sizes)
    )
    path.mkdir()
    (path / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    (path / "config.json").write_text(json.dumps({**model.config.to_dict(), **config}))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    return path


def test_folders_have_these_tokenizers_and_end_at_the_next_turn(
    glm4: tuple[Path, dict[bytes, int]], tiny: Path, tmp_path: Path
) -> None:
    third = folder_of(tmp_path / "3", tiny, 600, _name_or_path="THUDM/chatglm3-6b")
    end = len(glm4[1])
    ids = {"eos_token_id": [end, end + 7, end + 9], "pad_token_id": end}
    fourth = folder_of(tmp_path / "4", glm4[0], 512, _name_or_path="THUDM/glm-4-9b-chat", **ids)
    for folder in (third, fourth):
        model, tokenizer = qgraft.load(folder, device="cpu")
        ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|user|>", "<|observation|>"])
        assert model.generation_config.eos_token_id == ends
        qgraft.save(model, tmp_path / "saved.gguf" if folder is fourth else tmp_path / "saved3.gguf")
    again, tokenizer = qgraft.load(tmp_path / "saved.gguf", device="cpu")
    assert encode_prompt(tokenizer, TALK, tools=[TOOL]) == encode_prompt(glm4_tokenizer(glm4[0]), TALK, tools=[TOOL])
    ids = torch.tensor([encode_prompt(tokenizer, TALK)])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


BROKEN = {
    "another id": (b"AA== 0\nAQ== 2\n", r"line 2: got b'AQ== 2', expected another token in base64, and 1"),
    "twice": (b"AA== 0\nAA== 1\n", "line 2: got"),
    "no base64": (b"AA== 0\nA 1\n", "line 2: got"),
    "too few bytes": (b"AA== 0\nAQ== 1\n", "no token for the byte 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_vocabulary_of_glm4_is_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert is_glm4(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=message):
        glm4_tokenizer(tmp_path / "tokenizer.model")


def test_other_sentencepiece_files_are_refused(tiny_vocabulary: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no plain BPE"):
        chatglm3_tokenizer(tiny_vocabulary("ice_text.model"))
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="not a sentencepiece file"):
        chatglm3_tokenizer(tmp_path / "x.model")
