// Train: drop a file, see how its rows are read, choose a preset, start.
import { get, post, put } from "./api.js";
import { action, bytes, field, h, say } from "./dom.js";
import { t } from "./i18n.js";
import { choose } from "./runs.js";

const SUFFIX = /\.(csv|tsv|jsonl?|JSONL?|CSV|TSV)$/;
let about, show, files, drop, status, preview, options, presets, name, dataset = "", columns;

export function build(root, facts, showPanel) {
  about = facts; show = showPanel; dataset = "";
  const picker = h("input", { type: "file", accept: ".csv,.tsv,.json,.jsonl", class: "hidden-input", id: "file", on: { change: (event) => event.target.files[0] && upload(event.target.files[0]).finally(() => { event.target.value = ""; }) } });
  drop = h("label", { class: "drop", for: "file" }, picker, h("span", { t: "drop" }), h("small", { class: "dim", t: "drop_help" }));
  for (const event of ["dragover", "dragenter"]) drop.addEventListener(event, (each) => { each.preventDefault(); drop.classList.add("over"); });
  for (const event of ["dragleave", "drop"]) drop.addEventListener(event, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]); });
  files = h("select", { on: { change: (event) => { if (event.target.value) use(event.target.value); } } });
  status = h("p", { role: "status", "aria-live": "polite", class: "dim" });
  preview = h("div", { class: "preview" });
  root.append(
    h("article", { class: "card" }, h("h2", { t: "step_1" }), drop, field("or_file", files), status),
    h("article", { class: "card" }, h("h2", { t: "step_2" }), columnFields(), preview),
    h("article", { class: "card" }, h("h2", { t: "step_3" }), presetFields(), detailFields(),
      h("form", { class: "row wrap bottom", on: { submit: (event) => event.preventDefault() } }, field("run_name", name = h("input", { type: "text", pattern: "[A-Za-z0-9_\\-]{1,64}", autocomplete: "off" }), "run_name_help"), h("button", { type: "button", t: "start_training", id: "start-training", on: { click: action(start) } })),
      h("p", { class: "dim", t: "child_note" })));
}

export async function enter() {
  try { fillFiles(await get("/studio/datasets")); } catch (error) { say(error.message, true); }
}

function fillFiles(found) {
  files.replaceChildren(h("option", { value: "", t: "choose" }), ...found.map((each) => h("option", { value: each.name, textContent: `${each.name} (${bytes(each.bytes)})` })));
  files.value = dataset;
}

function columnFields() {
  const text = () => h("input", { type: "text", autocomplete: "off" });
  columns = { prompt_column: text(), response_column: text(), system: h("textarea", { rows: "1" }), name: text(), author: text(), mask_history: h("input", { type: "checkbox" }) };
  return h("details", {}, h("summary", { t: "columns" }), h("div", { class: "fields" },
    field("question_column", columns.prompt_column), field("answer_column", columns.response_column), field("system", columns.system),
    field("model_name", columns.name), field("author_name", columns.author), h("label", { class: "check" }, columns.mask_history, h("span", { t: "mask_history" }))),
    h("button", { type: "button", class: "quiet", t: "read_again", on: { click: action(() => dataset && read()) } }));
}

function presetFields() {
  presets = Object.keys(about.presets).map((key) => h("input", { type: "radio", name: "preset", value: key, on: { change: takePreset } }));
  presets.find((each) => each.value === "standard").checked = true;
  return h("fieldset", { class: "presets" }, h("legend", { t: "preset" }), presets.map((each) =>
    h("label", { class: "preset" }, each, h("strong", { t: `preset_${each.value}` }), h("small", { class: "dim", t: `preset_${each.value}_help` }))));
}

function detailFields() {
  const number = (min, step) => h("input", { type: "number", min: String(min), step: String(step) });
  options = { num_train_epochs: number(0, "any"), learning_rate: number(0, "any"), r: number(1, 1), pre_seq_len: number(1, 1), max_length: number(2, 1), val_size: number(0, "any"), per_device_train_batch_size: number(1, 1), max_steps: number(1, 1), seed: number(0, 1) };
  const labels = { num_train_epochs: "epochs", learning_rate: "learning_rate", r: "rank", pre_seq_len: "prefix_length", max_length: "max_length", val_size: "val_size", per_device_train_batch_size: "batch", max_steps: "max_steps", seed: "seed" };
  takePreset();
  options.max_length.value = String(Math.min(2048, about.context ?? 2048));
  options.val_size.value = "10";
  options.per_device_train_batch_size.value = "8";
  return h("details", {}, h("summary", { t: "details" }), h("div", { class: "fields" }, Object.entries(options).map(([key, input]) => field(labels[key], input))));
}

