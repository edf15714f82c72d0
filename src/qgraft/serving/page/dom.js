// Elements from JavaScript. Text of models, files and names gets into the page by textContent alone, never as HTML.
import { t } from "./i18n.js";

/** An element. props: `t` is a key of i18n.js (with `vars`), `label` one for aria-label, `on` listeners, the rest properties
    or attributes. Children that are null or false are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "t") setText(element, value, props.vars);
    else if (name === "vars") continue;
    else if (name === "label") { element.dataset.i18nLabel = value; element.setAttribute("aria-label", t(value)); }
    else if (name === "hint") { element.dataset.i18nHint = value; element.placeholder = t(value); }
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "style") Object.assign(element.style, value);
    else if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string" || name === "value" || name === "textContent") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Translated text, which follows a change of the language. */
export function setText(element, key, vars) {
  element.dataset.i18n = key;
  if (vars) element.dataset.i18nVars = JSON.stringify(vars);
  else delete element.dataset.i18nVars;
  element.textContent = t(key, vars);
}

/** Put everything below an element into the language of now. */
export function retranslate(root) {
  for (const each of root.querySelectorAll("[data-i18n]")) {
    each.textContent = t(each.dataset.i18n, each.dataset.i18nVars ? JSON.parse(each.dataset.i18nVars) : undefined);
  }
  for (const each of root.querySelectorAll("[data-i18n-label]")) each.setAttribute("aria-label", t(each.dataset.i18nLabel));
  for (const each of root.querySelectorAll("[data-i18n-hint]")) each.placeholder = t(each.dataset.i18nHint);
}

/** A line that is read out, and seen for a few seconds. */
export function say(text, bad = false) {
  const place = document.getElementById("said");
  const line = h("p", { class: bad ? "bad" : "" , textContent: text });
  place.replaceChildren(line);
  setTimeout(() => line.remove(), bad ? 12000 : 5000);
}

/** A field with its label. */
export function field(label, input, help) {
  return h("label", { class: "field" }, h("span", { t: label }), input, help ? h("small", { t: help, class: "dim" }) : null);
}

/** Ask before something is done that cannot be undone; whether it may be. */
export function sure(key, vars, button) {
  return new Promise((resolve) => {
    let yes = false;
    const dialog = h("dialog", { label: button }, h("p", { t: key, vars }), h("div", { class: "row end" },
      h("button", { class: "quiet", t: "cancel", on: { click: () => dialog.close() } }),
      h("button", { class: "danger", t: button, on: { click: () => { yes = true; dialog.close(); } } })));
    document.body.append(dialog);
    dialog.addEventListener("close", () => { dialog.remove(); resolve(yes); });
    dialog.showModal();
  });
}

/** Run what a button does: disabled meanwhile, errors said. */
export function action(run) {
  return async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try { await run(event); } catch (error) { say(error.message, true); } finally { button.disabled = false; }
  };
}

export function badge(key, kind = "", vars) { return h("span", { class: `badge ${kind}`, t: key, vars }); }

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let at = 0;
  while (count >= 1000 && at < 3) { count /= 1000; at += 1; }
  return `${at ? count.toFixed(1) : count} ${units[at]}`;
}

export function number(value, digits = 3) { return value === null || value === undefined ? "–" : value.toFixed(digits); }
