// The text of the page: header, large numbers, legend of modes, tables.

class Tiles {
  constructor(place) {
    this.tiles = {};
    for (const [name, title] of [["generated", "Generated"], ["prompt", "Prompts"], ["running", "Running"],
      ["first", "Time to first token"], ["inter", "Inter-token latency"], ["cache", "KV cache usage"]]) {
      const value = element("p", { className: "value" });
      const note = element("p", { className: "note" });
      const card = element("div", { className: "tile" }, element("h3", { textContent: title }), value);
      if (name === "cache") {
        this.meter = element("i");
        card.append(element("div", { className: "meter" }, this.meter));
      }
      card.append(note);
      place.append(card);
      this.tiles[name] = { value, note };
    }
  }

  set(name, value, unit, note) {
    const tile = this.tiles[name];
    tile.value.replaceChildren(value, ...(unit ? [element("small", { textContent: unit })] : []));
    tile.note.textContent = note;
  }

  show(data) {
    const { speed, state, totals } = data;
    const shown = data.window;
    this.set("generated", formats.rate(speed.generated), "tok/s", `${formats.count(totals.generated_tokens)} since start`);
    this.set("prompt", formats.rate(speed.prompt), "tok/s", `${formats.count(totals.prompt_tokens)} since start`);
    this.set("running", formats.count(state && state.running), "", `${formats.count(state && state.waiting)} waiting`);
    this.showLatency("first", shown.first_token);
    this.showLatency("inter", shown.inter_token);
    const usage = state ? state.kv_cache_usage : 0;
    const snapshots = state && state.snapshots;
    const states = snapshots ? ` · ${formats.count(snapshots.held)} of ${formats.count(snapshots.slots)} snapshots` : "";
    this.set("cache", formats.share(state && usage), "", `prefix hits ${formats.share(shown.prefix_hit_rate)}${states}`);
    this.meter.style.width = `${usage * 100}%`;
  }

  showLatency(name, { percentiles: [p50, p90, p99] }) {
    this.set(name, formats.duration(p50), p50 === null ? "" : "p50", `p90 ${formats.duration(p90)} · p99 ${formats.duration(p99)}`);
  }
}

function showLegend(data) {
  const times = data.window.modes.map(([, , seconds]) => seconds);
  const total = times.reduce((sum, seconds) => sum + seconds, 0);
  const entries = data.modes.map((mode, number) => {
    const share = total ? formats.share(times[number] / total) : missing;
    return element("span", { className: times[number] ? "" : "off" }, swatch(colors.ofMode(data.modes, number)),
      `${mode.name} `, element("b", { textContent: share }));
  });
  const switches = element("span", {}, "switches ", element("b", { textContent: formats.count(data.window.switches) }));
  byId("mode-legend").replaceChildren(...entries, switches);
}

function showStepsNote(store) {
  const step = store.steps.at(-1);
  const mode = step && store.data.modes[step[3]];
  byId("steps-note").textContent = step
    ? `last: step ${formats.count(step[0])}, ${marks[mode.kind]} ${mode.name}, ${formats.count(step[4])} tokens in ${formats.duration(step[2])}`
    : "no steps yet";
}

function showBars(place, rows, whole, empty) {
  const cells = rows.flatMap(({ name, size, color, count }) => {
    const inner = element("i");
    inner.style.width = `${whole ? (100 * size) / whole : 0}%`;
    inner.style.background = color;
    return [element("span", { textContent: name }), element("div", { className: "bar" }, inner),
      element("span", { className: "count" }, ...count)];
  });
  place.replaceChildren(...(cells.length ? cells : [element("p", { className: "empty", textContent: empty })]));
}

const outcomes = [["stop", "finished", "good"], ["length", "reached length limit", "three"], ["abort", "client disconnected", "faint"],
  ["error", "failed", "bad"]];

function showOutcomes({ window: shown, totals }) {
  const rows = outcomes.filter(([reason]) => totals.finished[reason]).map(([reason, name, color]) => {
    const size = shown.finished[reason] || 0;
    const count = [element("b", { textContent: formats.count(size) }), ` · ${formats.count(totals.finished[reason])}`];
    return { name, size, color: colors[color], count };
  });
  showBars(byId("outcomes"), rows, rows.reduce((sum, row) => sum + row.size, 0), "no finished requests yet");
}

function showTimes({ modes, window: shown }) {
  const whole = shown.modes.reduce((sum, [, , seconds]) => sum + seconds, 0);
  const ofModes = modes.flatMap((mode, number) => {
    const [steps, , seconds] = shown.modes[number];
    if (!steps) return [];
    const count = [element("b", { textContent: formats.share(seconds / whole) }), ` · ${formats.duration(seconds / steps)} per step`];
    return [{ name: mode.name, size: seconds, color: colors.ofMode(modes, number), count }];
  });
  const collectives = Object.entries(shown.collective_seconds).filter(([, seconds]) => seconds > 0)
    .sort(([, a], [, b]) => b - a).slice(0, 4).map(([name, seconds]) => ({
      name: name.replaceAll("_", " "), size: seconds, color: colors.faint,
      count: [element("b", { textContent: formats.share(whole ? seconds / whole : null) })],
    }));
  showBars(byId("times"), [...ofModes, ...collectives], whole, "no steps in this time range");
}

