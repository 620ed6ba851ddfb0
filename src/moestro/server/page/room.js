// The machine room: asks /stats twice a second while the page is seen, and shows differences as rates.

import { get, Refused } from "./api.js";
import { showExperts, startMap } from "./heatmap.js";

const PERIOD_MS = 500;
const KEPT = 120;
const $ = (id) => document.getElementById(id);
const points = [];
let last = null;
let askForKey = () => {};

const USES = [
  ["experts", "experts", "arena_bytes"],
  ["dense", "dense weights", "dense_bytes"],
  ["cache", "KV cache", "kv_bytes"],
  ["activations", "activations", "activation_bytes"],
  ["staging", "staging", "staging_bytes"],
];

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (count >= 1024 && place < units.length - 1) {
    count /= 1024;
    place += 1;
  }
  return `${place ? count.toPrecision(3) : Math.round(count)} ${units[place]}`;
}

function status(text, bad = false) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function show(now, at) {
  const { stats, requests, tokens } = now;
  $("model").textContent = now.model;
  $("running").textContent = requests.running;
  $("waiting").textContent = requests.waiting;
  $("kv").textContent = `${now.kv_blocks.used} of ${now.kv_blocks.all}`;
  status(requests.running ? "answering" : "ready");
  if (last) rates(now, last.now, (at - last.at) / 1000);
  last = { now, at };
  showExperts(now.levels, now.uses);
  showSplit(stats);
}

function rates(now, before, seconds) {
  const rate = (value) => Math.max(0, value(now) - value(before)) / seconds;
  const point = {
    tokens: rate((one) => one.tokens.generated),
    demand: rate((one) => one.stats.bytes_read - one.stats.prefetched_bytes),
    ahead: rate((one) => one.stats.prefetched_bytes),
  };
  points.push(point);
  if (points.length > KEPT) points.shift();
  const hits = rate((one) => one.stats.hits);
  const misses = rate((one) => one.stats.misses);
  $("speed").textContent = point.tokens.toFixed(1);
  if (hits + misses > 0) $("hits").textContent = `${((100 * hits) / (hits + misses)).toFixed(1)}%`;
  $("demand").textContent = `${bytes(point.demand)}/s`;
  $("ahead").textContent = `${bytes(point.ahead)}/s`;
  $("stall").textContent = `${Math.min(100, 100 * rate((one) => one.stats.stall_s)).toFixed(0)}%`;
  drawHistory();
}

function showSplit(stats) {
  const text = USES.map(([, , key]) => stats[key]).join();
  if ($("split").dataset.shown === text) return;
  $("split").dataset.shown = text;
  $("given").textContent = `${bytes(stats.memory_bytes)} given`;
  const told = USES.map(([, name, key]) => `${name} ${bytes(stats[key])}`);
  $("split").setAttribute("aria-label", `Memory: ${told.join(", ")}`);
  $("split").replaceChildren(
    ...USES.map(([kind, name, key]) => {
      const part = document.createElement("div");
      part.className = `c-${kind}`;
      part.style.flexGrow = stats[key];
      part.title = `${name} ${bytes(stats[key])}`;
      return part;
    }),
  );
  $("split-legend").replaceChildren(
    ...USES.map(([kind, , ], place) => {
      const item = document.createElement("li");
      item.className = `c-${kind}`;
      item.textContent = told[place];
      return item;
    }),
  );
}

function drawHistory() {
  const canvas = $("history");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const most = Math.max(1, ...points.map((one) => one.demand + one.ahead));
  const fastest = Math.max(1, ...points.map((one) => one.tokens));
  const step = width / KEPT;
  points.forEach((one, place) => {
    const x = width - (points.length - place) * step;
    const low = (one.demand / most) * (height - 4);
    const high = (one.ahead / most) * (height - 4);
    context.fillStyle = style.getPropertyValue("--experts");
    context.fillRect(x, height - low, Math.max(1, step - 0.5), low);
    context.fillStyle = style.getPropertyValue("--cache");
    context.fillRect(x, height - low - high, Math.max(1, step - 0.5), high);
  });
  context.strokeStyle = style.getPropertyValue("--activations");
  context.lineWidth = 1.5;
  context.beginPath();
  points.forEach((one, place) => {
    const x = width - (points.length - place - 0.5) * step;
    context.lineTo(x, height - 2 - (one.tokens / fastest) * (height - 6));
  });
  context.stroke();
  const names = [
    ["experts", `on demand, most ${bytes(most)}/s`],
    ["cache", "ahead"],
    ["activations", `tokens, most ${fastest.toFixed(1)}/s`],
  ];
  $("history-legend").replaceChildren(
    ...names.map(([kind, name]) => {
      const item = document.createElement("li");
      item.className = `c-${kind}`;
      item.textContent = name;
      return item;
    }),
  );
}

async function ask() {
  try {
    show(await get("/stats"), performance.now());
  } catch (error) {
    last = null;
    if (error instanceof Refused && error.status === 401) askForKey();
    else if (error instanceof Refused && error.status === 503) status("the model is not ready yet");
    else status(error instanceof Refused ? error.message : "the server is not there", true);
  }
}

export function startRoom(onKey) {
  askForKey = onKey;
  startMap();
  const loop = async () => {
    if (!document.hidden && !$("key-dialog").open) await ask();
    setTimeout(loop, PERIOD_MS);
  };
  loop();
}
