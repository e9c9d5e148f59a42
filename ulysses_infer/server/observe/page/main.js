// Main loop: polls for new data once per second and redraws several times per second for smooth scrolling.

const pollSeconds = 1;
const delaySeconds = 1.2; // the right edge lags by this much, so that its data has arrived
const framesPerSecond = 24;
const smoothedPoints = 10; // a single second has too few prompts for a stable prefix cache hit rate

const view = { seconds: 120, start: 0, end: 0, hover: null };
const store = {
  data: null, heardAt: 0, status: "connecting", locked: false, steps: [], series: [],
  band: { width: 1, rows: new Map() }, points: { width: 1, columns: [], rows: new Map() },
};

function takeRows(kept, sent, oldest, isFirst) {
  if (isFirst || kept.width !== sent.width) kept.rows = new Map();
  kept.width = sent.width;
  for (const row of sent.rows) kept.rows.set(row[0], row);
  for (const index of kept.rows.keys()) {
    if ((index + 1) * sent.width >= oldest) break;
    kept.rows.delete(index);
  }
}

// Replicas number their steps alike.
const nameOf = ([sequence, started]) => `${sequence} ${started}`;

function take(data, isFirst) {
  const oldest = data.now - data.seconds - 2 * delaySeconds;
  store.data = data;
  store.heardAt = performance.now();
  takeRows(store.band, data.band, oldest, isFirst);
  takeRows(store.points, data.points, oldest, isFirst);
  store.points.columns = data.points.columns;
  const kept = isFirst ? [] : store.steps;
  const known = new Set(kept.map(nameOf));
  store.steps = [...kept, ...data.steps.filter((step) => !known.has(nameOf(step)))].slice(-1024);
  store.series = seriesOf(data);
}

// Fills gaps between points: counters are 0 where nothing was recorded, gauges keep their last value.
function seriesOf(data) {
  const { width, columns, rows } = store.points;
  const first = Math.ceil(Math.max(data.now - data.seconds - 2, data.now - data.uptime) / width) - 1;
  const series = [];
  let last = null;
  for (let index = first; (index + 1) * width <= data.now; index += 1) {
    const row = rows.get(index);
    const point = { time: (index + 0.5) * width };
    columns.forEach((name, number) => { point[name] = row ? row[number] : null; });
    if (!row) point.prompt = point.generated = 0;
    for (const gauge of ["running", "waiting", "kv_cache_usage"]) point[gauge] ??= last ? last[gauge] : 0;
    series.push(point);
    point.prefix_hit_rate = hitRate(series.slice(-smoothedPoints));
    last = point;
  }
  return series;
}

function hitRate(points) {
  const [queries, hits] = ["cache_queries", "cache_hits"].map((name) => points.reduce((sum, point) => sum + point[name], 0));
  return queries ? hits / queries : null;
}

const tiles = new Tiles(byId("tiles"));
const band = new Band(byId("band"), view);
const stepBars = new StepBars(byId("steps"));
const charts = makeCharts(view);
let restart = true;
let polling = null;
const admin = new Admin(store, () => poll());

function show(data) {
  showHeader(data);
  showLegend(data);
  showStepsNote(store);
  tiles.show(data);
  showOutcomes(data);
  showTimes(data);
  showDrafts(data);
  if (data.state) {
    showPolicy(data);
    admin.follow(data.state.policy);
  }
}

function setStatus(status) {
  store.status = status;
  const locked = status === "locked";
  if (locked !== store.locked) {
    store.locked = locked;
    admin.show(admin.opened);
    if (locked) byId("key").focus();
  }
  byId("key-label").textContent = locked ? "Key" : "Admin key (to change the policy)";
  showStatus(status, store.data);
}

async function fetchData() {
  const seconds = view.seconds;
  const isFirst = restart;
  const since = isFirst || !store.data ? "" : `&since=${store.data.now}`;
  const answer = await ask(`dashboard/data?seconds=${seconds}${since}`, { key: keys.get("data") || keys.get("admin") });
  if (answer.status === 401 || answer.status === 403) return setStatus("locked");
  if (!answer.ok) throw new TypeError(answer.error);
  if (seconds !== view.seconds) return fetchData();
  const before = store.data;
  if (!isFirst && before && answer.value.uptime < before.uptime) {
    restart = true; // the server was restarted: its clock and step numbers are new
    return fetchData();
  }
  take(answer.value, isFirst || !before);
  restart = false;
  setStatus(answer.value.status);
  return show(answer.value);
}

async function poll() {
  clearTimeout(polling);
  try {
    if (!document.hidden || !store.data) await fetchData();
  } catch {
    setStatus("lost");
  }
  clearTimeout(polling);
  polling = setTimeout(poll, pollSeconds * 1000);
}

function draw() {
  const heardBefore = store.status === "lost" ? 0 : (performance.now() - store.heardAt) / 1000;
  view.end = store.data.now + Math.min(heardBefore, 3 * pollSeconds) - delaySeconds;
  const hoverAt = view.hover === null ? null : view.hover - view.start;
  view.start = view.end - view.seconds;
  if (hoverAt !== null) view.hover = view.start + hoverAt; // keeps the crosshair at the pointer
  band.draw(store);
  stepBars.draw(store);
  charts.forEach((chart) => chart.draw(store));
}

const isStill = matchMedia("(prefers-reduced-motion: reduce)");
let drawnAt = 0;

function frame(time) {
  requestAnimationFrame(frame);
  const interval = isStill.matches ? 1000 * pollSeconds : 1000 / framesPerSecond;
  const isHovering = view.hover !== null || stepBars.event;
  if (!store.data || (time - drawnAt < interval - 4 && !(isStill.matches && isHovering))) return;
  drawnAt = time;
  draw();
}

byId("range").addEventListener("change", (event) => {
  view.seconds = Number(event.target.value);
  restart = true;
  poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
const restored = document.querySelector("input[name=range]:checked");
if (restored) view.seconds = Number(restored.value); // browsers restore the choice after a reload
poll();
requestAnimationFrame(frame);