function chosenPreset() { return presets.find((each) => each.checked).value; }

function takePreset() {
  if (!options) return;
  const preset = about.presets[chosenPreset()];
  for (const key of ["num_train_epochs", "learning_rate", "r", "pre_seq_len"]) options[key].value = String(preset[key] ?? "");
  for (const key of ["r", "pre_seq_len"]) options[key].disabled = !(key in preset); // a LoRA has the one, a prefix the other
}

async function upload(file) {
  try {
    if (!SUFFIX.test(file.name)) throw new Error(t("not_rows", { name: file.name }));
    if (file.size > about.upload) throw new Error(t("too_large", { name: file.name, most: bytes(about.upload) }));
    status.textContent = t("uploading", { name: file.name });
    const stem = file.name.replace(SUFFIX, "").replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "rows";
    const kept = await put(`/studio/datasets/${encodeURIComponent(stem + SUFFIX.exec(file.name)[0].toLowerCase())}`, file);
    status.textContent = "";
    dataset = kept.name;
    await enter();
    await use(kept.name);
  } catch (error) { status.textContent = ""; say(error.message, true); }
}

async function use(chosen) {
  dataset = chosen;
  files.value = chosen;
  if (!name.value) name.value = chosen.replace(SUFFIX, "").replace(/[^A-Za-z0-9_-]+/g, "-").slice(0, 50) || "run";
  await read();
}

function reading() {
  const found = Object.fromEntries(Object.entries(columns).map(([key, input]) => [key, input.type === "checkbox" ? input.checked || null : input.value.trim()]));
  return { ...found, max_length: Number(options.max_length.value) || null };
}

async function read() {
  preview.replaceChildren(h("p", { class: "dim", t: "reading" }));
  try {
    const found = await post("/studio/rows", { dataset, options: reading() });
    options.val_size.value = found.kept < 20 ? "0" : "10"; // so few rows are needed to learn from
    preview.replaceChildren(...shown(found));
  } catch (error) { preview.replaceChildren(h("pre", { class: "bad", role: "alert", textContent: error.message })); }
}

function shown(found) {
  const dropped = Object.entries(found.dropped).map(([why, n]) => h("li", { class: "bad", t: "dropped_row", vars: { n, why, where: found.examples[why]?.[0] ?? "" } }));
  const told = [
    h("li", { t: found.whole ? "rows_read" : "first_rows", vars: { read: found.read, kept: found.kept } }),
    h("li", { t: "tokens_learned", vars: { learned: found.learned, tokens: found.tokens, longest: found.longest } }),
    found.truncated ? h("li", { class: "bad", t: "cut_rows", vars: { n: found.truncated } }) : null, ...dropped, ...found.notes.map((note) => h("li", { textContent: note }))];
  return [h("ul", { class: "told" }, told), found.problem ? h("pre", { class: "bad", textContent: found.problem }) : null,
    h("p", { class: "row legend" }, h("span", { class: "tokens" }, h("span", { class: "learned", t: "legend_learned" })), h("span", { class: "tokens" }, h("span", { t: "legend_read" }))),
    h("ol", { class: "rows", tabIndex: 0, label: "step_2" }, found.rows.map((row) => h("li", {}, h("small", { class: "dim", textContent: `${row.source} · ${row.tokens}` }), h("div", { class: "tokens" }, row.pieces.map(token)))))].filter(Boolean);
}

function token([text, learned], at) {
  return h("span", { class: `${learned ? "learned" : ""}${at % 2 ? " odd" : ""}`, textContent: text.replace(/\n/g, "⏎\n") });
}

async function start() {
  const found = Object.fromEntries(Object.entries(options).filter(([, input]) => input.value !== "").map(([key, input]) => [key, Number(input.value)]));
  const preset = about.presets[chosenPreset()];
  const body = { ...reading(), ...found, val_size: (found.val_size ?? 0) / 100 };
  if (preset.r) body.lora_alpha = preset.lora_alpha / preset.r * (found.r ?? preset.r); // the rank changes how much can be learned, not how strongly
  const run = await post("/studio/train", { name: name.value.trim(), dataset, preset: chosenPreset(), options: body });
  say(t("started", { name: run.name }));
  name.value = "";
  choose(run.name);
  show("runs");
}
