// Layer x expert: colour by the bits in memory. What comes in (a miss) and what leaves flashes; a dot is a hit.

const FLASH_MS = 900;
const $ = (id) => document.getElementById(id);

const state = { levels: [], uses: [], changed: [], hit: [], all: [], cursor: null };

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The colour of a level: deeper with more bits, spread over the levels that occur. */
function shade(bits) {
  if (!bits) return "absent";
  const place = state.all.indexOf(bits);
  return String(state.all.length === 1 ? 4 : 1 + Math.round((place * 4) / (state.all.length - 1)));
}

export function showExperts(levels, uses) {
  const now = performance.now();
  const before = state.levels;
  state.all = [...new Set([...state.all, ...levels.flat()])].filter((bits) => bits > 0).sort((a, b) => a - b);
  state.changed = levels.map((row, layer) =>
    row.map((bits, expert) => {
      const last = before[layer]?.[expert];
      if (last !== undefined && last !== bits) return { at: now, up: bits > last };
      return state.changed[layer]?.[expert];
    }),
  );
  state.hit = levels.map((row, layer) =>
    row.map((bits, expert) => {
      const last = state.uses[layer]?.[expert];
      const used = last !== undefined && uses[layer][expert] > last;
      return used && bits && before[layer]?.[expert] ? now : state.hit[layer]?.[expert];
    }),
  );
  state.levels = levels;
  state.uses = uses;
  const cells = levels.flat();
  const held = cells.filter((bits) => bits > 0).length;
  $("resident").textContent = `${held} of ${cells.length} are in memory.`;
  $("map").setAttribute("aria-label", `Heat map: ${held} of ${cells.length} experts are in memory`);
  legend();
  requestAnimationFrame(draw);
}

function legend() {
  const names = [["absent", "not in memory"], ...state.all.map((bits) => [shade(bits), `${bits} bits`])];
  names.push(["hit", "hit"], ["in", "came in: missed or read ahead"], ["out", "left"]);
  const text = JSON.stringify(names);
  if ($("legend").dataset.shown === text) return;
  $("legend").dataset.shown = text;
  $("legend").replaceChildren(
    ...names.map(([kind, name]) => {
      const item = document.createElement("li");
      item.className = `c-${kind}`;
      item.textContent = name;
      return item;
    }),
  );
}

function geometry() {
  const canvas = $("map");
  const rows = state.levels.length || 1;
  const columns = state.levels[0]?.length || 1;
  const cell = Math.max(2, Math.min(22, canvas.clientWidth / columns));
  const height = Math.max(4, Math.min(22, Math.max(cell, Math.min(12, 320 / rows))));
  return { canvas, rows, columns, cell, height };
}

function draw(now = performance.now()) {
  const { canvas, rows, columns, cell, height } = geometry();
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${rows * height}px`;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(rows * height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const shades = { absent: colour("--absent"), in: colour("--flash-in"), out: colour("--flash-out") };
  shades.hit = colour("--hit");
  for (let one = 1; one <= 5; one++) shades[one] = colour(`--l${one}`);
  const gap = cell > 5 ? 1 : 0;
  let flashing = false;
  for (let layer = 0; layer < rows; layer++) {
    for (let expert = 0; expert < columns; expert++) {
      context.fillStyle = shades[shade(state.levels[layer]?.[expert])];
      context.fillRect(expert * cell, layer * height, cell - gap, height - gap);
      const change = state.changed[layer]?.[expert];
      const left = change ? 1 - (now - change.at) / FLASH_MS : 0;
      if (left > 0) {
        flashing = true;
        context.globalAlpha = Math.min(1, left);
        context.fillStyle = change.up ? shades.in : shades.out;
        context.fillRect(expert * cell, layer * height, cell - gap, height - gap);
        context.globalAlpha = 1;
      }
      const hit = 1 - (now - (state.hit[layer]?.[expert] ?? -Infinity)) / FLASH_MS;
      if (hit > 0) {
        flashing = true;
        context.globalAlpha = Math.min(1, hit);
        context.fillStyle = shades.hit;
        context.fillRect((expert + 0.3) * cell, (layer + 0.3) * height, 0.4 * cell - gap, 0.4 * height - gap);
        context.globalAlpha = 1;
      }
    }
  }
  if (state.cursor) {
    context.strokeStyle = colour("--ink");
    context.lineWidth = 2;
    context.strokeRect(state.cursor.expert * cell, state.cursor.layer * height, cell - gap, height - gap);
  }
  if (flashing && !matchMedia("(prefers-reduced-motion: reduce)").matches) requestAnimationFrame(draw);
}

function tell(layer, expert) {
  const bits = state.levels[layer]?.[expert];
  if (bits === undefined) return;
  state.cursor = { layer, expert };
  $("cell").textContent = `Layer ${layer}, expert ${expert}: ${bits ? `${bits} bits in memory` : "not in memory"}, ${state.uses[layer][expert]} tokens`;
  requestAnimationFrame(draw);
}

export function startMap() {
  const canvas = $("map");
  canvas.addEventListener("mousemove", (event) => {
    const { cell, height } = geometry();
    tell(Math.floor(event.offsetY / height), Math.floor(event.offsetX / cell));
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const from = state.cursor ?? { layer: 0, expert: 0 };
    tell(from.layer + step[0], from.expert + step[1]);
  });
  window.addEventListener("resize", () => requestAnimationFrame(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => requestAnimationFrame(draw));
}
