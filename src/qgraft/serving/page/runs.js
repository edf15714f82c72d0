// Runs: what is being trained and what was, their curves over each other, and what they answer.
import { chat, get, post } from "./api.js";
import { chart, smoothed } from "./chart.js";
import { action, badge, h, number, say, sure } from "./dom.js";
import { t } from "./i18n.js";

const COLOURS = 6, EVERY = 1500; // ms between two looks, while something is trained
const KINDS = { training: "busy", finished: "good", stopped: "", failed: "bad", begun: "" };
let about, all = [], chosen = new Map(), pace = new Map(), cards = new Map(), curves = {}, timer = null, drawnAt = "";
let list, picture, legend, question, answers, what, smooth;

addEventListener("resize", () => picture?.clientWidth && draw());

export function build(root, facts) {
  about = facts; chosen = new Map(); cards = new Map(); drawnAt = "";
  list = h("div", { class: "cards runs" });
  picture = h("div", { class: "picture" });
  legend = h("div", { class: "row wrap legend" });
  what = h("select", { label: "what_curve", on: { change: draw } }, h("option", { value: "loss", t: "curve_loss" }), h("option", { value: "tokens_per_second", t: "curve_speed" }));
  smooth = h("input", { type: "checkbox", on: { change: draw } });
  question = h("input", { type: "text", hint: "sample_hint", label: "sample_hint" });
  answers = h("div", { class: "columns" });
  root.append(list,
    h("article", { class: "card" }, h("div", { class: "row wrap" }, what, h("label", { class: "check" }, smooth, h("span", { t: "smooth" })), legend), picture),
    h("article", { class: "card" }, h("h2", { t: "sample_title" }), h("p", { class: "dim", t: "sample_help" }),
      h("form", { class: "row", on: { submit: (event) => event.preventDefault() } }, question, h("button", { type: "button", t: "ask", on: { click: action(sample) } })), answers));
}

export async function enter() { clearTimeout(timer); await look(); }
export function leave() { clearTimeout(timer); timer = null; }
export function spoken() { drawnAt = ""; all.forEach(fill); draw(); }

/** Show a run that another panel has just started. */
export function choose(name) { chosen.set(name, colour()); }

async function look() {
  try {
    all = await get("/studio/runs");
    if (!chosen.size && all.length) chosen.set(all[0].name, colour());
    update();
    curves = chosen.size ? await post("/studio/curves", { names: [...chosen.keys()].filter((name) => all.some((run) => run.name === name)) }) : {};
    draw();
  } catch (error) { say(error.message, true); }
  const busy = all.some((run) => run.state === "training");
  clearTimeout(timer);
  if (!document.getElementById("runs").hidden) timer = setTimeout(look, busy ? EVERY : 4 * EVERY);
}

function colour() {
  const taken = new Set(chosen.values());
  return Array.from({ length: COLOURS }, (_, at) => at + 1).find((each) => !taken.has(each)) ?? 1 + (chosen.size % COLOURS);
}

function update() {
  for (const [name, card] of cards) if (!all.some((run) => run.name === name)) { card.root.remove(); cards.delete(name); }
  if (!all.length) { list.replaceChildren(h("div", { class: "card empty" }, h("p", { t: "no_runs" }))); return; }
  list.querySelector(".empty")?.remove();
  for (const run of all) {
    measure(run);
    if (!cards.has(run.name)) { const card = { root: h("article", { class: "card run" }), told: "" }; cards.set(run.name, card); }
    const { root } = cards.get(run.name);
    if (list.children[all.indexOf(run)] !== root) list.insertBefore(root, list.children[all.indexOf(run)] ?? null);
    fill(run);
  }
}

/** Steps a second, from what was seen: the file of the log tells when its last line came. */
function measure(run) {
  const seen = pace.get(run.name) ?? [];
  if (run.changed && (!seen.length || seen.at(-1).step !== run.steps)) seen.push({ step: run.steps, at: run.changed });
  pace.set(run.name, seen.slice(-40));
}

function timeLeft(run) {
  const seen = pace.get(run.name) ?? [], first = seen[0], last = seen.at(-1);
  if (!run.planned_steps || seen.length < 2 || last.at <= first.at || last.step <= first.step) return null;
  const seconds = Math.max(0, ((run.planned_steps - last.step) * (last.at - first.at)) / (last.step - first.step) - (run.now - last.at));
  const minutes = Math.floor(seconds / 60);
  return minutes >= 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
}

