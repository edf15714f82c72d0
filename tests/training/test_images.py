"""Models that see images against transformers and PEFT: loading, samples, losses, training, answers, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tiny_images import GEMMA4_IDS, KINDS, WITH_TORCHVISION, gemma4_config, picture, write_image_model
from transformers.image_utils import load_image

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.adapters.targets import find_targets
from qgraft.cli import estimate
from qgraft.data.image_samples import build_image_samples
from qgraft.data.messages import Message
from qgraft.data.pictures import MARK, Picture
from qgraft.data.reading import read_dataset
from qgraft.data.tokenizing import IGNORED, Learning, resolve_template
from qgraft.errors import DataError, OptionError, QgraftError, UnsupportedError
from qgraft.linear import QuantizedLinear, computing
from qgraft.model_parts import decoder_layers, is_within, language_of, marker_ids, vision_of
from qgraft.passes.images import image_losses, images_together, split_images
from qgraft.serving.answering import answer
from qgraft.serving.prompting import Prompter, Prompting
from qgraft.serving.protocol import Ask
from qgraft.serving.sampling import Sampling
from qgraft.training.images import check_image_run
from qgraft.training.option_names import PACKED
from qgraft.training.predict import predict
from qgraft.training.samples import read_samples

EXAMPLE = Path(__file__).parents[2] / "examples" / "images.py"
SIZES = [(40, 30), (64, 20), (30, 60)]
WORDS = ["red", "blue and more", "green"]


def asked(number, content=None):
    parts = [
        {"type": "image", "image": picture(number, SIZES[number % 3])},
        {"type": "text", "text": f"what is {number}?"},
    ]
    return {"messages": [{"role": "user", "content": content or parts},
                         {"role": "assistant", "content": WORDS[number % 3]}]}  # fmt: skip


SEVERAL = {  # images between answers, by placeholders
    "conversations": [
        {"from": "human", "value": "<image> and <image>\nwhich?"}, {"from": "gpt", "value": "both"},
        {"from": "human", "value": "and <image>?"}, {"from": "gpt", "value": "none"},
    ],
    "images": [picture(20), picture(21), picture(22)],
}  # fmt: skip
TEXT = {"instruction": "hello", "output": "hi"}
ROWS = [*(asked(number) for number in range(4)), SEVERAL, TEXT]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """(folder, the model and the processor that transformers made) of each kind, made once; neither is to be changed."""
    made = {}

    def get(kind="llava"):
        if kind in WITH_TORCHVISION:
            pytest.importorskip("torchvision")
        if kind == "smolvlm":
            pytest.importorskip("num2words")
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = write_image_model(kind, folder)
            processor = transformers.AutoProcessor.from_pretrained(folder)
            made[kind] = SimpleNamespace(path=folder, model=model, processor=processor)
        return made[kind]

    return get


def arguments(folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "plot_loss": False,
                "save_strategy": "no", "compute": "float32", "learning_rate": 1e-2, "r": 4, "lora_alpha": 8}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})


def samples_for(model, tokenizer, rows=ROWS, max_length=2048):
    conversations, accounting = read_dataset(rows, images=True)
    template = resolve_template(tokenizer)
    made = build_image_samples(model.qgraft.processor, conversations, accounting, template=template,
                               max_length=max_length, learning=Learning(markers=marker_ids(model)))  # fmt: skip
    return made, accounting


def as_processed(processor, sample):
    """What anybody would hand to the model."""
    images = [[image.open() for image in sample.images]] if sample.images else None
    return processor(text=[sample.text], images=images, return_tensors="pt", add_special_tokens=False)


EVERY = [kind if kind == "llava" else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(KINDS)]


@pytest.mark.parametrize("kind", EVERY)
def test_a_folder_computes_what_transformers_does(image_folder, kind):
    """Logits of a text with an image; the language side's linears pack, the vision side stays floats."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    assert type(model) is type(made.model) and language_of(model) and vision_of(model)
    assert all(path.startswith(language_of(model)) for path in find_targets(model, "all-linear"))
    assert len(decoder_layers(model)) == 2
    sample = samples_for(model, tokenizer, ROWS[:1])[0][0]
    batch = as_processed(made.processor, sample)
    assert batch["input_ids"][0].tolist() == sample.input_ids
    with torch.no_grad():
        assert (model(**batch).logits - made.model(**batch).logits).abs().max() <= 1e-5
    packed, _ = qgraft.load(made.path, quantize="q8_0")
    held = {
        path: module.packed.format for path, module in packed.named_modules() if isinstance(module, QuantizedLinear)
    }
    inside = {form for path, form in held.items() if path.startswith(language_of(model))}
    outside = {form for path, form in held.items() if path.startswith(tuple(vision_of(model)))}
    assert inside == {"q8_0"} and outside == {"f32"}