// The share of drafts whose first, second ... token was accepted; hidden without speculative decoding.
function showDrafts({ state, window: { drafts } }) {
  for (const name of ["chart-drafts", "drafts"]) byId(name).hidden = !(state && state.speculates);
  const whole = drafts.tokens ? drafts.accepted / drafts.tokens : null;
  byId("drafts-note").textContent = `${formats.share(whole)} of ${formats.count(drafts.tokens)} tokens`;
  const rows = drafts.per_position.map((share, place) => ({
    name: `token ${place + 1}`, size: share, color: colors.two, count: [element("b", { textContent: formats.share(share) })],
  }));
  showBars(byId("positions"), rows, 1, "nothing drafted in this time range");
}

function modeText(mode) {
  return Array.isArray(mode) ? modeNames([mode])[0] : String(mode);
}

function modeNames(modes) {
  return modes.map(([sp, tp]) => [[sp, "SP"], [tp, "TP"]].filter(([size]) => size > 1)
    .map(([size, kind]) => `${kind} ${size}`).join(" x ") || "1 rank");
}

function policyText(policy) {
  if (policy.name === "threshold") return `threshold · ${formats.count(policy.threshold_tokens)} tokens`;
  if (policy.name === "static") return `static · ${modeText(policy.mode)}`;
  return String(policy.name);
}

// The rules of a policy, as pairs of a condition and a mode, or of a setting and its value.
function rulesOf(policy) {
  if (policy.name === "static") return [["every step", policy.mode]];
  if (policy.name === "threshold") {
    const tokens = formats.count(policy.threshold_tokens);
    return [[`above ${tokens} tokens`, policy.base], [`up to ${tokens} tokens`, policy.shift]];
  }
  return Object.entries(policy).filter(([key]) => key !== "name").map(([key, value]) => [key.replaceAll("_", " "), value]);
}

function showPolicy({ modes, state: { policy } }) {
  byId("policy-chip").textContent = policyText(policy);
  byId("policy-name").textContent = policy.name;
  const pairs = rulesOf(policy).flatMap(([name, value]) => {
    const number = modes.findIndex((mode) => Array.isArray(value) && mode.sp === value[0] && mode.tp === value[1]);
    const mark = number < 0 ? [] : [swatch(colors.ofMode(modes, number))];
    return [element("dt", { textContent: name }), element("dd", {}, ...mark, modeText(value))];
  });
  byId("policy-settings").replaceChildren(...pairs);
}

const statusWords = { starting: "starting", ready: "ready", degraded: "degraded", draining: "draining", dead: "dead", lost: "connection lost",
  locked: "key required", connecting: "connecting" };

function deadReplicas(data) {
  return data.dead_replicas.map(({ replica, reason }) => `Replica ${replica}: ${reason}.`).join(" ");
}

function showStatus(status, data) {
  byId("status").dataset.status = status;
  const left = status === "draining" && data.drain_seconds !== null ? `, ${Math.ceil(data.drain_seconds)} s left` : "";
  byId("status-text").textContent = statusWords[status] + left;
  document.body.classList.toggle("stale", status === "lost" || status === "dead");
  document.body.classList.toggle("locked", status === "locked" && !data);
  const notices = {
    dead: ["The engine is dead. ", data && data.reason],
    degraded: ["Replicas are dead; the others serve. ", data && deadReplicas(data)],
    lost: ["The server does not respond. ", "The page shows the last received data and retries every second."],
    locked: ["This server requires a key. ", "Enter it in the field below to see the data."],
    draining: ["The server is shutting down. ", "It completes running requests and rejects new ones."],
  };
  const notice = notices[status];
  byId("notice").hidden = !notice;
  byId("notice").dataset.tone = ["degraded", "draining", "locked"].includes(status) ? "warn" : "bad";
  byId("notice").replaceChildren(...(notice ? [element("b", { textContent: notice[0] }), notice[1] || ""] : []));
}

function showHeader(data) {
  byId("model").textContent = data.model;
  document.title = `${data.model} · ulysses_infer`;
  byId("uptime").textContent = `up ${formats.long(data.uptime)}`;
  const engine = data.engine;
  if (!engine) return;
  const weights = engine.weight_bytes_per_rank.map(formats.bytes);
  const same = new Set(weights).size === 1;
  byId("footer").textContent = [
    `${engine.weight_bytes_per_rank.length} rank${weights.length > 1 ? "s" : ""}`,
    `weights ${same ? `${weights[0]} per rank` : weights.join(", ")}`,
    `KV cache ${formats.count(engine.num_blocks * engine.block_size)} tokens in ${formats.count(engine.num_blocks)} blocks`,
    `maximum request length ${formats.count(engine.max_model_len)} tokens`,
    `preemptions ${formats.count(data.totals.preemptions)}`,
  ].join(" · ");
}
