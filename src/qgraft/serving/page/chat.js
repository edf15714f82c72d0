// Chat: the same question to the base and up to three adapters or mixes, side by side.
import { chat, get } from "./api.js";
import { h, number, say, setText } from "./dom.js";
import { t } from "./i18n.js";

const MOST = 4, MIX = 4; // columns; adapters of a mix
let columns = [];
let adapters = [];
let about, place, grid, input, sendButton, stopButton, addButton, form;
let running = null;
let wanted = null; // the adapter that another panel sends here

export function build(root, facts) {
  about = facts; place = root; columns = [];
  input = h("textarea", { rows: "2", label: "your_message", hint: "ask_hint", on: { keydown: entered } });
  sendButton = h("button", { type: "submit", t: "send" });
  stopButton = h("button", { type: "button", class: "danger", t: "stop", hidden: true, on: { click: () => running?.abort() } });
  form = { temperature: numberInput(0.7, 0, 2, 0.1), max_tokens: numberInput(256, 1, 100000, 1), seed: numberInput(1, 0, 4294967295, 1), system: h("textarea", { rows: "1" }) };
  grid = h("div", { class: "columns" });
  addButton = h("button", { type: "button", class: "quiet", t: "add_column", on: { click: () => addColumn(adapters[0] ? [{ name: adapters[0].name, weight: 1 }] : []) } });
  const fresh = h("button", { type: "button", class: "quiet", t: "new_chat", on: { click: clear } });
  root.append(
    grid,
    h("form", { class: "ask", on: { submit: send } }, input, h("div", { class: "row" }, sendButton, stopButton, h("span", { class: "grow" }), addButton, fresh),
      h("details", {}, h("summary", { t: "settings" }), h("div", { class: "fields" },
        labelled("temperature", form.temperature), labelled("max_tokens", form.max_tokens), labelled("seed", form.seed), labelled("system", form.system, "system_help")))));
  addColumn([]);
}

export async function enter() {
  try { adapters = await get("/studio/adapters"); } catch (error) { say(error.message, true); }
  adapters = adapters.filter((each) => each.seal !== "other base" && each.seal !== "changed");
  if (wanted && columns.length < MOST && !columns.some((column) => modelOf(column) === wanted)) addColumn([{ name: wanted, weight: 1 }]);
  wanted = null;
  columns.forEach(drawHead);
}

/** Let an adapter answer in a column of its own, once this panel is seen. */
export function talkTo(name) { wanted = name; }
export function spoken() { columns.forEach(drawHead); }

function numberInput(value, min, max, step) { return h("input", { type: "number", value: String(value), min: String(min), max: String(max), step: String(step) }); }
function labelled(key, control, help) { return h("label", { class: "field" }, h("span", { t: key }), control, help ? h("small", { class: "dim", t: help }) : null); }

function addColumn(parts) {
  if (columns.length >= MOST) return;
  const column = { parts, messages: [], head: h("div", { class: "head" }), talk: h("div", { class: "talk", role: "log", "aria-live": "polite", tabIndex: 0 }), root: null };
  column.talk.append(h("p", { class: "dim start", t: "nothing_yet" }));
  column.root = h("article", { class: "card column" }, column.head, column.talk);
  columns.push(column);
  grid.append(column.root);
  columns.forEach(drawHead);
}

function removeColumn(column) {
  columns = columns.filter((each) => each !== column);
  column.root.remove();
  columns.forEach(drawHead);
  input.focus();
}

/** What a column is asked by: a name, or a mix like law=0.7+med=0.3. */
function modelOf(column) {
  if (!column.parts.length) return about.base;
  if (column.parts.length === 1 && column.parts[0].weight === 1) return column.parts[0].name;
  return column.parts.map((part) => `${part.name}=${part.weight}`).join("+");
}

function drawHead(column) {
  const single = column.parts[0]?.name ?? "";
  const select = h("select", { label: "answers_with", on: { change: (event) => { column.parts = event.target.value ? [{ name: event.target.value, weight: 1 }] : []; drawHead(column); column.head.querySelector("select").focus(); } } },
    h("option", { value: "", t: "base_model", vars: { name: about.base } }), known(single).map((name) => h("option", { value: name, textContent: name })));
  select.value = single;
  const close = columns.length > 1 ? h("button", { class: "quiet small", label: "remove", textContent: "✕", on: { click: () => removeColumn(column) } }) : null;
  const rows = column.parts.filter((part, at) => at || weighable(part)).map((part) => sliderRow(column, part, column.parts.indexOf(part)));
  const free = adapters.filter((each) => !column.parts.some((part) => part.name === each.name));
  const more = column.parts.length && column.parts.length < MIX && free.length
    ? h("select", { label: "add_to_mix", class: "small", on: { change: (event) => { addToMix(column, event.target.value); } } },
      h("option", { value: "", t: "add_to_mix" }), free.map((each) => h("option", { value: each.name, textContent: each.name }))) : null;
  column.head.replaceChildren(h("div", { class: "row" }, select, close), ...rows, ...(more ? [more] : []));
  addButton.hidden = columns.length >= MOST;
  grid.dataset.count = columns.length;
}

