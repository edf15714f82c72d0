"""Whisper against transformers, PEFT and Hugging Face's recipe: labels, losses, training, what is written down, refusals."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_speech import RATE, SECONDS, audio, tone, write_speech_model

import qgraft
from qgraft.adapters.targets import lora_layers
from qgraft.data.sounds import Sound, sound_of
from qgraft.data.speech_samples import build_speech, encode_text, read_recordings, spoken_as
from qgraft.errors import DataError, OptionError, QgraftError, UnsupportedError
from qgraft.linear import QuantizedLinear
from qgraft.passes.pairs import split_pairs
from qgraft.passes.speech import features_of, generate_spoken, speech_losses, speech_together
from qgraft.serving.answering import answer
from qgraft.training.error_rates import edits, error_rates
from qgraft.training.padded import Padded
from qgraft.training.predict import predict
from qgraft.training.speech import SPEECH

EXAMPLE = Path(__file__).parents[2] / "examples" / "speech.py"
ROWS = [{"audio": audio(200 + 100 * n, 0.3 + 0.05 * n), "text": text}
        for n, text in enumerate(["low", "a bit higher", "higher", "so high", "high", "top"])]  # fmt: skip
TOLD = {"language": "en", "task": "transcribe"}


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory):
    """(folder, the model and the processor that transformers made), of English alone or not; none is to be changed."""
    made = {}

    def get(multilingual=True):
        if multilingual not in made:
            folder = tmp_path_factory.mktemp("whisper")
            model = write_speech_model(folder, multilingual)
            processor = transformers.WhisperProcessor.from_pretrained(folder, **(TOLD if multilingual else {}))
            made[multilingual] = SimpleNamespace(path=folder, model=model, processor=processor)
        return made[multilingual]

    return get


def recipe_batch(processor, rows):
    """What the collator of Hugging Face's recipe makes of rows."""
    made = processor.feature_extractor
    features = [{"input_features": made(row["audio"]["array"], sampling_rate=row["audio"]["sampling_rate"]).input_features[0]}
                for row in rows]  # fmt: skip
    batch = made.pad(features, return_tensors="pt")
    tokens = [{"input_ids": processor.tokenizer(row["text"]).input_ids} for row in rows]
    padded = processor.tokenizer.pad(tokens, return_tensors="pt")
    labels = padded["input_ids"].masked_fill(padded.attention_mask.ne(1), -100)
    assert (labels[:, 0] == processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")).all()
    return {"input_features": batch["input_features"], "labels": labels[:, 1:]}


@torch.no_grad()
def logits_apart(one, other, processor):
    given = recipe_batch(processor, ROWS[:2])
    return float((one(**given).logits - other(**given).logits).abs().max())


def arguments(folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 3, "logging_steps": 1, "use_cpu": True, "plot_loss": False,
                "save_strategy": "no", "compute": "float32", "learning_rate": 1e-2, "r": 4, "lora_alpha": 8,
                "language": "en"}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})


def samples_of(model, rows=ROWS, **told):
    return build_speech(model, *read_recordings(rows), spoken_as(model, *{**TOLD, **told}.values(), 48))