@pytest.mark.parametrize("kind", [kind if kind in ("llava", "gemma3") else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in sorted(KINDS)])  # fmt: skip
def test_labels_are_the_answers(image_folder, kind):
    """Of a row with images between its answers, and of one without; ids are the processor's own."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    samples, accounting = samples_for(model, tokenizer, [SEVERAL, TEXT])
    assert (accounting.kept, accounting.dropped) == (2, {})
    end = tokenizer.eos_token
    for sample, said in zip(samples, (f"both{end}none{end}", f"hi{end}"), strict=True):
        assert as_processed(made.processor, sample)["input_ids"][0].tolist() == sample.input_ids
        learned = [at for at, label in enumerate(sample.labels) if label != IGNORED]
        assert tokenizer.decode([sample.labels[at] for at in learned]) == said
        assert all(sample.labels[at] == sample.input_ids[at] for at in learned)


@pytest.mark.parametrize("kind", EVERY)
def test_losses_together_are_those_of_single_texts(image_folder, kind):
    """Padding at the right, images of different sizes, text alone: per label the model's own cross-entropy."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    samples, _ = samples_for(model, tokenizer)
    with images_together(model, samples) as apart:
        assert apart is None
    parts = split_images(samples, 100_000)
    assert [len(part) for part in parts] == [5, 1]  # text alone goes by itself
    for part in parts:
        with torch.no_grad(), computing(model, "float32"):
            total, each = image_losses(model, part)
        expected = []
        for sample in part:
            with torch.no_grad():
                logits = made.model(**as_processed(made.processor, sample)).logits[0, :-1]
            expected.append(F.cross_entropy(logits, torch.tensor(sample.labels[1:]), reduction="none")[
                torch.tensor(sample.labels[1:]) != IGNORED])  # fmt: skip
        assert (each - torch.cat(expected)).abs().max() <= 2e-4
        assert abs(float(total - torch.cat(expected).sum())) <= 1e-3


