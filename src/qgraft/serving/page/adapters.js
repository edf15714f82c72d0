// Adapters: what each was trained on, its seal; loading, unloading, renaming, deleting.
import { get, post } from "./api.js";
import { talkTo } from "./chat.js";
import { action, badge, h, number, say, sure } from "./dom.js";

let place, about, show;
const SEALS = { whole: ["seal_whole", "good"], none: ["seal_none", ""], changed: ["seal_changed", "bad"], "other base": ["seal_other", "bad"] };

export function build(root, facts, showPanel) { place = root; about = facts; show = showPanel; }

export async function enter() {
  try {
    const all = await get("/studio/adapters");
    place.replaceChildren(all.length ? h("div", { class: "cards" }, all.map(card)) : h("div", { class: "card empty" }, h("p", { t: "no_adapters" })));
  } catch (error) { say(error.message, true); }
}

function card(each) {
  const [seal, kind] = SEALS[each.seal] ?? ["seal_none", ""];
  const usable = each.seal === "whole" || each.seal === "none";
  return h("article", { class: "card" },
    h("div", { class: "row wrap" }, h("h2", { class: "clip", textContent: each.name }), each.loaded ? badge("loaded", "good") : badge("on_demand"), each.pinned ? badge("pinned") : null, badge(seal, kind)),
    facts(each),
    h("div", { class: "row wrap" },
      usable ? h("button", { t: "talk", on: { click: () => { talkTo(each.name); show("chat"); } } }) : null,
      ...(about.admin && about.can_load && !each.pinned ? changes(each, usable) : [])));
}

function changes(each, usable) {
  const after = (run) => action(async () => { await run(); await enter(); });
  return [
    usable && !each.loaded ? h("button", { class: "quiet", t: "load", on: { click: after(() => post("/v1/load_lora_adapter", { lora_name: each.name, lora_path: each.path })) } }) : null,
    each.loaded ? h("button", { class: "quiet", t: "reload", on: { click: after(() => post("/v1/load_lora_adapter", { lora_name: each.name, lora_path: each.path, load_inplace: true })) } }) : null,
    each.loaded ? h("button", { class: "quiet", t: "unload", on: { click: after(() => post("/v1/unload_lora_adapter", { lora_name: each.name })) } }) : null,
    h("button", { class: "quiet", t: "rename", on: { click: (event) => renaming(each, event.currentTarget) } }),
    about.folder ? h("button", { class: "quiet", t: "delete", on: { click: after(() => deleting(each)) } }) : null,
  ];
}

async function deleting(each) {
  if (await sure("delete_adapter", { name: each.name }, "delete")) await post("/studio/adapters/delete", { name: each.name });
}

function renaming(each, button) {
  const input = h("input", { value: each.name, label: "new_name", pattern: "[A-Za-z0-9_\\-]{1,64}", required: true });
  const ready = async (event) => {
    event.preventDefault();
    try { await post("/studio/adapters/rename", { name: each.name, new_name: input.value.trim() }); await enter(); } catch (error) { say(error.message, true); }
  };
  button.replaceWith(h("form", { class: "row", on: { submit: ready } }, input, h("button", { t: "rename" }), h("button", { type: "button", class: "quiet", t: "cancel", on: { click: enter } })));
  input.select();
}

function facts(each) {
  const trained = each.trained ?? {}, metrics = each.metrics ?? {};
  const shape = [each.kind, each.r ? `r ${each.r}` : null, each.lora_alpha ? `alpha ${each.lora_alpha}` : null, each.prefix ? `${each.prefix}` : null, trained.exact ? "exact" : null].filter(Boolean).join(", ");
  const rows = [
    trained.dataset ? ["trained_on", h("dd", {}, trained.dataset.split("/").pop(), each.rows ? " · " : "", each.rows ? h("span", { t: "rows_n", vars: { n: each.rows } }) : "")] : null,
    ["shape", h("dd", { textContent: shape })],
    metrics.eval_loss !== undefined ? ["loss", h("dd", { t: "held_out_change", vars: { before: number(metrics.eval_loss_before), after: number(metrics.eval_loss) } })] : null,
    metrics.eval_loss === undefined && metrics.train_loss !== undefined ? ["training_loss", h("dd", { textContent: number(metrics.train_loss) })] : null,
    each.base ? ["base", h("dd", { textContent: `${each.base} (${(each.formats ?? []).join(", ")})` })] : null,
    trained.system ? ["system_said", h("dd", { textContent: trained.system })] : null,
    each.saved ? ["saved", h("dd", { textContent: new Date(each.saved).toLocaleString() })] : null,
    each.problem ? ["problem", h("dd", { class: "bad", textContent: each.problem })] : null,
  ].filter(Boolean);
  return h("dl", {}, rows.flatMap(([key, value]) => [h("dt", { t: key }), value]));
}