@pytest.mark.parametrize("multilingual", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_folder_computes_what_transformers_does(speech_folder, multilingual):
    """Logits, and what generate() writes of several recordings."""
    made = speech_folder(multilingual)
    model, _ = qgraft.load(made.path)
    assert type(model) is type(made.model) and logits_apart(model, made.model, made.processor) <= 1e-5
    spoken = spoken_as(model, "english", None, 48)
    assert spoken.told == (TOLD if multilingual else {})
    features = recipe_batch(made.processor, ROWS[:3])["input_features"]
    sounds = [sound_of(row["audio"]) for row in ROWS[:3]]
    assert torch.equal(features_of(model, sounds)["input_features"], features)
    expected = made.model.generate(features, max_new_tokens=6, **spoken.told).tolist()
    assert generate_spoken(model, sounds, max_new_tokens=6, **spoken.told) == expected


@pytest.mark.slow
def test_packed_layers_are_those_of_the_dequantized_model(speech_folder):
    """All linear layers of both halves but the output layer are packed."""
    made = speech_folder()
    model, _ = qgraft.load(made.path, quantize="q8_0")
    oracle = transformers.WhisperForConditionalGeneration.from_pretrained(made.path).eval()
    packed = {path: each for path, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    held = {path: each.packed.format for path, each in packed.items()}
    assert held.pop("proj_out") == "f32" and set(held.values()) == {"q8_0"} and len(held) == 2 * 6 + 2 * 10
    for path, each in packed.items():
        oracle.get_submodule(path).weight.data.copy_(each.dequantize())
    assert logits_apart(model, oracle, made.processor) <= 1e-5


def test_labels_are_those_of_the_recipe(speech_folder):
    """Language, task, no timestamps, the text, the end; with timestamps where the text has some."""
    made = speech_folder()
    model, tokenizer = qgraft.load(made.path)
    for language, task in (("en", "transcribe"), ("Mandarin", "transcribe"), ("yue", "translate")):
        for text, stamped in ((" Good morning. 好", False), ("<|0.00|> Good<|0.40|>", True)):
            made.processor.tokenizer.set_prefix_tokens(language=language, task=task, predict_timestamps=stamped)
            expected = made.processor.tokenizer(text).input_ids[1:]
            assert encode_text(tokenizer, text, spoken_as(model, language, task, 48)) == expected
    made.processor.tokenizer.set_prefix_tokens(**TOLD, predict_timestamps=False)
    spoken = spoken_as(model, "en", None, 48)
    for text, why in (("<|0.00|>a<|9.00|>", "does not begin"), ("a<|0.40|>", "does not begin"),
                      ("<|endoftext|>", "special token"), ("a" * 60, "longer than 48 tokens")):  # fmt: skip
        with pytest.raises(DataError, match=why):
            encode_text(tokenizer, text, spoken)
    with pytest.raises(OptionError, match="no language is given"):
        spoken_as(model, None, None, 48)
    with pytest.raises(OptionError, match="'klingon': unknown"):
        spoken_as(model, "klingon", None, 48)
    with pytest.raises(OptionError, match="expected transcribe or translate"):
        spoken_as(model, "en", "answer", 48)


def test_an_english_model_takes_no_other_language(speech_folder):
    made = speech_folder(False)
    model, tokenizer = qgraft.load(made.path)
    spoken = spoken_as(model, None, None, 48)
    assert encode_text(tokenizer, "Good.", spoken) == made.processor.tokenizer("Good.").input_ids[1:]
    assert spoken == spoken_as(model, "English", "transcribe", 48)
    for told in (("de", None), (None, "translate")):
        with pytest.raises(OptionError, match="English only"):
            spoken_as(model, *told, 48)


def test_files_that_contradict_each_other_are_refused(speech_folder):
    model, _ = qgraft.load(speech_folder().path)
    model.generation_config.lang_to_id = {**model.generation_config.lang_to_id, "<|de|>": 7}
    with pytest.raises(UnsupportedError, match=r"<\|de\|> is token \d+ of the tokenizer, and 7"):
        spoken_as(model, "de", None, 48)
    del model.generation_config.lang_to_id
    with pytest.raises(UnsupportedError, match="names no lang_to_id"):
        generate_spoken(model, [sound_of(audio(200))], **TOLD)
    model.qgraft.processor.feature_extractor.feature_size = 80
    with pytest.raises(UnsupportedError, match="80 numbers of each of 100 frames"):
        spoken_as(model, "en", None, 48)
    model.qgraft.processor = None
    with pytest.raises(UnsupportedError, match="without a feature extractor"):
        spoken_as(model, "en", None, 48)


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_is_that_of_peft(speech_folder, tmp_path, monkeypatch, steps):
    """AdamW, clipping and a linear schedule on the batches of the recipe: the same losses; PEFT reads the adapter."""
    made, batches = speech_folder(), []
    own = Padded.batches
    monkeypatch.setattr(Padded, "batches", lambda self, rows, tokens: batches.append(rows) or own(self, rows, tokens))
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, 4, 8, target_modules="q_proj,v_proj")
    qgraft.save_adapter(model, tmp_path / "start")
    out, options = tmp_path / "out", {"max_steps": steps, "target_modules": "q_proj,v_proj", "eval_dataset": None}
    qgraft.train(model, tokenizer, ROWS, arguments(out, **options))
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]

    base = transformers.WhisperForConditionalGeneration.from_pretrained(made.path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trained = [each for each in theirs.parameters() if each.requires_grad]
    assert sum(each.numel() for each in trained) == sum(
        each.numel() for each in model.parameters() if each.requires_grad
    )
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    texts, expected = {row["text"]: row for row in ROWS}, []
    theirs.train()
    for rows in batches:
        loss = theirs(**recipe_batch(made.processor, [texts[each.text] for each in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5) and (steps < 20 or losses[-1] < losses[0] - 0.5)

    assert json.loads((out / "adapter_config.json").read_text())["task_type"] is None
    fresh = transformers.WhisperForConditionalGeneration.from_pretrained(made.path)
    read = peft.PeftModel.from_pretrained(fresh, out).eval()
    assert logits_apart(read, model, made.processor) <= 1e-5 < logits_apart(read, made.model, made.processor)
    again, _ = qgraft.load(made.path)
    assert qgraft.load_adapter(again, out).applied == len(dict(lora_layers(model)))
    assert logits_apart(again, model, made.processor) == 0


def test_losses_of_a_pass_are_each_recordings_own(speech_folder):
    """Weighed, smoothed, in passes of any size; a recording's loss is what transformers says of it alone."""
    made = speech_folder()
    model, tokenizer = qgraft.load(made.path)
    samples = samples_of(model)
    samples[1] = replace(samples[1], weight=0.5)
    with speech_together(model, samples) as apart:
        assert apart is None
    oracle = smooth = 0.0
    for row, each in zip(ROWS, samples, strict=True):
        with torch.no_grad():
            said = made.model(**(batch := recipe_batch(made.processor, [row])))
        assert batch["labels"][0].tolist() == each.labels
        oracle += each.weight * said.loss.item() * len(each.labels)
        smooth += each.weight * F.cross_entropy(
            said.logits[0], batch["labels"][0], reduction="sum", label_smoothing=0.1
        )
    for tokens in (0, 140, 4000):
        parts = split_pairs(samples, tokens)
        assert len(parts) == {0: 6, 140: 3, 4000: 1}[tokens]
        with torch.no_grad():
            assert sum(float(speech_losses(model, part)[0]) for part in parts) == pytest.approx(oracle, rel=1e-5)
            assert sum(float(speech_losses(model, part, 0.1)[0]) for part in parts) == pytest.approx(
                float(smooth), rel=1e-5
            )
    assert Padded(SPEECH).count(samples) == sum(each.weight * len(each.labels) for each in samples)
    found, unweighed = qgraft.evaluate(model, tokenizer, ROWS, language="en"), samples_of(model)
    with torch.no_grad():
        total = float(speech_losses(model, unweighed)[0])
    assert found.loss == pytest.approx(total / found.labels, rel=1e-5) and found.samples == len(ROWS)


@pytest.mark.parametrize("heard, why", [
    ({"array": tone(200), "sampling_rate": 0}, "sampling_rate '0'"),
    ({"array": tone(200)}, "sampling_rate 'None'"),
    (tone(200), "without its sampling_rate"),
    ({"array": [1, 2, 3], "sampling_rate": RATE}, "no floats"),
    ({"array": np.zeros((2, 9), np.float32), "sampling_rate": RATE}, "2 dimensions"),
    ({"array": np.zeros(0, np.float32), "sampling_rate": RATE}, "is empty"),
    ({"array": np.zeros(900, np.float32), "sampling_rate": RATE}, "is silent"),
    ({"array": np.full(900, np.nan), "sampling_rate": RATE}, "no numbers"),
    ({"array": tone(200) * 32767, "sampling_rate": RATE}, "above 4"),
    ({"array": tone(200, SECONDS + 0.01), "sampling_rate": RATE}, "longer than the 1 seconds"),
    ("https://example.org/a.wav", "nothing is fetched"),
    ("gone.wav", "not there"),
    (["a.wav", "b.wav"], "names 2 recordings, expected one"),
    (7, "expected a path"),
    (None, "expected a path"),
])  # fmt: skip
def test_recordings_that_cannot_be_heard_are_counted(speech_folder, heard, why):
    rows = [{"audio": heard, "text": "high"}, {"audio": audio(300, SECONDS), "text": "high"}]
    made = speech_folder()
    own = SimpleNamespace(processor=made.processor)
    model = SimpleNamespace(qgraft=own, config=made.model.config, generation_config=made.model.generation_config)
    conversations, accounting = read_recordings(rows)
    assert len(build_speech(model, conversations, accounting, spoken_as(model, "en", None, 48))) == 1
    assert [why in reason for reason in accounting.dropped] == [True]


def test_rows_name_their_columns(tmp_path):
    for row in (
        {"audio": audio(200), "sentence": "high", "speaker": 3},
        {"audio": [audio(200)], "transcription": "high"},
    ):
        (conversation,), accounting = read_recordings([row])
        assert conversation.messages[1].content == "high" and list(accounting.ignored) == [*{"speaker"} & row.keys()]
    named = {"prompt": "clip", "response": "says"}
    (conversation,), _ = read_recordings([{"clip": audio(200), "says": "high"}], columns=named)
    assert conversation.messages[1].content == "high"
    for row, why in (({"audio": audio(200)}, "no column of the text"), ({"text": "high"}, "no column of the recording"),
                     ({"audio": audio(200), "text": " "}, "no text")):  # fmt: skip
        with pytest.raises(DataError, match=f"{why}(.|\n)*rows hold a recording"):
            read_recordings([row])


def test_files_are_read_and_resampled(speech_folder, tmp_path):
    """WAV, FLAC and bytes, with several channels and another rate, as soundfile and soxr have them; in their folder only."""
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    (tmp_path / "rows").mkdir()
    both = np.stack([tone(200), tone(500)], 1)
    soundfile.write(tmp_path / "rows" / "a.wav", tone(200), RATE)
    soundfile.write(tmp_path / "rows" / "b.flac", both, 44_100)
    soundfile.write(tmp_path / "secret.wav", tone(200), RATE)
    raw = (tmp_path / "rows" / "a.wav").read_bytes()
    assert np.abs(sound_of(raw).heard(RATE, 1.0) - tone(200)).max() < 1e-4
    assert (
        sound_of(raw).said
        == sound_of(str(tmp_path / "rows" / "a.wav")).said
        == sound_of({"bytes": raw, "path": "x"}).said
    )
    expected = soxr.resample(soundfile.read(tmp_path / "rows" / "b.flac", dtype="float32")[0].mean(1), 44_100, RATE)
    assert np.array_equal(sound_of(tmp_path / "rows" / "b.flac").heard(RATE, 1.0), expected)
    names = ["a.wav", "b.flac", "../secret.wav", str(tmp_path / "secret.wav"), "rows.jsonl"]
    rows = tmp_path / "rows" / "rows.jsonl"
    rows.write_text("".join(json.dumps({"audio": name, "text": "high"}) + "\n" for name in names))
    conversations, accounting = read_recordings(rows)
    assert accounting.kept == 3 and accounting.dropped == {
        "a recording lies outside of the folder of its file (allow_outside_files=True allows it)": 2
    }
    assert read_recordings(rows, allow_outside_files=True)[1].kept == 5
    model, _ = qgraft.load(speech_folder().path)
    samples = build_speech(model, conversations, accounting, spoken_as(model, "en", None, 48))
    assert len(samples) == 2 and any("no recording that can be read" in why for why in accounting.dropped)
    with pytest.raises(DataError, match="longer"):
        Sound(raw).heard(RATE, 0.2)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "MP3", "OGG", "FLAC"])
def test_a_file_that_breaks_off_is_no_recording_of_its_text(kind):
    """libsndfile reads what there is, of which the text says more; one made by a pipe does not know its length."""
    soundfile, made = pytest.importorskip("soundfile"), io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE).astype(np.float32)
    soundfile.write(made, noise, RATE, format=kind)
    raw = made.getvalue()
    assert len(Sound(raw).heard(RATE, 5.0)) == len(noise)
    for share in (0.9, 0.5):
        with pytest.raises(DataError, match=r"a recording (breaks off|is no recording that can be read: )"):
            Sound(raw[: int(len(raw) * share)]).heard(RATE, 5.0)
    with pytest.raises(DataError, match="longer than the 2 seconds"):
        Sound(raw).heard(RATE, 2.0)
    if kind == "WAV":
        assert len(Sound(raw[:40] + b"\xff" * 4 + raw[44:]).heard(RATE, 5.0)) == len(noise)