function fill(run) {
  const card = cards.get(run.name);
  const told = JSON.stringify([run.state, run.steps, run.planned_steps, run.loss, run.eval_loss, run.checkpoint, run.error, chosen.get(run.name), document.documentElement.lang]);
  if (!card || card.told === told) return; // what has the focus stays
  card.told = told;
  const focus = document.activeElement?.dataset?.focus, had = card.root.contains(document.activeElement);
  const box = h("input", { type: "checkbox", checked: chosen.has(run.name), "aria-label": t("compare_named", { name: run.name }), "data-focus": "box", on: { change: () => { if (chosen.has(run.name)) chosen.delete(run.name); else chosen.set(run.name, colour()); card.told = ""; fill(run); look(); } } });
  const left = run.state === "training" ? timeLeft(run) : null;
  const rows = run.rows, dropped = Object.entries(rows?.dropped ?? {});
  card.root.replaceChildren(...[
    h("div", { class: "row wrap" }, h("label", { class: "check" }, box, h("span", { class: `swatch c${chosen.get(run.name) ?? 0}` }), h("strong", { class: "clip", textContent: run.name })), badge(`state_${run.state}`, KINDS[run.state])),
    run.planned_steps ? h("progress", { max: run.planned_steps, value: run.steps, label: "step" }) : null,
    h("div", { class: "row wrap dim facts" },
      run.planned_steps ? h("span", { t: "step_of", vars: { step: run.steps, all: run.planned_steps } }) : null,
      run.epoch !== null ? h("span", { t: "epoch_of", vars: { epoch: number(run.epoch, 1) } }) : null,
      run.tokens_per_second ? h("span", { t: "rate", vars: { rate: Math.round(run.tokens_per_second) } }) : null,
      run.state === "training" && run.planned_steps ? (left ? h("span", { t: "left", vars: { time: left } }) : h("span", { t: "estimating" })) : null,
      run.loss !== null ? h("span", {}, h("span", { t: "training_loss" }), ` ${number(run.loss)}`) : null,
      run.eval_loss !== null ? h("span", {}, h("span", { t: "held_out_loss" }), ` ${number(run.eval_loss)}`) : null),
    rows ? h("div", { class: "dim" }, h("span", { t: "rows_went", vars: { read: rows.read, kept: rows.kept } }), ...dropped.map(([why, n]) => h("span", { class: "bad" }, " · ", h("span", { t: "dropped_n", vars: { n, why } })))) : null,
    run.error ? h("pre", { class: "bad", textContent: run.error }) : null,
    h("div", { class: "row wrap" },
      run.state === "training" && run.can_go_on ? h("button", { class: "danger", t: "stop", "data-focus": "stop", on: { click: action(() => post("/studio/train/stop", { name: run.name }).then(look)) } }) : null,
      run.can_go_on && ["stopped", "failed", "begun"].includes(run.state) ? h("button", { t: "go_on", "data-focus": "stop", on: { click: action(() => post("/studio/train/resume", { name: run.name }).then(() => { pace.delete(run.name); return look(); })) } }) : null,
      run.state !== "training" ? h("button", { class: "quiet", t: "delete", "data-focus": "delete", on: { click: action(() => deleting(run)) } }) : null,
      run.can_go_on ? h("button", { class: "quiet", t: "log", "data-focus": "log", on: { click: action(() => showLog(run)) } }) : null)].filter(Boolean));
  if (had && focus) card.root.querySelector(`[data-focus="${focus}"]`)?.focus();
}

async function deleting(run) {
  if (!await sure("delete_run", { name: run.name }, "delete")) return;
  await post("/studio/runs/delete", { name: run.name });
  chosen.delete(run.name);
  await look();
}

async function showLog(run) {
  const { log } = await post("/studio/log", { kind: "train", name: run.name });
  const dialog = h("dialog", { label: "log" }, h("pre", { textContent: log || "–", tabIndex: 0 }), h("div", { class: "row end" }, h("button", { t: "close", on: { click: () => dialog.close() } })));
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
}

function draw() {
  const width = Math.max(280, picture.clientWidth);
  const told = JSON.stringify([curves, [...chosen], what.value, smooth.checked, width]);
  if (told === drawnAt || picture.contains(document.activeElement) || picture.matches(":hover")) return; // who reads is not disturbed
  drawnAt = told;
  const series = [];
  for (const [name, colour] of chosen) {
    const found = curves[name];
    if (!found) continue;
    const points = found[what.value] ?? [];
    series.push({ name: chosen.size > 1 ? name : t(what.value === "loss" ? "training_loss" : "curve_speed"), points: smooth.checked ? smoothed(points) : points, colour });
    if (what.value === "loss") series.push({ name: chosen.size > 1 ? `${name} (${t("held_out")})` : t("held_out_loss"), points: found.eval_loss, colour, dashed: true, dots: true });
  }
  picture.replaceChildren(chart(series, { x: t("step"), empty: t("no_points") }, width));
  legend.replaceChildren(...series.filter((each) => each.points.length).map((each) => h("span", { class: "row tight" }, h("span", { class: `swatch c${each.colour}${each.dashed ? " dashed" : ""}` }), each.name)));
}

/** The chosen runs and the base answer the same question with the same seed. */
async function sample() {
  const names = [...chosen.keys()];
  const asked = await Promise.all(names.map((name) => post("/studio/sample", { name }).catch((error) => ({ problem: error.message }))));
  const own = question.value.trim();
  const questions = own ? [own] : (asked.find((each) => each.questions?.length)?.questions ?? []).slice(0, 2);
  if (!questions.length) { say(asked.find((each) => each.problem)?.problem ?? t("sample_hint"), true); return; }
  const who = [{ title: about.base, model: about.base }, ...asked.map((each, at) => ({ ...each, title: names[at] }))];
  answers.replaceChildren();
  await Promise.all(who.map(async (each) => {
    const root = h("article", { class: "card column" }, h("h3", { class: "clip" }, each.title, each.step ? h("span", { class: "dim" }, " ", h("span", { t: "at_step", vars: { step: each.step } })) : ""));
    answers.append(root);
    if (each.problem) { root.append(h("p", { class: "bad", textContent: each.problem })); return; }
    for (const text of questions) {
      const said = h("div", { class: "text" });
      root.append(h("div", { class: "turn user" }, h("div", { class: "text", textContent: text })), h("div", { class: "turn model" }, said));
      try {
        for await (const chunk of chat({ model: each.model, messages: [{ role: "user", content: text }], temperature: 0, max_tokens: 100 })) said.textContent += chunk.choices[0]?.delta?.content ?? "";
      } catch (error) { said.append(h("p", { class: "bad", role: "alert", textContent: error.message })); }
    }
  }));
}
