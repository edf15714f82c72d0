// Merge: adapters into the packed weights of the base; what was kept; the file.
import { get, post } from "./api.js";
import { bars } from "./chart.js";
import { action, bytes, field, h, number, say } from "./dom.js";
import { t } from "./i18n.js";

const EVERY = 2000;
let about, picks, results, output, method, least, timer = null, weights = new Map(), last = "";

export function build(root, facts) {
  about = facts; weights = new Map(); last = "";
  picks = h("div", { class: "picks" });
  results = h("div", { class: "cards" });
  output = h("input", { type: "text", pattern: "[A-Za-z0-9_\\-]{1,64}", autocomplete: "off" });
  method = h("select", {}, about.methods.map((each) => h("option", { value: each, textContent: each })));
  least = h("input", { type: "number", value: "90", max: "100", step: "any" });
  root.append(
    h("article", { class: "card" }, h("h2", { t: "merge_title" }), h("p", { class: "dim", t: "merge_help" }), picks,
      h("div", { class: "fields" }, field("output_name", output), field("method", method), field("min_retained", least)),
      h("button", { t: "start_merge", id: "start-merge", on: { click: action(start) } })),
    h("h2", { t: "merges" }), results);
}

export async function enter() {
  try {
    const runs = (await get("/studio/runs")).filter((run) => run.has_adapter);
    picks.replaceChildren(...(runs.length ? runs.map(pick) : [h("p", { class: "dim", t: "no_mergeable" })]));
  } catch (error) { say(error.message, true); }
  await look();
}

export function leave() { clearTimeout(timer); timer = null; }
export function spoken() { last = ""; enter(); }

function pick(run) {
  const weight = h("input", { type: "number", step: "0.05", value: String(weights.get(run.name) ?? 1), "aria-label": t("weight_of", { name: run.name }), disabled: !weights.has(run.name), on: { change: (event) => weights.set(run.name, Number(event.target.value)) } });
  const box = h("input", { type: "checkbox", checked: weights.has(run.name), on: { change: () => {
    if (box.checked) weights.set(run.name, Number(weight.value)); else weights.delete(run.name);
    weight.disabled = !box.checked;
    output.value = [...weights.keys()].join("-").replace(/[^A-Za-z0-9_-]+/g, "-").slice(0, 60);
  } } });
  return h("div", { class: "row pick" }, h("label", { class: "check grow" }, box, h("span", { class: "clip", textContent: run.name })), run.eval_loss !== null ? h("small", { class: "dim", textContent: number(run.eval_loss) }) : null, weight);
}

async function start() {
  const adapters = [...weights].map(([run, weight]) => ({ run, weight }));
  await post("/studio/merge", { name: output.value.trim(), adapters, method: method.value, min_retained: Number(least.value) / 100 });
  await look();
}

async function look() {
  clearTimeout(timer);
  let found = { files: [], jobs: [] };
  try { found = await get("/studio/merges"); } catch (error) { say(error.message, true); }
  const told = JSON.stringify([found, document.documentElement.lang]);
  if (told !== last) {
    last = told;
    const cards = [...found.jobs.map(job), ...found.files.map(file)];
    results.replaceChildren(...(cards.length ? cards : [h("div", { class: "card empty" }, h("p", { t: "no_merges" }))]));
  }
  if (!document.getElementById("merge").hidden) timer = setTimeout(look, found.jobs.some((each) => each.running) ? EVERY : 4 * EVERY);
}

function job(each) {
  return h("article", { class: "card" }, h("h3", { class: "clip", textContent: `${each.name}.gguf` }),
    each.running ? h("p", {}, h("progress", { label: "merging" }), " ", h("span", { t: "merging" })) : each.stopped ? h("p", { t: "stopped" }) : null,
    each.error ? h("pre", { class: "bad", textContent: each.error }) : each.running && each.log ? h("pre", { class: "dim", textContent: each.log.trim().split("\n").slice(-3).join("\n") }) : null,
    each.running ? h("button", { class: "danger", t: "stop", on: { click: action(() => post("/studio/merge/stop", { name: each.name }).then(look)) } }) : null);
}

function file(each) {
  const kept = each.kept, mixed = Object.entries(each.adapters ?? {}).map(([name, weight]) => (weight === 1 ? name : `${name} × ${weight}`)).join(" + ");
  const values = kept && { base: kept.base, adapter: kept.adapter, merged: kept.merged };
  const label = values && t("loss_bars", Object.fromEntries(Object.entries(values).map(([key, value]) => [key, number(value)])));
  return h("article", { class: "card" }, h("h3", { class: "clip", textContent: each.name }), mixed ? h("p", { class: "dim", textContent: mixed }) : null,
    each.retained_gain !== null && each.retained_gain !== undefined ? h("p", { class: "big", t: "kept_share", vars: { share: (100 * each.retained_gain).toFixed(1) } }) : h("p", { class: "dim", t: "not_measured" }),
    values ? bars([{ name: t("loss_base"), value: values.base, colour: 3 }, { name: t("loss_adapter"), value: values.adapter, colour: 1 }, { name: t("loss_merged"), value: values.merged, colour: 2 }], label) : null,
    kept ? h("p", { class: "dim", t: "same_token", vars: { share: (100 * kept.same_token).toFixed(1), drift: number(kept.drift_kl, 4) } }) : null,
    each.warning ? h("p", { class: "bad", textContent: each.warning }) : null,
    each.seconds !== undefined ? h("p", { class: "dim", t: "took", vars: { seconds: each.seconds.toFixed(0), method: each.method } }) : null,
    h("button", { t: "download", vars: { size: bytes(each.bytes) }, on: { click: action(async () => {
      const { path } = await post("/studio/downloads", { name: each.name });
      const link = h("a", { href: path, download: each.name });
      document.body.append(link); link.click(); link.remove();
    }) } }));
}