@pytest.mark.parametrize(
    "kind, steps",
    [("llava", 3), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in sorted(KINDS))],
)
def test_training_is_that_of_peft(image_folder, tmp_path, kind, steps):
    """The same adapter on the same batches: 20 steps of the same losses, and PEFT reads what was saved to the same logits."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    targets = find_targets(model, "all-linear")
    qgraft.attach_lora(model, r=4, lora_alpha=8)
    start = {key: value.clone() for key, value in find_adapter(model, "default").state_dict().items()}
    samples, _ = samples_for(model, tokenizer)
    args = arguments(tmp_path / "out", max_steps=steps, per_device_train_batch_size=len(ROWS), max_grad_norm=0.0,
                     lr_scheduler_type="constant", weight_decay=0.0)  # fmt: skip
    report = qgraft.train(model, tokenizer, ROWS, args)
    assert report.accounting.kept == len(ROWS)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]

    base = transformers.AutoModelForImageTextToText.from_pretrained(made.path)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    assert peft.get_peft_model_state_dict(theirs).keys() == start.keys()
    peft.set_peft_model_state_dict(theirs, start)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    batches = [{**as_processed(made.processor, s), "labels": torch.tensor([s.labels])} for s in samples]
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    curve = []
    theirs.train()
    for _ in range(steps):
        loss = sum(theirs(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert losses == pytest.approx(curve, abs=1e-4)
    assert losses[-1] < losses[0] - 0.02 * steps

    again = transformers.AutoModelForImageTextToText.from_pretrained(made.path)
    read = peft.PeftModel.from_pretrained(again, tmp_path / "out").eval()
    own, _ = qgraft.load(made.path)
    qgraft.load_adapter(own, tmp_path / "out")
    batch = as_processed(made.processor, samples[0])
    with torch.no_grad():
        expected = read(**batch).logits
        for each in (model, own):
            assert (each(**batch).logits - expected).abs().max() <= 1e-5


def drawn(model):
    """The model with random numbers in what trains, small beside the base's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_files_of_both_sides_are_those_of_peft(image_folder, tmp_path, kind):
    """PEFT reads what is saved of layers of both sides, of one, of some layers; and what it saves of "all-linear" is read."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    head, vision = model.get_output_embeddings(), vision_of(model)
    every = [path for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear) and layer is not head]
    batch = as_processed(made.processor, samples_for(model, tokenizer, ROWS[:1])[0][0])

    def floats():
        return transformers.AutoModelForImageTextToText.from_pretrained(made.path)

    first = [path for path in every if ".0." in path]
    for number, targets in enumerate(("all-linear", every, [path for path in every if is_within(path, vision)], first)):
        qgraft.attach_lora(model, r=2, target_modules=targets)
        qgraft.save_adapter(drawn(model), tmp_path / str(number))
        theirs = peft.PeftModel.from_pretrained(floats(), tmp_path / str(number)).eval()
        with torch.no_grad():
            assert (model(**batch).logits - theirs(**batch).logits).abs().max() <= 1e-5
        qgraft.detach_adapter(model)
    exclude = r".*vision_tower\.head\..*" if kind == "gemma3" else None  # torch's attention, which reads weights itself
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=exclude, task_type="CAUSAL_LM")
    theirs = drawn(peft.get_peft_model(floats(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    qgraft.load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert (model(**batch).logits - theirs(**batch).logits).abs().max() <= 1e-5
        assert (model(**batch).logits - made.model(**batch).logits).abs().max() > 1e-3


def test_layers_within_wrappers_of_their_names(tmp_path):
    """Gemma 4's tower has layers `q_proj.linear`: PEFT takes `q_proj` for the module around one, too, and refuses that."""
    config = gemma4_config(300, dict(zip(GEMMA4_IDS, range(290, 296), strict=True)))
    config.vision_config.use_clipped_linears = True
    torch.manual_seed(0)
    theirs = transformers.Gemma4ForConditionalGeneration(config).eval()
    limits = {name: limit for name, limit in theirs.named_buffers() if name.endswith(("_min", "_max"))}
    for name, limit in limits.items():
        limit.fill_(-0.4 if name.endswith("_min") else 0.4)
    theirs.save_pretrained(tmp_path / "model")
    model, _ = qgraft.load(tmp_path / "model")
    assert len(limits) == 56 and all(torch.equal(limit, model.get_buffer(name)) for name, limit in limits.items())
    places = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
    batch = {"input_ids": torch.tensor([[5, 7, *[config.image_token_id] * 4, 9]]), "image_position_ids": places,
             "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0]]), "pixel_values": torch.rand(1, 16, 48)}  # fmt: skip
    for name in ("q_proj", r".*\.(q_proj|q_proj\.linear)"):
        qgraft.attach_lora(model, r=2, target_modules=name)
        qgraft.save_adapter(drawn(model), tmp_path / "adapter")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "adapter").eval()
        with torch.no_grad():
            assert (read(**batch).logits - model(**batch).logits).abs().max() <= 1e-5
            assert (theirs(**batch).logits - model(**batch).logits).abs().max() > 1e-3
        qgraft.detach_adapter(model)
        shutil.rmtree(tmp_path / "adapter")


