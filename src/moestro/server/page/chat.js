// The conversation. Texts are put in as text, never as HTML.

import { stream } from "./api.js";

const $ = (id) => document.getElementById(id);
let messages = [];
let running = null;

function add(kind, text) {
  $("empty").hidden = true;
  const item = document.createElement("p");
  item.className = kind;
  item.textContent = text;
  $("log").append(item);
  scroll();
  return item;
}

function scroll() {
  $("log").scrollTop = $("log").scrollHeight;
}

function asked() {
  const body = { max_tokens: Number($("max-tokens").value) || 256, stream_options: { include_usage: true } };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("quality").value) body.quality = $("quality").value;
  const system = $("system").value.trim();
  body.messages = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  return body;
}

function busy(isBusy) {
  $("send").disabled = isBusy;
  $("stop").disabled = !isBusy;
  $("log").setAttribute("aria-busy", isBusy);
}

async function send() {
  const question = $("question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  busy(true);
  $("question").value = "";
  messages.push({ role: "user", content: question });
  add("message user", question);
  const shown = add("message assistant", "");
  const start = performance.now();
  let first = 0;
  let tokens = 0;
  let reason = "";
  try {
    for await (const event of stream("/v1/chat/completions", asked(), running.signal)) {
      for (const choice of event.choices) {
        const text = choice.delta.content ?? "";
        if (text && !first) first = performance.now();
        shown.textContent += text;
        reason = choice.finish_reason ?? reason;
      }
      if (event.usage) tokens = event.usage.completion_tokens;
      scroll();
    }
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = first ? `, first after ${((first - start) / 1000).toFixed(2)} s` : "";
    add("note", `${tokens} tokens (${reason})${speed}${wait}`);
  } catch (error) {
    if (error.name === "AbortError") add("note", "stopped");
    else add("message error", error.message);
  }
  if (shown.textContent) messages.push({ role: "assistant", content: shown.textContent });
  else {
    messages.pop();
    shown.remove();
  }
  running = null;
  busy(false);
}

export function startChat() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("reset").addEventListener("click", () => {
    running?.abort();
    messages = [];
    for (const item of [...$("log").children]) if (item.id !== "empty") item.remove();
    $("empty").hidden = false;
    $("question").focus();
  });
}