function addToMix(column, name) {
  const part = { name, weight: 1 };
  if (weighable(part)) part.weight = 0.5;
  column.parts.push(part);
  drawHead(column);
}

function known(also) {
  const names = adapters.map((each) => each.name);
  return also && !names.includes(also) ? [also, ...names] : names;
}

/** A prefix is there or not: a share of one means nothing. */
function weighable(part) { return ["LoRA", "gguf", undefined].includes(adapters.find((each) => each.name === part.name)?.kind); }

function sliderRow(column, part, at) {
  const shown = h("output", { textContent: number(part.weight, 2) });
  const label = at ? h("span", { class: "clip", textContent: part.name }) : h("span", { class: "clip", t: "weight" });
  const slider = h("input", { type: "range", min: "-1", max: "2", step: "0.05", value: String(part.weight), "aria-label": t("weight_of", { name: part.name }), disabled: !weighable(part),
    on: { input: (event) => { part.weight = Number(event.target.value); shown.textContent = number(part.weight, 2); } } });
  const drop = at ? h("button", { class: "quiet small", label: "remove", textContent: "✕", on: { click: () => { column.parts.splice(at, 1); drawHead(column); } } }) : null;
  return h("div", { class: "slider" }, label, slider, shown, drop);
}

function entered(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); event.target.form.requestSubmit(); }
}

function clear() {
  running?.abort();
  for (const column of columns) { column.messages = []; column.talk.replaceChildren(h("p", { class: "dim start", t: "nothing_yet" })); }
}

async function send(event) {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  running = new AbortController();
  sendButton.hidden = true; stopButton.hidden = false;
  try { await Promise.all(columns.map((column) => answer(column, text, running.signal))); } finally {
    running = null;
    sendButton.hidden = false; stopButton.hidden = true;
    input.focus();
  }
}

async function answer(column, text, signal) {
  column.talk.querySelector(".start")?.remove();
  const said = h("div", { class: "text" }), foot = h("small", { class: "dim" });
  const thought = h("details", { class: "thought", hidden: true }, h("summary", { t: "thought" }), h("div", { class: "text" }));
  column.talk.append(h("div", { class: "turn user" }, h("div", { class: "text", textContent: text })), h("div", { class: "turn model" }, thought, said, foot));
  column.talk.setAttribute("aria-busy", "true"); // read out when it is complete, not word by word
  const system = form.system.value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...column.messages, { role: "user", content: text }];
  const settings = { temperature: Number(form.temperature.value), max_tokens: Number(form.max_tokens.value), seed: Number(form.seed.value) };
  let whole = "", finish = null, tokens = 0;
  const began = performance.now();
  try {
    for await (const chunk of chat({ model: modelOf(column), messages, ...settings }, signal)) {
      const choice = chunk.choices[0];
      tokens = chunk.usage?.completion_tokens ?? tokens;
      finish = choice?.finish_reason ?? finish;
      if (choice?.delta?.reasoning_content) { thought.hidden = false; thought.lastChild.textContent += choice.delta.reasoning_content; }
      if (choice?.delta?.content) { whole += choice.delta.content; said.textContent = whole; }
      column.talk.scrollTop = column.talk.scrollHeight;
    }
    const seconds = (performance.now() - began) / 1000;
    setText(foot, "speed", { tokens, rate: (tokens / seconds).toFixed(1) });
    if (finish === "length") foot.after(" ", h("small", { class: "dim", t: "cut" }));
    column.messages.push({ role: "user", content: text }, { role: "assistant", content: whole });
  } catch (error) {
    if (error.name === "AbortError") {
      setText(foot, "stopped");
      if (whole) column.messages.push({ role: "user", content: text }, { role: "assistant", content: whole });
    } else said.append(h("p", { class: "bad", role: "alert", textContent: error.message }));
  } finally { column.talk.setAttribute("aria-busy", "false"); column.talk.scrollTop = column.talk.scrollHeight; }
}