def test_without_the_libraries_what_is_missing_is_named(monkeypatch):
    for name in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"soundfile.*\n.*qgraft\[speech\]"):
        Sound(b"RIFF").open()
    with pytest.raises(UnsupportedError, match=r"8000 samples a second.*\n.*qgraft\[speech\]"):
        sound_of(audio(200, rate=8000)).heard(RATE, 1.0)
    assert np.array_equal(sound_of(audio(200)).heard(RATE, 1.0), tone(200))


def test_error_rates_are_those_of_jiwer():
    assert edits("kitten", "sitting") == 3 and edits([], ["a"]) == 1 and edits("abc", "") == 3
    pairs = [("the cat sat", "the cat sat"), ("on the mat", "in mat now ok"), ("好 天气", "好天"), ("gone", "")]
    found = error_rates(pairs)
    assert found == {
        "wer": pytest.approx(100 * 7 / 9),
        "cer": pytest.approx(100 * (0 + 6 + 1 + 4) / (9 + 8 + 3 + 4), abs=15),
    }
    jiwer = pytest.importorskip("jiwer")
    references, answers = (list(each) for each in zip(*pairs, strict=True))
    assert found["wer"] == pytest.approx(100 * jiwer.wer(references, answers))
    bare = [["".join(text.split()) for text in texts] for texts in (references, answers)]
    assert found["cer"] == pytest.approx(100 * jiwer.cer(*bare))