def test_vision_is_reached_by_patterns_only(image_folder, tmp_path):
    """q_proj is a name on both sides: alone it means the decoder of text; a pattern or a path reaches the rest."""
    made = image_folder()
    model, _ = qgraft.load(made.path)
    assert len(find_targets(model, "q_proj")) == 2
    assert len(find_targets(model, "q_proj,out_proj")) == 4  # a name of the tower alone means that
    seen = find_targets(model, r"model\.vision_tower\..*q_proj")
    assert len(seen) == 2 and all(path.startswith("model.vision_tower") for path in seen)
    qgraft.attach_lora(model, r=2, target_modules=r"model\.(vision_tower|language_model)\..*q_proj")
    qgraft.save_adapter(drawn(model), tmp_path / "out")
    base = transformers.AutoModelForImageTextToText.from_pretrained(made.path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    sample = samples_for(model, model.qgraft.tokenizer, ROWS[:1])[0][0]
    batch = as_processed(made.processor, sample)
    with torch.no_grad():
        assert (model(**batch).logits - theirs(**batch).logits).abs().max() <= 1e-5
        assert (model(**batch).logits - made.model(**batch).logits).abs().max() > 1e-3


def write_rows(folder):
    """Rows in a file, with images in files beside it."""
    (folder / "pictures").mkdir()
    lines = []
    for number in range(3):
        picture(number).save(folder / "pictures" / f"{number}.png")
        lines.append({"instruction": "<image>what?", "output": WORDS[number], "images": [f"pictures/{number}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_rows_name_images_in_all_usual_forms(tmp_path):
    """By content parts and by placeholders, from files beside the rows, from bytes and data: addresses."""
    path = write_rows(tmp_path)
    conversations, accounting = read_dataset(path, images=True)
    assert accounting.kept == 3 and conversations[0].messages[0].content == f"{MARK}what?"
    raw = (tmp_path / "pictures" / "0.png").read_bytes()
    import base64

    address = "data:image/png;base64," + base64.b64encode(raw).decode()
    question = {"type": "text", "text": "what?"}
    forms = [
        asked(0, [{"type": "image", "path": str(tmp_path / "pictures/0.png")}, question]),
        asked(0, [{"type": "image_url", "image_url": {"url": address}}, question]),
        asked(0, [{"type": "image", "image": {"bytes": raw, "path": None}}, question]),
        {**asked(0, [{"type": "image"}, question]), "images": [raw]},
        {"prompt": "what?", "response": "red", "image": picture(0)},  # in front where nothing says where
    ]
    conversations, accounting = read_dataset(forms, images=True)
    assert accounting.kept == len(forms)
    for conversation in conversations:
        (image,) = conversation.messages[0].images
        assert conversation.messages[0].content == f"{MARK}what?"
        assert image.open().tobytes() == picture(0).tobytes()


@pytest.mark.parametrize("row, reason", [
    ({**TEXT, "instruction": "<image><image>", "images": [picture(0)]}, "a row with 1 images"),
    (asked(0, [{"type": "image"}]), "a row with 0 images"),
    ({**TEXT, "instruction": "<image>what?", "images": []}, "a row with 0 images, and <image> stands in its texts 1 times"),
    ({**TEXT, "instruction": "a \ufdd2?", "images": [picture(0)]}, "U+FDD2"),
    ({**TEXT, "images": [picture(0)], "image": picture(1)}, "images in two columns"),
    ({**asked(0), "images": [picture(1)]}, "whose place nothing says"),
    ({**TEXT, "videos": ["a.mp4"]}, "holds videos"),
    (asked(0, [{"type": "image", "url": "https://example.org/a.png"}]), "nothing is fetched"),
    (asked(0, [{"type": "image", "image": "gone.png"}]), "not there"),
    (asked(0, [{"type": "image", "image": 7}]), "expected a path"),
    (asked(0, [{"type": "video", "video": "a.mp4"}]), "content of type 'video'"),
    ({"messages": [{"role": "user", "content": "?"},
                   {"role": "assistant", "content": [{"type": "image", "image": picture(0)}]}]}, "elsewhere"),
])  # fmt: skip
def test_what_rows_cannot_say_is_counted(row, reason):
    _, accounting = read_dataset([row, TEXT], images=True)
    assert [reason in why for why in accounting.dropped] == [True]


def test_images_stay_in_the_folder_of_their_file(tmp_path):
    """What a row of a file names elsewhere is not read, unless that is allowed; a text model drops rows with images."""
    (tmp_path / "data").mkdir()
    path = write_rows(tmp_path / "data")
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        path.write_text(json.dumps({**TEXT, "images": [name]}) + "\n")
        with pytest.raises(DataError, match="outside of the folder"):
            read_dataset(path, images=True)
        assert read_dataset(path, images=True, allow_outside_files=True)[1].kept == 1
        with pytest.raises(DataError, match="does not read"):
            read_dataset(path)


def test_an_image_that_is_none_is_counted(image_folder, tmp_path):
    model, tokenizer = qgraft.load(image_folder().path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    rows = [asked(0, [{"type": "image", "image": str(tmp_path / "broken.png")}]), asked(1),
            {"instruction": "in words", "output": "an <image>"}, {"instruction": "a<|im_end|>b", "output": "c"}]  # fmt: skip
    samples, accounting = samples_for(model, tokenizer, rows)
    assert len(samples) == 1
    assert any("no image that can be read" in why for why in accounting.dropped)
    assert any("'<image>', which this model takes for images" in why for why in accounting.dropped)
    assert any("holds '<|im_end|>b" in why for why in accounting.dropped)
    _, accounting = samples_for(model, tokenizer, [asked(0), TEXT], max_length=30)
    assert any("rows with images are not cut" in why for why in accounting.dropped)


def test_nobody_writes_what_stands_for_an_image(image_folder, tmp_path):
    """Rows of every stage are dropped and counted, questions are refused: by training, predictions, chat, the server."""
    model, tokenizer = qgraft.load(image_folder().path)
    said = "'<image>', which this model takes for images"
    assert [tokenizer.convert_ids_to_tokens(each) for each in marker_ids(model)] == ["<image>"]
    rows = [TEXT, {"instruction": "?", "output": "an <image>"}, {"instruction": "<image>?", "output": "red"}]
    args = arguments(tmp_path / "out")
    _, accounting = read_samples(model, tokenizer, rows, args, 100, resolve_template(tokenizer), held_out=False)
    why = ["a row with 0 images", said]
    assert accounting.kept == 1 and all(any(each in line for line in accounting.dropped) for each in why)
    pairs = [{"prompt": "?", "chosen": "a", "rejected": "b"}, {"prompt": "?", "chosen": "an <image>", "rejected": "b"}]
    args.stage = "dpo"
    _, accounting = read_samples(model, tokenizer, pairs, args, 100, resolve_template(tokenizer), held_out=False)
    assert accounting.kept == 1 and all(said in line for line in accounting.dropped)
    evaluated = qgraft.evaluate(model, tokenizer, rows)
    assert (evaluated.samples, evaluated.dropped) == (1, 2)
    questions = [TEXT, {"messages": [{"role": "system", "content": "an <image>"}, *asked(0, "?")["messages"]]}]
    found = predict(model, tokenizer, questions, arguments(tmp_path / "said", max_new_tokens=1))
    assert len(found.pairs) == 1 and all(said in line for line in found.accounting.dropped)
    with pytest.raises(DataError, match=said):
        answer(model, tokenizer, [("user", "<image>?")])
    for images in ([], [picture(0)]):
        with pytest.raises(DataError, match=said):
            answer(model, tokenizer, [("user", "?")], system="an <image>", images=images)
    prompter = Prompter(tokenizer, Prompting(), marker_ids(model))
    with pytest.raises(DataError, match=said):
        prompter.plain("what <image>")
    with pytest.raises(DataError, match=said):
        prompter.chat(Ask("", Sampling(), messages=(Message("user", "<image>"),)), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_markers_of_each_kind(image_folder, kind):
    """What the processor puts in the place of an image is among them; what a template writes itself is nobody's fault."""
    made = image_folder(kind)
    model, tokenizer = qgraft.load(made.path)
    samples, accounting = samples_for(model, tokenizer)
    assert not accounting.dropped
    for token in {made.processor.image_token, *tokenizer.convert_ids_to_tokens(list(marker_ids(model)))}:
        _, accounting = samples_for(model, tokenizer, [TEXT, {"instruction": "?", "output": f"an {token}"}])
        assert any(f"{token!r}, which this model takes" in why for why in accounting.dropped)
        told = {"messages": [{"role": "system", "content": f"an {token}"}, *asked(0)["messages"]]}
        _, accounting = samples_for(model, tokenizer, [TEXT, told])
        assert any(f"{token!r}, which this model takes" in why for why in accounting.dropped)
    assert any(made.processor.image_token in each.text for each in samples) or kind == "gemma3"


def test_stages_of_texts_count_rows_with_images(image_folder, tmp_path):
    """A teacher is asked about texts alone; where all rows hold images, that is said before it is loaded."""
    model, tokenizer = qgraft.load(image_folder().path)
    taught = {"stage": "distill", "teacher_model_name_or_path": str(tmp_path / "none")}
    with pytest.raises(DataError, match="holds images, and stage distill learns from texts alone: 2"):
        qgraft.train(model, tokenizer, [asked(0), asked(1)], arguments(tmp_path / "out", **taught))
    args = arguments(tmp_path / "out", **taught)
    samples, accounting = read_samples(
        model, tokenizer, [asked(0), TEXT], args, 100, resolve_template(tokenizer), held_out=False
    )
    assert len(samples) == 1 and list(accounting.dropped.values()) == [1]


def test_an_image_is_what_transformers_opens(tmp_path):
    """Turned as EXIF says, wherever it is; of 16 bits the upper 8; numbers of 32 bits are refused, which Pillow clips."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "turned.png", exif=exif)
    expected = load_image(str(tmp_path / "turned.png"))
    assert expected.size == (30, 40)
    opened = Image.open(tmp_path / "turned.png")
    for given in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes(), opened):
        image = Picture(given).open()
        assert (image.size, image.tobytes()) == (expected.size, expected.tobytes())
    grey = np.array([[0, 255], [256, 65535]], np.uint16)
    assert np.asarray(Picture(Image.fromarray(grey)).open())[..., 0].tolist() == [[0, 0], [1, 255]]
    for dtype in (np.int32, np.float32):
        with pytest.raises(DataError, match="of which no white is known"):
            Picture(Image.fromarray(np.full((4, 4), 1, dtype))).open()
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:900])
    with pytest.raises(DataError, match="no image that can be read"):
        Picture(Image.open(tmp_path / "cut.png")).open()


def test_logits_of_all_labels_are_never_there_at_once(image_folder, monkeypatch):
    """The output layer gets chunks of states; a model whose logits are not its head of the states goes by its own pass."""
    made = image_folder()
    model, tokenizer = qgraft.load(made.path)
    rows = [{**SEVERAL, "conversations": [*SEVERAL["conversations"][:3], {"from": "gpt", "value": "none " * 40}]}] * 2
    samples, _ = samples_for(model, tokenizer, rows)
    monkeypatch.setattr("qgraft.passes.loss.CHUNK_BYTES", 4 * len(tokenizer) * 50)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
    with torch.no_grad():
        each = image_losses(model, samples)[1]
    hook.remove()
    assert sum(seen) == len(each) > 400 and max(seen) <= 100
    monkeypatch.setattr("qgraft.passes.images.output_head", lambda model: lambda states: model.lm_head(states) * 2)
    with images_together(model, samples) as apart:
        assert apart is None
    with torch.no_grad():
        assert float((image_losses(model, samples)[1] - each).abs().max()) <= 1e-5


def test_vision_learns_beside_rows_of_text(image_folder, tmp_path):
    """Passes of text alone give a LoRA of the vision side no gradient, and are no fault."""
    model, tokenizer = qgraft.load(image_folder().path)
    qgraft.attach_lora(model, r=4, lora_alpha=8, target_modules=r"model\.vision_tower\..*q_proj")
    before = [each.detach().clone() for each in model.parameters() if each.requires_grad]
    qgraft.train(model, tokenizer, [asked(0), TEXT], arguments(tmp_path / "out", max_steps=2))
    after = [each for each in model.parameters() if each.requires_grad]
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(before, after, strict=True))


def test_without_pillow_images_are_refused_in_words(image_folder, monkeypatch):
    model, tokenizer = qgraft.load(image_folder().path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"Pillow.*\n.*qgraft\[images\]"):
        Picture(b"").open()
    monkeypatch.undo()
    model.qgraft.processor = None
    with pytest.raises(UnsupportedError, match="without a processor"):
        qgraft.evaluate(model, tokenizer, ROWS)


@pytest.mark.slow
def test_a_run_with_held_out_rows_answers_and_merges(image_folder, tmp_path):
    """From files: evaluation, the same bytes again, answers, chat, and a merge whose folder transformers reads."""
    made, path = image_folder(), write_rows(tmp_path)
    more = {"max_steps": 4, "lora_dropout": 0.1}
    for name in ("whole", "again"):
        model, tokenizer = qgraft.load(made.path)
        torch.manual_seed(0)
        qgraft.train(model, tokenizer, path, arguments(tmp_path / name, **more), eval_dataset=path)
        if name == "whole":
            kept = qgraft.evaluate(model, tokenizer, path)
            found = predict(model, tokenizer, path, arguments(tmp_path / "said", max_new_tokens=4))
            assert len(found.pairs) == 3 and [pair[0] for pair in found.pairs] == WORDS
            said = answer(model, tokenizer, [("user", "what?")], images=[tmp_path / "pictures" / "0.png"],
                          max_new_tokens=4, do_sample=False)  # fmt: skip
            assert said.text.strip() == found.pairs[0][1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert run["metrics"]["eval_loss"] == pytest.approx(kept.loss, abs=1e-5)
    assert not (tmp_path / "whole" / "calibration.safetensors").exists()
    with pytest.raises(QgraftError, match="hold images"):
        qgraft.merge(model, tokenizer)
    report = qgraft.merge(model, tokenizer, method="nearest")
    assert any("not measured" in note for note in report.notes)
    merged = qgraft.evaluate(model, tokenizer, path)
    assert merged.loss == pytest.approx(kept.loss, abs=1e-4)  # floats: exact but for rounding
    qgraft.save(model, tmp_path / "merged")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    sample = samples_for(model, tokenizer, ROWS[:1])[0][0]
    with torch.no_grad():
        batch = as_processed(made.processor, sample)
        assert (theirs(**batch).logits - model(**batch).logits).abs().max() <= 1e-5


def test_options_without_a_meaning_are_refused(image_folder, tmp_path):
    model, tokenizer = qgraft.load(image_folder().path)
    options = {"train_on_prompt": True, "cache_frozen_layers": True, "memory_limit": "6GB", "cuda_graphs": "yes"}
    with pytest.raises(OptionError) as refused:
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "out", **options))
    assert all(name in str(refused.value) for name in options)
    with pytest.raises(OptionError, match=r"neftune_noise_alpha=5.*add_tokens=x.*packing"):
        check_image_run({"neftune_noise_alpha": 5.0, "add_tokens": "x"}, [PACKED])


def test_an_estimate_says_that_it_is_of_texts(image_folder, capsys):
    assert estimate.run(["--model", str(image_folder().path), "--use_cpu", "--tokens", "64"]) == 0
    assert "what images take on the vision side is not counted" in capsys.readouterr().err


def test_what_has_no_images_refuses_them(image_folder, tmp_path):
    model, tokenizer = qgraft.load(image_folder().path)
    with pytest.raises(UnsupportedError, match="sees images"):
        qgraft.attach_prefix(model, 4)
    with pytest.raises(QgraftError, match="GGUF"):
        qgraft.save(model, tmp_path / "model.gguf")
    with pytest.raises(OptionError, match="CAUSAL_LM"):
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "out", task_type="SEQ_CLS", labels="a,b"))
    pairs = [{"prompt": "?", "chosen": "a", "rejected": "b", "images": [picture(0)]}]
    with pytest.raises(DataError, match="does not read"):
        qgraft.train(model, tokenizer, pairs, arguments(tmp_path / "out", stage="dpo"))


@pytest.mark.slow
def test_the_example_runs_as_written(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--output_dir", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    assert "held-out loss" in run.stdout
