// What is chosen, and who draws it.

const state = {
  map: null, data: null, edges: null, layer: 0, head: 0, query: 0, cross: 0, key: 0,
  active: new Set(), filter: "all", scale: "root", measure: "effective", focus: null, pinned: null,
};
let headColours = [];

// The views: what draws each, and which of them are stale. Those in sight are drawn in the next
// frame, the others when the browser has nothing else to do, so that a reader finds none outdated.
const views = {
  overview: markOverview, tokens: refreshTokens, "map-view": refreshMap, "query-view": drawQuery,
  spread: drawSpread, sinks: drawSinks, "seen-view": drawSeen,
};
const stale = new Set(), inSight = new Set();
const idle = window.requestIdleCallback ?? ((call) => setTimeout(call, 50));

function drawView(name) {
  if (!stale.delete(name)) return;
  views[name]();
  document.documentElement.dataset.stale = stale.size;
}

const drawInSight = oncePerFrame(() => [...stale].filter((name) => inSight.has(name)).forEach(drawView));

function drawOthers() {
  const name = [...stale].find((each) => !inSight.has(each));
  if (name) drawView(name);
  // What is in sight now may be out of it before the next frame.
  if (stale.size) idle(drawOthers, { timeout: 500 });
}

function invalidate(...names) {
  if (!stale.size) idle(drawOthers, { timeout: 500 });
  names.forEach((name) => stale.add(name));
  document.documentElement.dataset.stale = stale.size;
  drawInSight();
}

// Change what is chosen, and draw what depends on it.
async function setState(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if (changes.head !== undefined && !changes.active) {
    state.active = new Set(state.head < 0 ? state.map.heads.keys() : [state.head]);
  }
  if (changes.query !== undefined) state.cross = state.query;
  const layer = state.layer !== before.layer || !state.data;
  if (layer) {
    const { map, layer: wanted } = state, data = await loadLayer(map, wanted);
    if (!data || map !== state.map || wanted !== state.layer) return;
    state.data = data;
  }
  const changed = (...names) => layer || names.some((name) => state[name] !== before[name]);
  if (changed("head", "scale", "filter")) view.picture = null;
  if (changed("head", "scale")) showBar();
  if (changed("filter")) drawOverview();
  if (changed("head")) $("status").textContent = headName();
  if (changed("head")) invalidate("overview", "sinks");
  if (changed("head", "filter", "active")) invalidate("tokens");
  if (changed("head", "scale", "filter", "query")) invalidate("map-view", "query-view", "seen-view");
  if (changed("head")) curves.picture = null;
  if (changed("head", "query")) invalidate("spread");
}

async function showMap(map) {
  state.map = await loadMap(map);
  Object.assign(state, { data: null, layer: 0, head: 0, active: new Set([0]), filter: "all", focus: null, pinned: null, edges: null });
  const last = map.queries.length - 1;
  state.query = Math.min(last, map.first_query);
  state.cross = state.query;
  state.key = map.documents.findLast(([query]) => query <= state.query)?.[1] ?? 0;
  // Among many keys every weight is small: against uniform they can still be told apart.
  state.scale = map.keys.length > 64 ? "lift" : "root";
  headColours = Array.from({ length: Math.max(map.heads.length, map.layers.length) }, (_, head) => headColour(head));
  fillSelect($("layer"), map.layers.map((layer, l) => [l, layer]), 0);
  fillSelect($("head"), [...map.heads.map((head, h) => [h, head]), [-1, "mean of heads"]], 0);
  $("filter-field").hidden = map.split === null;
  $("document-field").hidden = map.documents.length < 2;
  const named = documentsOf(map).map(([[first], [after]], d) => [d, `${d}: ${after - first} queries`]);
  fillSelect($("document"), [[-1, "all"], ...named], -1);
  $("filter").value = "all";
  resetView();
  setUpOverview();
  setUpTokens();
  setUpQuery();
  listAllSinks();
  await setUpSeen();
  await setState({});
  loadRest(map);
}

function showSequence(sequence) {
  const { maps } = meta.sequences[sequence];
  fillSelect($("map"), maps.map((map, m) => [m, map.title]), 0);
  $("map-field").hidden = maps.length < 2;
  return showMap(maps[0]);
}

function showBar() {
  $("layer").value = state.layer;
  $("head").value = state.head;
  $("scale").value = state.scale;
  [$("legend-low").textContent, $("legend-high").textContent] = scaleEnds[state.scale];
  const context = $("legend-bar").getContext("2d");
  for (let x = 0; x < 120; x++) {
    context.fillStyle = cssColour(x / 119);
    context.fillRect(x, 0, 1, 10);
  }
}

function redraw() {
  readPalette();
  $("text").querySelectorAll("[data-code]").forEach((span) => delete span.dataset.code);
  if (!state.data) return;
  headColours = headColours.map((_, head) => headColour(head));
  view.picture = curves.picture = null;
  setUpSeen();
  showBar();
  setUpChips();
  drawOverview();
  invalidate(...Object.keys(views));
}

function listen() {
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  $("sequence").addEventListener("change", () => showSequence(+$("sequence").value));
  $("map").addEventListener("change", () => showMap(meta.sequences[+$("sequence").value].maps[+$("map").value]));
  $("layer").addEventListener("change", () => setState({ layer: +$("layer").value }));
  $("head").addEventListener("change", () => setState({ head: +$("head").value }));
  $("filter").addEventListener("change", () => setState({ filter: $("filter").value }));
  $("scale").addEventListener("change", () => setState({ scale: $("scale").value }));
  listenOverview();
  listenTokens();
  listenHeatmap();
  listenQuery();
  listenSpread();
  listenSeen();
  dark.addEventListener("change", redraw);
  window.addEventListener("resize", oncePerFrame(redraw));
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) inSight[isIntersecting ? "add" : "delete"](target.id);
    drawInSight();
  }, { rootMargin: "100px" });
  Object.keys(views).forEach((name) => observer.observe($(name)));
}

async function start() {
  readPalette();
  const sequences = meta.sequences ?? [];
  fillSelect($("sequence"), sequences.map((sequence, s) => [s, sequence.name]), 0);
  $("sequence-field").hidden = sequences.length < 2;
  listen();
  if (meta.live) return startLive();
  await showSequence(0);
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
