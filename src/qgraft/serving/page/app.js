// The page: which panel is seen, the language, the colours. Each panel is a file of its own.
import { askForKey, get, hasKey, setKey, takeKeyFromAddress } from "./api.js";
import { h, retranslate, say } from "./dom.js";
import { language, setLanguage } from "./i18n.js";
import * as adapters from "./adapters.js";
import * as chat from "./chat.js";
import * as merge from "./merge.js";
import * as runs from "./runs.js";
import * as train from "./train.js";

const panels = { chat, train, runs, adapters, merge };
const needAdmin = new Set(["train", "runs", "merge"]);
const built = new Set();
let about = null;
let current = null;

export function show(name) {
  if (current && current !== name) panels[current].leave?.();
  current = name;
  for (const each of Object.keys(panels)) {
    const tab = document.getElementById(`tab-${each}`);
    tab.setAttribute("aria-selected", each === name);
    tab.tabIndex = each === name ? 0 : -1;
    document.getElementById(each).hidden = each !== name;
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  const place = document.getElementById(name);
  const lacks = needAdmin.has(name) && (!about.admin || !about.folder);
  if (lacks) { place.replaceChildren(refusal()); built.delete(name); return; }
  if (!built.has(name)) { panels[name].build(place, about, show); built.add(name); }
  panels[name].enter?.();
}

function refusal() {
  const key = h("button", { t: "give_key", on: { click: () => askForKey().then((given) => given && start()) } });
  return h("div", { class: "card empty" }, h("p", { t: about.admin ? "no_folder" : "no_admin" }), about.admin ? null : key);
}

async function start() {
  try { about = await get("/studio/about"); } catch (error) {
    if (error.status === 401) { setKey(""); document.getElementById("base").textContent = ""; }
    say(error.message, true);
    const again = h("button", { t: "give_key", on: { click: () => askForKey().then(start) } });
    document.getElementById("chat").replaceChildren(h("div", { class: "card empty" }, h("p", { textContent: error.message }), again));
    document.getElementById("chat").hidden = false;
    return;
  }
  document.getElementById("base").textContent = about.base;
  built.clear();
  for (const each of Object.keys(panels)) document.getElementById(each).replaceChildren();
  const wanted = location.hash.slice(1);
  show(wanted in panels ? wanted : "chat");
}

function tabs() {
  const names = Object.keys(panels);
  for (const name of names) {
    const tab = document.getElementById(`tab-${name}`);
    tab.addEventListener("click", () => about && show(name));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !about) return;
      const next = names[(names.indexOf(name) + step + names.length) % names.length];
      show(next);
      document.getElementById(`tab-${next}`).focus();
    });
  }
}

function speak() {
  document.documentElement.lang = language();
  const button = document.getElementById("language");
  button.textContent = language() === "en" ? "中文" : "English";
  button.lang = language() === "en" ? "zh" : "en";
  retranslate(document);
  if (about && current) panels[current].spoken?.();
}

function colours() {
  const kept = localStorage.getItem("qgraft-theme");
  if (kept) document.documentElement.dataset.theme = kept;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    localStorage.setItem("qgraft-theme", document.documentElement.dataset.theme);
  });
}

takeKeyFromAddress();
colours();
tabs();
document.getElementById("language").addEventListener("click", () => { setLanguage(language() === "en" ? "zh" : "en"); speak(); });
document.getElementById("key").addEventListener("click", () => askForKey().then((given) => (given || !hasKey()) && start()));
addEventListener("hashchange", () => {
  const key = location.hash.startsWith("#key=");
  if (key) { takeKeyFromAddress(); start(); } else if (about && location.hash.slice(1) in panels) show(location.hash.slice(1));
});
speak();
start();
