// Two pictures of one layer on canvases: which expert each slot holds, and which experts are chosen together.

const CELL = 26;
const LABEL = 150;
const LEAST_CELL = 5;
const WIDEST = 620;

function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.ceil(width * ratio);
  canvas.height = Math.ceil(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  return { context, heat: (share) => `rgb(${colour("--heat")} / ${Math.round(100 * share)}%)`, colour };
}

function pointed(canvas, describe, hint) {
  canvas.onmousemove = (event) => {
    const box = canvas.getBoundingClientRect();
    hint.textContent = describe(event.clientX - box.left, event.clientY - box.top) || "\u00a0";
  };
  canvas.onmouseleave = () => {
    hint.textContent = "\u00a0";
  };
}

// servers: names by rank; slots: expert by global slot, -1 = empty; load: by expert.
export function drawPlacement(canvas, hint, servers, slots, load) {
  const perRank = slots.length / servers.length;
  const replicas = new Map();
  for (const expert of slots) replicas.set(expert, (replicas.get(expert) ?? 0) + 1);
  const share = (expert) => (load[expert] ?? 0) / replicas.get(expert);
  const most = Math.max(...slots.filter((expert) => expert >= 0).map(share), 1e-9);
  const { context, heat, colour } = prepare(canvas, LABEL + perRank * CELL, servers.length * CELL);
  servers.forEach((server, rank) => {
    const y = rank * CELL;
    context.textAlign = "left";
    context.fillStyle = colour("--ink");
    context.fillText(server, 0, y + CELL / 2, LABEL - 8);
    for (let place = 0; place < perRank; place++) {
      const expert = slots[rank * perRank + place];
      const x = LABEL + place * CELL;
      context.strokeStyle = colour("--line");
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, CELL - 2, CELL - 2);
      if (expert < 0) continue;
      const value = share(expert) / most;
      context.fillStyle = heat(value);
      context.fillRect(x, y, CELL - 1, CELL - 1);
      if (replicas.get(expert) > 1) {
        context.strokeStyle = colour("--warn");
        context.lineWidth = 2;
        context.strokeRect(x + 2, y + 2, CELL - 5, CELL - 5);
      }
      context.textAlign = "center";
      context.fillStyle = value > 0.6 ? colour("--card") : colour("--ink");
      context.fillText(String(expert), x + CELL / 2 - 0.5, y + CELL / 2);
    }
  });
  pointed(canvas, (x, y) => {
    const [rank, place] = [Math.floor(y / CELL), Math.floor((x - LABEL) / CELL)];
    if (!servers[rank] || place < 0 || place >= perRank) return "";
    const slot = rank * perRank + place;
    const expert = slots[slot];
    const what = expert < 0 ? "empty" : `expert ${expert}, ${replicas.get(expert)} replica(s), load ${share(expert).toFixed(0)}`;
    return `${servers[rank]}, slot ${slot}: ${what}`;
  }, hint);
}

// pairs: tokens that chose both of i < j, by rows; load: tokens by expert; order: experts; parts: where a rank begins.
export function drawCoactivation(canvas, hint, { experts, tokens, pairs, load, order, parts }) {
  const cell = Math.max(LEAST_CELL, Math.min(16, Math.floor(WIDEST / experts)));
  const { context, heat, colour } = prepare(canvas, experts * cell + 1, experts * cell + 1);
  const index = (a, b) => {
    const [i, j] = a < b ? [a, b] : [b, a];
    return i * experts - (i * (i + 1)) / 2 + (j - i - 1);
  };
  // Observed over expected: 1 = chance, shown from there to four times chance.
  const lift = (a, b) => {
    const expected = (load[a] * load[b]) / Math.max(tokens, 1);
    return expected > 0 ? (pairs[index(a, b)] ?? 0) / expected : 0;
  };
  order.forEach((a, row) => {
    order.forEach((b, column) => {
      if (a === b) return;
      context.fillStyle = heat(Math.min(Math.max((lift(a, b) - 1) / 3, 0), 1));
      context.fillRect(column * cell, row * cell, cell, cell);
    });
  });
  context.strokeStyle = colour("--quiet");
  context.lineWidth = 1;
  for (const at of [...parts, experts]) {
    context.beginPath();
    context.moveTo(at * cell + 0.5, 0);
    context.lineTo(at * cell + 0.5, experts * cell);
    context.moveTo(0, at * cell + 0.5);
    context.lineTo(experts * cell, at * cell + 0.5);
    context.stroke();
  }
  pointed(canvas, (x, y) => {
    const [a, b] = [order[Math.floor(y / cell)], order[Math.floor(x / cell)]];
    if (a === undefined || b === undefined || a === b) return "";
    return `experts ${a} and ${b}: ${(pairs[index(a, b)] ?? 0).toFixed(0)} tokens, ${lift(a, b).toFixed(2)} × chance`;
  }, hint);
}