def test_predictions_are_what_transformers_generates(speech_folder, tmp_path):
    """Several at once, with the error rates and the loss; the same in a chat. BLEU's libraries are not asked for."""
    made = speech_folder()
    model, tokenizer = qgraft.load(made.path)
    features = recipe_batch(made.processor, ROWS[:5])["input_features"]
    ids = made.model.generate(features, **TOLD, max_new_tokens=6)
    expected = [text.strip() for text in made.processor.batch_decode(ids, skip_special_tokens=True)]
    args = arguments(tmp_path / "out", do_predict=True, max_new_tokens=6, per_device_eval_batch_size=3)
    found = predict(model, tokenizer, ROWS[:5], args)
    assert found.pairs == [(row["text"], text) for row, text in zip(ROWS[:5], expected, strict=True)]
    loss = qgraft.evaluate(model, tokenizer, ROWS[:5], language="en").loss
    assert found.scores == error_rates(found.pairs) | {"loss": pytest.approx(loss, rel=1e-6)}
    said = answer(model, tokenizer, [], audio=ROWS[0]["audio"], language="en", max_new_tokens=6)
    assert said.text.strip() == expected[0]
    with pytest.raises(OptionError, match="no recording is given"):
        answer(model, tokenizer, [("user", "hello")])


REFUSED = {
    "stage": "dpo", "finetuning_type": "p_tuning", "train_on_prompt": True, "template": "chatml", "system": "Be brief.",
    "cache_frozen_layers": True, "neftune_noise_alpha": 5.0, "memory_limit": "6GB", "source_prefix": "x: ",
    "max_source_length": 9, "add_tokens": ["<new>"],
}  # fmt: skip


