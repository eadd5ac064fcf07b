// Asks the balancer once a second and shows what it says. Text goes into text nodes only.

import { Refused, ask, keep } from "./api.js";
import { drawCoactivation, drawPlacement } from "./heat.js";

const LOOK_MS = 1000;
const EVENTS_SHOWN = 200;
const find = (id) => document.getElementById(id);
const known = { layer: null, lastEvent: 0, drawn: "" };

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function fill(parent, children) {
  parent.replaceChildren(...children);
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", String(cell)))));
  return made;
}

const plain = (name, prefix) => name.replace(prefix, "").toLowerCase();
const balanced = (value) => (value >= 0.95 ? "good" : value >= 0.8 ? "warn" : "bad");

function showStatus(status) {
  const state = find("state");
  state.textContent = status.serving ? "serving" : `not serving: ${status.reason}`;
  state.className = `pill ${status.serving ? "good" : "bad"}`;
  const facts = {
    mesh: status.mesh_id,
    view: status.view_number,
    mode: status.balancer_mode,
    slots: status.num_slots,
    up: `${Math.round(status.uptime_s)} s`,
  };
  fill(find("facts"), Object.entries(facts).map(([name, value]) => {
    const made = document.createElement("div");
    made.append(element("dt", name), element("dd", String(value)));
    return made;
  }));
  fill(find("servers").tBodies[0], status.servers.map((server) => row(
    server.server_id,
    plain(server.role, "ROLE_"),
    element("td", plain(server.state, "SERVER_STATE_"), { class: plain(server.state, "SERVER_STATE_") === "serving" ? "good" : "warn" }),
    server.rank ?? "–",
    server.node,
    server.address,
    server.num_slots || "–",
    `${server.last_heartbeat_s.toFixed(1)} s ago`,
  )));
}

function showMigrations(status) {
  find("migration-counts").textContent =
    `${status.migrations_committed} committed and ${status.migrations_aborted} given up since the balancer started`;
  fill(find("migrations"), status.migrations.map((migration) => {
    const line = element("li", `layer ${migration.layer} → version ${migration.version}, ${migration.phase}, `
      + `${migration.slots_loaded} slots, ${migration.phase_s.toFixed(1)} s `);
    line.append(element("progress", "", { max: Math.max(migration.num_ranks, 1), value: migration.ranks_done }));
    return line;
  }));
}

function showLayers(loads, placement) {
  const versions = new Map(placement.layers.map((layer) => [layer.layer, layer.version]));
  fill(find("layers").tBodies[0], loads.layers.map((layer) => {
    const choose = element("button", String(layer.layer), { type: "button" });
    const first = document.createElement("td");
    first.append(choose);
    const bars = element("div", "", { class: "bars" });
    const most = Math.max(...layer.rank_load, 1e-9);
    bars.append(...layer.rank_load.map((load, rank) => {
      const bar = element("i", "", { title: `${loads.expert_servers[rank]}: ${load.toFixed(0)}` });
      bar.style.height = `${Math.max(4, (100 * load) / most)}%`;
      return bar;
    }));
    const last = document.createElement("td");
    last.append(bars);
    const made = row(
      first,
      versions.get(layer.layer) ?? "–",
      element("td", layer.balancedness.toFixed(3), { class: layer.tokens ? balanced(layer.balancedness) : "quiet" }),
      layer.fanout_ranks ? layer.fanout_ranks.toFixed(2) : "–",
      last,
    );
    made.setAttribute("aria-selected", String(layer.layer === known.layer));
    made.onclick = () => {
      known.layer = layer.layer;
      look();
    };
    return made;
  }));
}

// The experts in the order of the slots that first hold them, and where each rank's begin.
function inOrder(placed, experts, ranks) {
  const perRank = placed.slots.length / ranks;
  const seen = new Set();
  const parts = [];
  for (let slot = 0; slot < placed.slots.length; slot++) {
    if (slot % perRank === 0) parts.push(seen.size);
    if (placed.slots[slot] >= 0) seen.add(placed.slots[slot]);
  }
  for (let expert = 0; expert < experts; expert++) seen.add(expert);
  return { order: [...seen], parts };
}

async function showLayer(loads, placement) {
  const placed = placement.layers.find((layer) => layer.layer === known.layer);
  const layer = loads.layers.find((each) => each.layer === known.layer);
  for (const name of document.querySelectorAll(".chosen-layer")) name.textContent = String(known.layer ?? "–");
  if (!placed || !layer) return;
  const drawn = JSON.stringify([placed, layer.load, loads.expert_servers]);
  if (drawn === known.drawn) return;
  known.drawn = drawn;
  drawPlacement(find("placement"), find("placement-hint"), loads.expert_servers, placed.slots, layer.load);
  const counted = await ask(`coactivation/${known.layer}`);
  drawCoactivation(find("coactivation"), find("coactivation-hint"), {
    experts: counted.num_experts,
    tokens: counted.tokens,
    pairs: counted.pairs,
    load: layer.load,
    ...inOrder(placed, counted.num_experts, loads.expert_servers.length),
  });
}

function showEvents(events) {
  const list = find("events");
  for (const event of events) {
    const when = new Date(1000 * event.unix_s);
    const line = element("li");
    line.append(element("time", when.toLocaleTimeString(), { datetime: when.toISOString() }));
    line.append(` ${event.kind} ${event.subject}: ${event.message}`);
    list.prepend(line);
    known.lastEvent = Math.max(known.lastEvent, Number(event.number));
  }
  while (list.childElementCount > EVENTS_SHOWN) list.lastChild.remove();
}

async function look() {
  const [status, loads, placement, events] = await Promise.all(
    ["status", "loads", "placement", `events?after=${known.lastEvent}`].map(ask),
  );
  known.layer ??= loads.layers[0]?.layer ?? null;
  showStatus(status);
  showMigrations(status);
  showLayers(loads, placement);
  showEvents(events);
  await showLayer(loads, placement);
}

async function keepLooking() {
  const trouble = find("trouble");
  try {
    await look();
    trouble.hidden = true;
    find("door").hidden = true;
  } catch (error) {
    find("state").textContent = "unknown";
    find("state").className = "pill bad";
    trouble.textContent = `The balancer did not answer: ${error.message}`;
    trouble.hidden = false;
    if (error instanceof Refused) find("door").hidden = false;
  }
  setTimeout(keepLooking, LOOK_MS);
}

find("door").onsubmit = (event) => {
  event.preventDefault();
  keep(find("key").value);
  find("key").value = "";
};

keepLooking();
