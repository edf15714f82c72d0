// Requests to the server this page is from. The key stays in this tab (sessionStorage) and goes nowhere else.
import { inChinese } from "./errors.js";
import { language } from "./i18n.js";

const KEY = "qgraft-key";
let asking = null; // the dialog that is open

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));
export function setKey(key) { if (key) sessionStorage.setItem(KEY, key); else sessionStorage.removeItem(KEY); }

/** A key in the address (`qgraft ui` prints such a one) is taken, and taken out of the address and the history. */
export function takeKeyFromAddress() {
  const match = /^#key=(.+)$/.exec(location.hash);
  if (match) { setKey(decodeURIComponent(match[1])); history.replaceState(null, "", location.pathname); }
}

/** Ask for a key; whether one was given. */
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog"), input = document.getElementById("key-input");
    const form = document.getElementById("key-form"), cancel = document.getElementById("key-cancel");
    let given = false;
    const submit = (event) => { event.preventDefault(); given = Boolean(input.value.trim()); setKey(input.value.trim()); dialog.close(); };
    const leave = () => dialog.close();
    form.addEventListener("submit", submit);
    cancel.addEventListener("click", leave);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      cancel.removeEventListener("click", leave);
      input.value = "";
      asking = null;
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function send(path, options) {
  let response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401 && await askForKey()) response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (!response.ok) throw await problem(response);
  return response;
}

const inWords = (message) => (language() === "zh" ? inChinese(message) : message);

async function problem(response) {
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message || message; } catch { /* a proxy's page: the status says it */ }
  const error = new Error(inWords(message));
  error.status = response.status;
  return error;
}

export async function get(path) { return (await send(path, { method: "GET" })).json(); }

export async function post(path, body, signal) {
  const response = await send(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });
  return (response.headers.get("content-type") || "").includes("json") ? response.json() : response.text();
}

export async function put(path, content) {
  return (await send(path, { method: "PUT", body: content, headers: { "Content-Type": "application/octet-stream" } })).json();
}

/** The events of a chat completion, as they come. */
export async function* chat(body, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    const lines = pending.split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") continue; // the end of the stream follows
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(inWords(event.error.message));
      yield event;
    }
  }
}