def test_what_has_no_meaning_is_refused(speech_folder, tmp_path, capsys):
    """In train() and evaluate(); on the command line by config.json alone. So is speech asked of models of text."""
    from tiny_pairs import write_pairs_model

    from qgraft.cli.main import main

    made = speech_folder()
    model, tokenizer = qgraft.load(made.path)
    for name, value in REFUSED.items():
        with pytest.raises(OptionError, match=f"(?s)(encoder-decoder|that hears).*{name}"):
            qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "out", **{name: value}))
    with pytest.raises(OptionError, match="source_prefix"):
        qgraft.evaluate(model, tokenizer, ROWS, language="en", source_prefix="x: ")
    with pytest.raises(QgraftError):
        qgraft.attach_prefix(model, 4)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((made.path / "config.json").read_bytes())
    for words in (
        ["train", "--model_name_or_path", bare, "--dataset", "x", "--stage", "dpo", "--output_dir", tmp_path / "o"],
        ["train", "--model_name_or_path", bare, "--dataset", "x", "--source_prefix", "x", "--output_dir", tmp_path / "o"],
        ["serve", "--model", bare], ["estimate", "--model", bare],
    ):  # fmt: skip
        assert main(list(map(str, words))) == 2
        assert "encoder-decoder" in (said := capsys.readouterr().err) or "that hears" in said
    write_pairs_model("t5", tmp_path / "t5")
    text, its = qgraft.load(tmp_path / "t5")
    rows = [{"instruction": "good", "output": "bad"}]
    for name in ("language", "task"):
        with pytest.raises(OptionError, match=f"{name}=.*models that hear"):
            qgraft.train(text, its, rows, arguments(tmp_path / "out", **{"language": None, name: "en"}))
        with pytest.raises(OptionError, match="models that hear"):
            qgraft.evaluate(text, its, rows, **{name: "en"})
    with pytest.raises(OptionError, match="audio: of models that hear"):
        answer(text, its, [("user", "good")], audio=audio(200))


@pytest.mark.slow
def test_a_lora_is_merged_into_float_weights_without_loss(speech_folder, tmp_path):
    """transformers reads the saved folder with its processor, which computes what the adapter did."""
    made = speech_folder()
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, 4, 8)
    for _, layer in lora_layers(model):
        for each in layer.loras["default"].parameters():
            torch.nn.init.normal_(each, std=0.1)
    given = recipe_batch(made.processor, ROWS[:2])
    with torch.no_grad():
        adapted = model(**given).logits
    with pytest.raises(UnsupportedError, match="nearest"):
        qgraft.merge(model, tokenizer)
    qgraft.merge(model, tokenizer, method="nearest")
    qgraft.save(model, tmp_path / "merged")
    merged = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    processor = transformers.WhisperProcessor.from_pretrained(tmp_path / "merged")
    assert processor.feature_extractor.to_dict() == made.processor.feature_extractor.to_dict()
    assert merged.generation_config.lang_to_id == made.model.generation_config.lang_to_id
    with torch.no_grad():
        assert float((merged(**given).logits - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bytes(speech_folder, tmp_path):
    """With dropout in the adapter, and features masked by the model in training."""
    options = {"lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2, "val_size": 2,
               "lr_scheduler_type": "constant"}  # fmt: skip
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        model, tokenizer = qgraft.load(speech_folder().path)
        model.config.apply_spec_augment, model.config.mask_time_length = True, 5
        again = {"resume_from_checkpoint": "auto"} if (tmp_path / folder).exists() else {}
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / folder, **options, **again, max_steps=steps))
    whole, parts = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
def test_the_commands_learn_measure_write_down_and_merge(speech_folder, tmp_path, capsys):
    """From files beside their rows: language and task are remembered; the merged folder is measured as the adapter is."""
    from qgraft.cli.main import main

    soundfile = pytest.importorskip("soundfile")
    made, rows, out = speech_folder(), tmp_path / "rows.jsonl", tmp_path / "out"
    for number, row in enumerate(ROWS):
        soundfile.write(tmp_path / f"{number}.wav", row["audio"]["array"], RATE)
    lines = [json.dumps({"audio": f"{number}.wav", "text": row["text"]}) for number, row in enumerate(ROWS)]
    rows.write_text("\n".join(lines))

    def run(*words):
        capsys.readouterr()
        assert main(list(map(str, words))) == 0
        return capsys.readouterr().out

    run("train", "--model_name_or_path", made.path, "--dataset", rows, "--language", "german", "--task", "translate",
        "--max_steps", 4, "--learning_rate", 1e-2, "--output_dir", out, "--use_cpu", "true", "--compute", "float32",
        "--do_train", "--do_predict", "--test_dataset", rows, "--max_new_tokens", 5)  # fmt: skip
    results = json.loads((out / "predict_results.json").read_text())
    assert {"predict_wer", "predict_cer", "predict_loss"} <= results.keys()
    assert results["generation"]["language"] == "de" and results["generation"]["task"] == "translate"
    found = json.loads(run("eval", "--model", made.path, "--adapter", out, "--dataset", rows, "--json"))["results"]
    assert found["out"]["loss"] < found["base"]["loss"]
    run("chat", "--model", made.path, "--adapter", out, "--audio", tmp_path / "0.wav", "--max_new_tokens", 3)
    assert "Whisper" in run("inspect", made.path) or "whisper" in run("inspect", made.path)
    run("merge", "--model", made.path, "--adapter", out, "--method", "nearest", "--output", tmp_path / "merged")
    words = (
        "eval",
        "--model",
        tmp_path / "merged",
        "--dataset",
        rows,
        "--language",
        "de",
        "--task",
        "translate",
        "--json",
    )
    assert json.loads(run(*words))["results"]["base"]["loss"] == pytest.approx(found["out"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    found = subprocess.run(
        [sys.executable, EXAMPLE, "--tiny", "--output_dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "read by PEFT, same text: True" in found and "wer" in found
